/* serving_lease.pml: the serving lease and the fence row (src/respcache/core/serving_lease.py).
 * Time is discrete, and all clocks run at the same rate. There are two servers: 0, and with SPLIT
 * also 1, which was promoted while 0 lives on: processes 0 and 2 may move to it.
 * Process 0 writes once (version 1), 1 and 2 read; all run relay cycles.
 * Anything that an operation on the server needs may be missing at any time: a bump may be skipped,
 * a cycle may never begin or end.
 *   cycle   one page of the database (m0, committed row, authority, effective_at, until) decides:
 *           CLAIM   another server is the authority: this one becomes it, effective_at := until,
 *                   in one update
 *           RECORD  until < now + L: until := now + 2L, in a commit of its own; never under a
 *                   server that is not effective
 *           GRANT   bump the row unless this was done here before, lease := m0 + L
 *           (m0 and page are one step here: time in between could only make the lease shorter)
 *   writer  COMMIT; bump; acknowledge at once if the server that confirmed the bump is the one of
 *           its own lease, and that lease is alive; else when `until` as read after COMMIT has
 *           passed, or L after COMMIT, or when a cycle of this process with a later page granted
 *   reader  serves if the lease that it had before it read the generation is still alive then
 * I1: a read that begins after the acknowledgement returns version 1.
 * I3: so does a read that begins L after COMMIT.
 * Reading the generation is merged with the beginning of a read, filling with putting: see core.pml
 * and composed.pml.
 * Mutants: ACKALWAYS NOWAIT NOEFF LATEM0 LATELEASE NOLEASE NORECORD EARLYRECORD */
#ifndef T
#define T 4               /* end of time */
#endif
#ifndef L
#define L 2
#endif
#ifndef CLAIMS
#define CLAIMS 1
#endif
#ifndef CYCLES0
#define CYCLES0 1
#endif
#ifndef CYCLES1
#define CYCLES1 1
#endif
#ifndef CYCLES2
#define CYCLES2 0
#endif
#ifndef READS1
#define READS1 1
#endif
#ifndef READS2
#define READS2 0
#endif
byte now, committed_at;
bool committed, acknowledged, covered;
byte authority=0, effective_at=0, until=L, claims=0;              /* the fence row */
/* of each server */
byte sequence[2], applied[2]; bool entry[2]; byte entry_value[2], entry_sequence[2];
byte connected[3], lease[3], lease_server[3];                     /* of each process */

#ifdef NOLEASE
#define SERVES (true)
#else
#ifdef LATELEASE
#define SERVES (now<lease[p] && lease_server[p]==server)
#else
#define SERVES (now<deadline && for_server)
#endif
#endif

active proctype clock() { do :: d_step { now<T -> now++; printf("MSC: -- t=%d\n",now) } od }

#ifdef SPLIT
proctype network() {
  do
  :: d_step { connected[0]==0 -> connected[0]=1; printf("MSC: process 0 moves to server 1\n") }
#if CYCLES2+READS2>0
  :: d_step { connected[2]==0 -> connected[2]=1; printf("MSC: process 2 moves to server 1\n") }
#endif
  od
}
#endif

proctype cycle(byte p; byte cycles) {
  byte n, m0, seen, server; bool checked;
  do
  :: n<cycles ->
     if
     :: d_step { authority!=connected[p] && claims<CLAIMS -> claims++; authority=connected[p];
#ifdef NOEFF
          effective_at=now;
#else
          effective_at=until;
#endif
          printf("MSC: process %d CLAIMS for server %d, effective at %d\n",
                 p,authority,effective_at) }
#ifdef NORECORD
#define RECORDED (true)
#else
#ifdef EARLYRECORD        /* until is checked once; the granting page (and m0) come later */
#define RECORDED (checked)
     :: d_step { !checked && authority==connected[p] && now>=effective_at && until>=now+L ->
         checked=true; n-- }
#else
#define RECORDED (until>=now+L)
#endif
     :: d_step { authority==connected[p] && now>=effective_at && until<now+L ->
          until=now+2*L; n--; printf("MSC: process %d RECORDS until %d\n",p,until) }
#endif
     :: d_step { authority==connected[p] && now>=effective_at && RECORDED ->
          checked=false; m0=now; seen=committed; server=connected[p];
              printf("MSC: process %d reads a page: v%d, m0=%d\n",p,seen,m0) };
        d_step {
          if :: applied[server]<seen -> applied[server]=seen; sequence[server]++ :: else fi;
#ifdef LATEM0
          m0=now;
#endif
          if :: m0+L>lease[p] || lease_server[p]!=server -> lease[p]=m0+L :: else fi;
          lease_server[p]=server; covered=covered || (p==0 && seen);
          printf("MSC: process %d is GRANTED a lease on server %d until %d\n",p,server,lease[p]);
          m0=0; seen=0; server=0 }
     fi;
     n++
  :: break
  od
}

proctype writer() {
  byte server, read_until;
  d_step { committed=true; committed_at=now; printf("MSC: writer: COMMIT v1\n") };
  if
  :: goto dead
  :: d_step { server=connected[0]; sequence[server]++; applied[server]=1;
      printf("MSC: writer bumps on server %d\n",server) };
     if
#ifdef ACKALWAYS
     :: goto acknowledge
#endif
     :: now<lease[0] && lease_server[0]==server -> goto acknowledge
     :: skip
     fi
  :: skip
#ifdef NOWAIT
     -> goto acknowledge
#endif
  fi;
  d_step { read_until=until; printf("MSC: writer reads until %d\n",read_until) };
  (now>=read_until || now>=committed_at+L || covered);
acknowledge:
  atomic { acknowledged=true; printf("MSC: writer ACKNOWLEDGES v1\n") };
dead:
  atomic { server=0; read_until=0 }
}

proctype reader(byte p; byte reads) {
  byte n, value, captured, server, deadline; bool must, found, for_server;
  do
  :: n<reads ->
     d_step {
       must=acknowledged || (committed && committed_at+L<=now);
       server=connected[p]; deadline=lease[p]; for_server=(lease_server[p]==server);
           captured=sequence[server];
       if :: entry[server] && entry_sequence[server]>=captured -> found=true;
           value=entry_value[server] :: else fi;
       printf("MSC: process %d begins to read on server %d (must see v%d)\n",p,server,must) }
     d_step {
       if
       :: found && SERVES -> printf("MSC: process %d HIT v%d (its lease was %d)\n",p,value,deadline)
       :: else ->
          value=committed;
          if :: !found -> entry[server]=true; entry_value[server]=value;
              entry_sequence[server]=captured :: else fi;
          printf("MSC: process %d fills v%d at sequence %d\n",p,value,captured)
       fi;
       if :: value<must -> printf("MSC: process %d STALE v%d\n",p,value) :: else fi;
       assert(value>=must); must=false; value=0; captured=0; server=0; found=false; deadline=0;
           for_server=false };
     n++
  :: else -> break
  od
}

init {
  atomic {
    /* all granted on server 0 at t=0; version 0 is cached there */
    lease[0]=L; lease[1]=L; lease[2]=L; entry[0]=true;
#ifdef SPLIT
    run network();
#endif
    run writer();
    if :: READS1>0 -> run reader(1,READS1) :: else fi; if :: READS2>0 -> run reader(2,READS2)
        :: else fi;
    if :: CYCLES0>0 -> run cycle(0,CYCLES0) :: else fi; if :: CYCLES1>0 -> run cycle(1,CYCLES1)
        :: else fi;
    if :: CYCLES2>0 -> run cycle(2,CYCLES2) :: else fi
  }
}
