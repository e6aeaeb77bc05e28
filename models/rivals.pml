/* rivals.pml: simpler protocols for one key, and why they are not enough. One of
 *   DELETE   read through; a write commits, deletes the entry, and acknowledges
 *   MARKER   as DELETE, and then sets a marker; a fill that sees the marker stores nothing (it
 *            checks, then stores)
 *   ATOMIC   as MARKER, but deleting and marking are one step, and so are checking and storing
 *            (EXPIRE: the marker may expire)
 *   COUNTER  the key contains a number that a write increments (EVICT: the number may be evicted,
 *            and starts again)
 * I1: a read that begins after a write was acknowledged returns it. */
#ifndef READERS
#define READERS 2
#endif
#ifndef READS
#define READS 2
#endif
#ifdef ATOMIC
#define MARKER
#endif
byte committed, acknowledged;
bool entry, marker; byte value;                              /* DELETE, MARKER, ATOMIC */
bool numbered=true; byte number; bool filled[4]; byte values[4];    /* COUNTER */

active proctype writer() {
  atomic { committed=1; printf("MSC: writer: COMMIT v1\n") };
#ifdef COUNTER
  atomic { if :: numbered -> number++ :: else -> numbered=true; number=1 fi;
      printf("MSC: writer: number is %d\n",number) };
#else
#ifdef ATOMIC
  atomic { entry=false; marker=true;
      printf("MSC: writer deletes the entry and sets the marker\n") };
#else
  atomic { entry=false; printf("MSC: writer deletes the entry\n") };
#ifdef MARKER
  atomic { marker=true; printf("MSC: writer sets the marker\n") };
#endif
#endif
#endif
  atomic { acknowledged=1; printf("MSC: writer ACKNOWLEDGES v1\n") }
}

active [READERS] proctype reader() {
  byte n, must, v, mine; bool hit;
  do
  :: n<READS ->
     atomic { must=acknowledged; printf("MSC: reader %d begins (must see v%d)\n",_pid,must) };
#ifdef COUNTER
     atomic { mine=(numbered -> number : 0) };
     atomic { hit=filled[mine]; v=values[mine] };
#else
     atomic { hit=entry; v=value };
#endif
     if
     :: hit -> printf("MSC: reader %d HIT v%d\n",_pid,v)
     :: else -> atomic { v=committed; printf("MSC: reader %d reads the database: v%d\n",_pid,v) }
     fi;
     atomic { if :: v<must -> printf("MSC: reader %d STALE v%d\n",_pid,v) :: else fi;
         assert(v>=must) };
     if
     :: hit
     :: else ->
#ifdef COUNTER
        atomic { filled[mine]=true; values[mine]=v;
            printf("MSC: reader %d puts v%d as number %d\n",_pid,v,mine) }
#else
#ifdef ATOMIC
        atomic { if :: !marker -> entry=true; value=v; printf("MSC: reader %d puts v%d\n",_pid,v)
            :: else fi }
#else
        if
        :: marker
        :: else -> atomic { entry=true; value=v; printf("MSC: reader %d puts v%d\n",_pid,v) }
        fi
#endif
#endif
     fi;
     n++
  :: else -> break
  od
}

#if defined(EVICT) || defined(EXPIRE)
active proctype accidents() {
  do
#ifdef EVICT
  :: atomic { numbered -> numbered=false; number=0; printf("MSC: the number is EVICTED\n") }
#endif
#ifdef EXPIRE
  :: atomic { marker -> marker=false; printf("MSC: the marker expires\n") }
#endif
  :: break
  od
}
#endif
