/* core.pml: certified entries (src/respcache/core/generations.py).
 * One tenant, two tags; key 1 depends on tag 0, key 3 on both. An adversary controls the storage of
 * entries: a reader may be offered any entry that was ever put under its key, or none (lost, late,
 * repeated, reordered, rolled back or evicted puts).
 *   EVICT  the generation may vanish at any moment
 *   COMPACT  it may forget its tags at any moment
 *   FAILOVERS=n  a replica with old data is promoted
 *   CRASH  a writer may die after COMMIT
 *   CYCLES  a relay bumps committed outbox rows at any moment, in any order
 *   JOIN  a reader may wait for a flight of the same key instead of reading
 * I1: a read that begins after a write was acknowledged, or after a cycle bumped its row, sees that
 * write on each of its tags.
 * Mutants: NORCHECK NONONCE CAPLATE BUMPFIRST JOINANY NOFLOOR
 * Fewer states, same behavior: nonces are only compared for equality, so a fresh one may be any
 * that is not in use; and entries whose nonce can never be the current one again are forgotten. */
#ifndef READERS
#define READERS 2
#endif
#ifndef READS             /* of the first reader */
#define READS 2
#endif
#ifndef READS2            /* of each other reader */
#define READS2 1
#endif
#ifndef WRITERS
#define WRITERS 1
#endif
#ifndef FAILOVERS
#define FAILOVERS 0
#endif
#define SLOTS (READS+(READERS-1)*READS2)
#define FREE 0
#define FLIGHT 1
#define ENTRY 2

typedef Generation { bool here; byte nonce; byte recorded; byte sequence; byte floor;
    byte bumps[2] };
Generation g;                     /* on the present master */
Generation replica;               /* on its replica */
byte server=1, failovers=0;       /* identity of the master */
byte database[2], settled[2];     /* versions: committed; acknowledged or bumped by a cycle */
byte row_tag[WRITERS], row_version[WRITERS]; bool row[WRITERS];
byte slot[SLOTS], key[SLOTS], waiting[SLOTS];      /* flights, then the entries that they put */
byte certified_nonce[SLOTS], certified_sequence[SLOTS], value0[SLOTS], value1[SLOTS];
byte i, candidate;                /* scratch, 0 between steps */

#ifdef NORCHECK
#define OTHER_SERVER(identity) (false)
#else
#define OTHER_SERVER(identity) (g.recorded != identity)
#endif
#define UNBUMPED(k,s) (g.floor<=s && (((k)&1)==0 || g.bumps[0]<=s) && (((k)&2)==0 || g.bumps[1]<=s))
#define VALID(e) (certified_nonce[e]==g.nonce && UNBUMPED(key[e],certified_sequence[e]))
#ifdef JOINANY
#define JOINABLE(e) (true)
#else
#define JOINABLE(e) VALID(e)
#endif
#define LIVE(n) ((g.here && n==g.nonce) || (replica.here && n==replica.nonce))

inline clear(x) { x.here=false; x.nonce=0; x.recorded=0; x.sequence=0; x.floor=0; x.bumps[0]=0;
    x.bumps[1]=0 }
inline assign(x,y) { x.here=y.here; x.nonce=y.nonce; x.recorded=y.recorded; x.sequence=y.sequence;
    x.floor=y.floor;
                     x.bumps[0]=y.bumps[0]; x.bumps[1]=y.bumps[1] }
inline forget() {
  i=0;
#if !defined(NONONCE) && !defined(NORCHECK)
  do
  :: i<SLOTS ->
     if
     :: slot[i]==ENTRY && waiting[i]==0 && !LIVE(certified_nonce[i]) ->
        slot[i]=FREE; key[i]=0; certified_nonce[i]=0; certified_sequence[i]=0; value0[i]=0;
            value1[i]=0
     :: slot[i]==FLIGHT && !LIVE(certified_nonce[i]) -> certified_nonce[i]=0;
         certified_sequence[i]=0
     :: else
     fi;
     i++
  :: else -> break
  od;
  i=0
#endif
}
inline open() {
  clear(g); forget();
#ifdef NONONCE
  g.nonce=1;
#else
  candidate=1;
  do
  :: i=0;
     do :: i<SLOTS && !(slot[i]!=FREE && certified_nonce[i]==candidate) -> i++ :: else -> break od;
     if :: i<SLOTS || (replica.here && replica.nonce==candidate) -> candidate++ :: else -> break fi
  od;
  g.nonce=candidate; i=0; candidate=0;
#endif
  g.here=true; g.recorded=server
}
inline bump(identity,tag) {
  if
  :: g.here && !OTHER_SERVER(identity) -> g.sequence++; g.bumps[tag]=g.sequence
  :: g.here && OTHER_SERVER(identity) -> clear(g); forget()
  :: else
  fi
}

proctype writer(byte id; byte tag) {
  byte version, identity=1;
#ifdef BUMPFIRST
  atomic { bump(identity,tag); printf("MSC: writer %d bumps tag %d BEFORE COMMIT\n",id,tag) }
#endif
  atomic { database[tag]++; version=database[tag]; row[id]=true; row_tag[id]=tag;
      row_version[id]=version;
           printf("MSC: writer %d: COMMIT of tag %d v%d with its outbox row\n",id,tag,version) }
#ifdef CRASH
  if :: skip :: atomic { printf("MSC: writer %d dies\n",id); goto dead } fi;
#endif
#ifndef BUMPFIRST
again:
  if
  :: atomic { identity!=server -> identity=server;
      printf("MSC: writer %d connects to server %d\n",id,identity) }; goto again
  :: atomic { identity==server -> bump(identity,tag);
      printf("MSC: writer %d bumps tag %d (sequence %d)\n",id,tag,g.sequence) }
  fi;
#endif
  d_step { if :: version>settled[tag] -> settled[tag]=version :: else fi;
           printf("MSC: writer %d ACKNOWLEDGES tag %d v%d\n",id,tag,version) }
dead:
  atomic { version=0; identity=0 }
}

#ifdef CYCLES
proctype cycles() {
  byte r, tag;
  do
  :: atomic { r=0; do :: r<WRITERS-1 -> r++ :: break od; row[r] -> tag=row_tag[r]; bump(server,tag);
       if :: row_version[r]>settled[tag] -> settled[tag]=row_version[r] :: else fi;
       printf("MSC: a cycle bumps tag %d for row %d (sequence %d)\n",tag,r,g.sequence);
       row[r]=false; row_tag[r]=0; row_version[r]=0; r=0; tag=0 }
  :: break
  od
}
#endif

proctype reader(byte id; byte reads) {
  byte n, k, least0, least1, e, v0, v1, identity=1, way;
#define SERVED 0
#define WAITS 1
#define FILLS 2
  do
  :: n<reads ->
     atomic {
       if
       :: k=1
#ifndef ONEKEY
       :: k=3
#endif
       fi;
       least0=settled[0]; least1=settled[1];
           printf("MSC: reader %d begins key %d (must see %d,%d)\n",id,k,least0,least1) }
     if
     :: atomic { identity!=server -> identity=server; v0=database[0]; v1=database[1]; way=SERVED;
          printf("MSC: reader %d lost its connection, now server %d; bypass reads the database\n",
                 id,identity) }
     :: atomic { identity==server ->
          if :: !g.here || OTHER_SERVER(identity) -> open();
              printf("MSC: reader %d opens a generation, nonce %d\n",id,g.nonce)
             :: else fi;
          way=FILLS; e=0;
          if
          :: do :: e<SLOTS-1 -> e++ :: break od;
             if :: slot[e]==ENTRY && key[e]==k && VALID(e) -> v0=value0[e]; v1=value1[e];
                 way=SERVED;
                   printf("MSC: reader %d HIT key %d (%d,%d)\n",id,k,v0,v1)
                :: else -> e=0 fi
#ifdef JOIN
          :: do :: e<SLOTS-1 -> e++ :: break od;
             if :: slot[e]==FLIGHT && key[e]==k && JOINABLE(e) -> way=WAITS; waiting[e]++;
                   printf("MSC: reader %d joins flight %d\n",id,e)
                :: else -> e=0 fi
#endif
          :: skip
          fi;
          if
          :: way==FILLS -> e=0; do :: slot[e]!=FREE && e<SLOTS-1 -> e++ :: else -> break od;
             /* no slot left: bypass */
             if :: slot[e]!=FREE -> v0=database[0]; v1=database[1]; way=SERVED
                :: else -> slot[e]=FLIGHT; key[e]=k; certified_nonce[e]=g.nonce;
                    certified_sequence[e]=g.sequence;
                   printf("MSC: reader %d MISS key %d, captures (n%d,s%d)\n",
                          id,k,g.nonce,g.sequence) fi
          :: else
          fi }
     fi;
     if
     :: way==SERVED
     :: way==WAITS ->
        atomic { slot[e]!=FLIGHT -> v0=value0[e]; v1=value1[e]; waiting[e]--; forget();
          printf("MSC: reader %d takes over (%d,%d)\n",id,v0,v1) }
     :: way==FILLS ->
        atomic { v0=database[0]; value0[e]=v0; printf("MSC: reader %d reads tag 0: v%d\n",id,v0);
          if :: k==1 -> goto put :: else fi };
        atomic { v1=database[1]; value1[e]=v1; printf("MSC: reader %d reads tag 1: v%d\n",id,v1) };
put:    atomic {
#ifdef CAPLATE
          if :: !g.here || OTHER_SERVER(identity) -> open() :: else fi;
          certified_nonce[e]=g.nonce; certified_sequence[e]=g.sequence;
#endif
          slot[e]=ENTRY;
          printf("MSC: reader %d puts key %d (%d,%d) as (n%d,s%d)\n",
                 id,k,v0,v1,certified_nonce[e],certified_sequence[e]);
          forget() }
     fi;
     d_step {
       if :: ((k&1) && v0<least0) || ((k&2) && v1<least1) ->
             printf("MSC: reader %d STALE: (%d,%d), must see (%d,%d)\n",id,v0,v1,least0,least1)
          :: else fi;
       assert(!((k&1) && v0<least0)); assert(!((k&2) && v1<least1));
       e=0; v0=0; v1=0; least0=0; least1=0; k=0; way=SERVED };
     n++
  :: else -> break
  od;
  atomic { n=0; identity=0 }
}

proctype accidents() {
  do
#ifdef EVICT
  :: d_step { g.here -> clear(g); forget(); printf("MSC: the generation is EVICTED\n") }
#endif
#ifdef COMPACT
  :: d_step { g.here && g.sequence>0 && g.floor<g.sequence ->
#ifndef NOFLOOR
       g.floor=g.sequence;
#endif
       g.bumps[0]=0; g.bumps[1]=0; printf("MSC: tags forgotten, floor %d\n",g.floor) }
#endif
#if FAILOVERS>0
  :: d_step { failovers<FAILOVERS -> assign(replica,g); forget();
      printf("MSC: the replica catches up (sequence %d)\n",g.sequence) }
  :: d_step { failovers<FAILOVERS -> failovers++; server++; assign(g,replica);
       if :: failovers==FAILOVERS -> clear(replica) :: else fi; forget();
       printf("MSC: FAILOVER to server %d (sequence %d)\n",server,g.sequence) }
#endif
  :: break
  od
}

init {
  byte k;
  atomic {
    do :: k<WRITERS -> run writer(k,k%2); k++ :: else -> break od; k=0;
    do :: k<READERS -> run reader(k,(k==0 -> READS : READS2)); k++ :: else -> break od; k=0;
#ifdef CYCLES
    run cycles();
#endif
    run accidents()
  }
}
