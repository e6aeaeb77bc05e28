/* composed.pml: the serving lease and certified entries in one model
 * (src/respcache/core/serving_lease.py, core/generations.py, writes/relay.py).
 * One tenant, one tag that matters. Two processes, each with relay cycles and a reader; process 0
 * also writes. A server stores a generation (nonce, recorded = epoch and identity, sequence, bump
 * of the tag, ring of applied rows) and an epoch (token, identity, cursor). An adversary controls
 * the storage of entries, as in core.pml. Time is discrete, as in serving_lease.pml.
 * A hit changes nothing, so it is no step. Instead, no state may exist in which a read that begins
 * would be served something too old (beginning, generation and lease are merged; LATELEASE is a
 * mutant of serving_lease.pml).
 * Anything that an operation on the server needs may be missing at any time: bumps may be skipped,
 * cycles may never begin or end.
 *   FAILOVER  server 1 has what server 0 had at some moment; processes move to it one by one, and
 *             server 0 lives on
 *   LOSSES=n  server 0 loses its data, or only its generation, or only its epoch
 *   PSQL      a client that never bumps commits transaction 2; its number is higher, and its COMMIT
 *             may come first or last
 *   TWOROWS   transaction 1 also has a row of another tag; the writer may die between their bumps
 *   SAVE      a process may write its cursor into the record of its epoch, also if that was lost
 *   UNKNOWN   the writer may lose its connection in COMMIT: it bumps without row ids, and the
 *             COMMIT may come later
 *   CYCLES0, CYCLES1, FILLS0, FILLS1  how many of each process; hits are unlimited
 * The writer acknowledges as in serving_lease.pml, with one addition: a cycle of its process counts
 * only in an epoch whose cursor does not see the COMMIT. Otherwise nothing was bumped for it, and a
 * process that still uses the old epoch may serve what that contains.
 * A value is the set of transactions that it shows (bits).
 * I1: a read shows what was acknowledged before it began.
 * I3: it shows what was committed L before it began.
 * Mutants: IDCURSOR DEDUPEXID EPOCHFIRST NOIDENTITY EARLYID ACKADOPTED */
#ifndef T
#define T 3               /* end of time */
#endif
#ifndef L
#define L 1
#endif
#ifndef CLAIMS
#define CLAIMS 1
#endif
#ifndef LOSSES
#define LOSSES 0
#endif
#ifndef CYCLES0
#define CYCLES0 1
#endif
#ifndef CYCLES1
#define CYCLES1 1
#endif
#ifndef FILLS0
#define FILLS0 0
#endif
#ifndef FILLS1
#define FILLS1 1
#endif
#define SLOTS (FILLS0+FILLS1+1)
#define FREE 0
#define FLIGHT 1
#define ENTRY 2
#define T1 1              /* bits: transactions, and their rows of the tag that matters */
#define T2 2
#define OTHER_ROW 4       /* with TWOROWS: the row of transaction 1 for the other tag */
#define UNREAD 8          /* EPOCHFIRST: no cursor yet */

typedef Server {
  /* the generation */
  bool here; byte nonce; byte recorded; byte sequence; byte bumped; byte ring;
  /* the epoch; token 0: there is none */
  byte token; byte identity; byte cursor
};
typedef Process {
  byte connected;                                     /* to this server */
  byte token; byte life;                              /* the epoch that it adopted;
      2 * epoch + identity of the connection */
  /* what its cycles read; transaction 1 is older than the epoch */
  byte cursor; bool passed;
  byte lease; byte lease_life
};
Server server[2];
Process process[2];
byte now, committed, acknowledged, at1, at2;          /* at: when COMMIT was */
byte authority=0, effective_at=0, until=L, claims=0;  /* the fence row */
/* a cycle of process 0 granted; transaction 1 is bumped or older */
bool covered;
byte tokens=1, losses=0; bool copied;
byte slot[SLOTS], certified_nonce[SLOTS], certified_sequence[SLOTS], value[SLOTS];
byte i, candidate, fresh_rows;                        /* scratch, 0 between steps */

#ifdef NOIDENTITY
#define LIFE(token,identity) (2*(token))
#define OTHER_IDENTITY(s) (false)
#else
#define LIFE(token,identity) (2*(token)+(identity))
#define OTHER_IDENTITY(s) (server[s].identity!=(s))
#endif
#define NO_EPOCH(s) (server[s].token==0 || OTHER_IDENTITY(s))
#ifdef DEDUPEXID
#define NEW(rows,s) (((rows) & ~server[s].ring & ~(((rows)&(T1|OTHER_ROW) \
  && server[s].ring&(T1|OTHER_ROW)) -> (T1|OTHER_ROW) : 0)))
#else
#define NEW(rows,s) ((rows) & ~server[s].ring)
#endif
#ifdef TWOROWS
#define ROWS(transactions) ((transactions) | ((transactions)&T1 -> OTHER_ROW : 0))
#else
#define ROWS(transactions) (transactions)
#endif
#define OVERDUE(t,at) ((committed & t) && at+L<=now -> t : 0)
#define LIVE(n) ((server[0].here && n==server[0].nonce) || (server[1].here && n==server[1].nonce))

inline clear(s) { server[s].here=false; server[s].nonce=0; server[s].recorded=0;
    server[s].sequence=0; server[s].bumped=0; server[s].ring=0 }
inline forget() {
  i=0;
  do
  :: i<SLOTS ->
     if
     :: slot[i]==ENTRY && !LIVE(certified_nonce[i]) -> slot[i]=FREE; certified_nonce[i]=0;
         certified_sequence[i]=0; value[i]=0
     :: slot[i]==FLIGHT && !LIVE(certified_nonce[i]) -> certified_nonce[i]=0;
         certified_sequence[i]=0
     :: else
     fi;
     i++
  :: else -> break
  od;
  i=0
}
inline open(s,p) {
  clear(s); forget(); candidate=1;
  do
  :: i=0;
     do :: i<SLOTS && !(slot[i]!=FREE && certified_nonce[i]==candidate) -> i++ :: else -> break od;
     if :: i<SLOTS || (server[1-s].here && server[1-s].nonce==candidate) -> candidate++ :: else ->
         break fi
  od;
  server[s].here=true; server[s].nonce=candidate; server[s].recorded=process[p].life; i=0;
      candidate=0
}
/* rows: ids, nothing happens unless one is new here; 0: no ids.
 * matters: whether the tag that matters is among the bumped ones */
inline bump(s,p,rows,matters) {
  if
  :: server[s].here && server[s].recorded!=process[p].life -> clear(s); forget()
  :: server[s].here && server[s].recorded==process[p].life ->
     fresh_rows=NEW(rows,s);
     if
     :: rows==0 || fresh_rows!=0 -> server[s].sequence++;
         server[s].ring=server[s].ring | fresh_rows;
        if :: matters -> server[s].bumped=server[s].sequence :: else fi
     :: else
     fi;
     fresh_rows=0
  :: else
  fi
}
inline adopt(p) {
  if
  :: process[p].token!=server[process[p].connected].token ||
      process[p].life!=LIFE(server[process[p].connected].token,process[p].connected) ->
     process[p].token=server[process[p].connected].token;
         process[p].life=LIFE(process[p].token,process[p].connected);
     process[p].cursor=server[process[p].connected].cursor;
         process[p].passed=(process[p].cursor & T1);
     printf("MSC: process %d adopts epoch %d of server %d, cursor %d\n",
            p,process[p].token,process[p].connected,process[p].cursor)
  :: else
  fi
}

/* fewer states: passed moments are equal */
inline past(deadline) { if :: deadline<=now -> deadline=0 :: else fi }
active proctype clock() {
  do
  :: d_step { now<T -> now++; printf("MSC: -- t=%d\n",now);
       past(effective_at); past(until); past(process[0].lease); past(process[1].lease);
       if :: process[0].lease==0 -> process[0].lease_life=0 :: else fi; if
           :: process[1].lease==0 -> process[1].lease_life=0 :: else fi;
       if :: at1+L<=now -> at1=0 :: else fi; if :: at2+L<=now -> at2=0 :: else fi }
  od
}

proctype writer() {
  byte life, s, read_until;
#ifdef UNKNOWN
  if
  :: skip
  :: d_step { process[0].life!=0 -> s=process[0].connected;
#ifdef EARLYID
       bump(s,0,T1,true);
#else
       bump(s,0,0,true);
#endif
       s=0; printf("MSC: writer does not know the outcome of COMMIT, bumps\n") };
     d_step { committed=committed | T1; at1=now;
         printf("MSC: COMMIT of transaction 1 comes late\n") };
     goto dead
  fi;
#endif
  d_step { committed=committed | T1; at1=now; printf("MSC: writer: COMMIT of transaction 1\n") };
  if
  :: goto dead
#ifdef TWOROWS
  :: d_step { process[0].life!=0 -> s=process[0].connected; bump(s,0,OTHER_ROW,false);
      printf("MSC: writer bumps the other tag\n"); s=0 };
     if :: goto dead :: skip fi
#else
  :: skip
#endif
  fi;
  if
  :: d_step { process[0].life!=0 -> s=process[0].connected; life=process[0].life; bump(s,0,T1,true);
       printf("MSC: writer bumps on server %d in epoch %d (sequence %d)\n",
              s,process[0].token,server[s].sequence); s=0 };
     if
     :: now<process[0].lease && process[0].lease_life==life -> goto acknowledge
     :: skip
     fi
  :: skip
  fi;
  d_step { read_until=until; printf("MSC: writer waits, until=%d\n",read_until) };
  (now>=read_until || now>=at1+L || covered);
acknowledge:
  atomic { acknowledged=acknowledged | T1; printf("MSC: writer ACKNOWLEDGES transaction 1\n") };
dead:
  atomic { life=0; read_until=0 }
}

proctype cycle(byte p; byte cycles) {
  byte n, m0, seen, s, life; bool known, grants;
  do
  :: n<cycles ->
     if
     :: d_step { process[p].life!=0 && authority!=process[p].connected && claims<CLAIMS ->
          claims++; authority=process[p].connected; effective_at=until;
          printf("MSC: process %d CLAIMS for server %d, effective at %d\n",
                 p,authority,effective_at) }
     :: d_step { process[p].life!=0 && authority==process[p].connected && now>=effective_at &&
         until<now+L ->
          until=now+2*L; n--; printf("MSC: process %d RECORDS until %d\n",p,until) }
     :: d_step { s=process[p].connected; known=!NO_EPOCH(s) && server[s].cursor!=UNREAD;
          if
          :: known -> adopt(p)
#ifdef EPOCHFIRST
          :: NO_EPOCH(s) -> tokens++; server[s].token=tokens; server[s].identity=s;
              server[s].cursor=UNREAD; adopt(p);
             printf("MSC: process %d stores epoch %d before its snapshot\n",p,tokens)
#endif
          :: else
          fi;
          life=process[p].life };
        d_step { m0=now; seen=committed; grants=(authority==s && now>=effective_at && until>=now+L);
          printf("MSC: process %d reads a page: transactions %d, m0=%d\n",p,seen,m0) };
        d_step {
          if
          :: process[p].connected!=s || process[p].life!=life -> known=false; grants=false
          :: else ->
             if
             :: known ->
                if :: (seen & ~process[p].cursor)!=0 ->
                    bump(s,p,ROWS(seen & ~process[p].cursor),true) :: else fi;
#ifdef IDCURSOR
                process[p].cursor=(seen & T2 -> T1|T2 : seen)
#else
                process[p].cursor=seen
#endif
#ifdef EPOCHFIRST
             :: !known && server[s].token==process[p].token -> server[s].cursor=seen;
                 process[p].cursor=seen; process[p].passed=seen & T1
#else
             :: !known && NO_EPOCH(s) ->
                tokens++; server[s].token=tokens; server[s].identity=s; server[s].cursor=seen;
                    adopt(p)
#endif
             :: else -> grants=false
             fi
          fi;
          if
          :: grants ->
             if :: m0+L>process[p].lease || process[p].lease_life!=process[p].life ->
                 process[p].lease=m0+L :: else fi;
             process[p].lease_life=process[p].life;
#ifdef ACKADOPTED
             if :: p==0 && (seen & T1) -> covered=true :: else fi;
#else
             if :: p==0 && (seen & T1) && !process[p].passed -> covered=true :: else fi;
#endif
             printf("MSC: process %d is GRANTED a lease on server %d in epoch %d until %d\n",
                    p,s,process[p].token,process[p].lease)
          :: else
          fi;
          known=false; m0=0; seen=0; s=0; life=0; grants=false }
     fi;
     n++
#ifdef SAVE
#define RECORD server[process[p].connected]
  :: d_step { process[p].lease_life==process[p].life && now<process[p].lease &&
       (NO_EPOCH(process[p].connected) || (RECORD.token==process[p].token &&
           RECORD.cursor!=process[p].cursor)) ->
       RECORD.token=process[p].token; RECORD.identity=process[p].connected;
           RECORD.cursor=process[p].cursor;
       printf("MSC: process %d saves its cursor %d in the record of epoch %d\n",
              p,process[p].cursor,process[p].token) }
#endif
  :: break
  od
}

proctype fill(byte p; byte fills) {
  byte n, e, s;
  do
  :: n<fills ->
     atomic { s=process[p].connected;
       if :: !server[s].here || server[s].recorded!=process[p].life -> open(s,p);
             printf("MSC: process %d opens a generation, nonce %d, epoch %d\n",
                    p,server[s].nonce,process[p].token)
          :: else fi;
       do :: slot[e]!=FREE -> e++ :: else -> break od;
       slot[e]=FLIGHT; certified_nonce[e]=server[s].nonce;
           certified_sequence[e]=server[s].sequence; s=0;
       printf("MSC: process %d captures (n%d,s%d)\n",p,certified_nonce[e],certified_sequence[e]) };
     d_step { value[e]=committed; printf("MSC: process %d reads the database: %d\n",p,value[e]) };
     d_step { slot[e]=ENTRY;
         printf("MSC: process %d puts %d as (n%d,s%d)\n",
                p,value[e],certified_nonce[e],certified_sequence[e]);
       forget(); e=0; n++ }
  :: else -> break
  od
}

/* A read that begins now, by either process, of any entry: only stale ones matter. */
#define MUST (acknowledged | OVERDUE(T1,at1) | OVERDUE(T2,at2))
#define STALE(p,e) (now<process[p].lease && process[p].lease_life==process[p].life \
  && AT(p).here && AT(p).recorded==process[p].life \
  && slot[e]==ENTRY && certified_nonce[e]==AT(p).nonce && AT(p).bumped<=certified_sequence[e] \
  && (MUST & ~value[e])!=0)
#define AT(p) server[process[p].connected]
#define HIT(p,e) :: d_step { STALE(p,e) \
  -> printf("MSC: process %d HIT %d, must see %d: STALE\n",p,value[e],MUST); assert(false) }
active proctype hits() {
  do
  HIT(0,0) HIT(1,0)
#if SLOTS>1
  HIT(0,1) HIT(1,1)
#endif
#if SLOTS>2
  HIT(0,2) HIT(1,2)
#endif
  od
}

#if defined(FAILOVER) || defined(PSQL) || LOSSES>0
proctype accidents() {
  do
#ifdef PSQL
  :: d_step { !(committed & T2) -> committed=committed | T2; at2=now;
      printf("MSC: psql: COMMIT of transaction 2\n") }
#endif
#ifdef FAILOVER
  :: d_step { !copied -> copied=true;
       server[1].here=server[0].here; server[1].nonce=server[0].nonce;
           server[1].recorded=server[0].recorded;
       server[1].sequence=server[0].sequence; server[1].bumped=server[0].bumped;
           server[1].ring=server[0].ring;
       server[1].token=server[0].token; server[1].identity=server[0].identity;
           server[1].cursor=server[0].cursor;
       printf("MSC: SPLIT: server 1 has what server 0 has now\n") }
  :: d_step { copied && process[0].connected==0 -> process[0].connected=1;
      process[0].life=LIFE(process[0].token,1);
       printf("MSC: process 0 moves to server 1\n") }
  :: d_step { copied && process[1].connected==0 -> process[1].connected=1;
      process[1].life=LIFE(process[1].token,1);
       printf("MSC: process 1 moves to server 1\n") }
#endif
#if LOSSES>0
  :: d_step { losses<LOSSES && server[0].here -> losses++; clear(0); forget();
      printf("MSC: server 0 loses its generation\n") }
  :: d_step { losses<LOSSES && server[0].token!=0 -> losses++; server[0].token=0;
      server[0].identity=0; server[0].cursor=0;
       printf("MSC: server 0 loses its epoch\n") }
  :: d_step { losses<LOSSES && server[0].here && server[0].token!=0 -> losses++; clear(0);
      server[0].token=0; server[0].identity=0;
       server[0].cursor=0; forget(); printf("MSC: server 0 loses all data\n") }
#endif
  od
}
#endif

init {
  /* both processes have a lease on server 0 at t=0; the value without transactions is cached */
  atomic {
    server[0].here=true; server[0].nonce=1; server[0].token=1; server[0].recorded=LIFE(1,0);
    process[0].token=1; process[0].life=LIFE(1,0); process[0].lease=L;
        process[0].lease_life=LIFE(1,0);
    process[1].token=1; process[1].life=LIFE(1,0); process[1].lease=L;
        process[1].lease_life=LIFE(1,0);
    slot[0]=ENTRY; certified_nonce[0]=1;
    run writer();
    if :: FILLS0>0 -> run fill(0,FILLS0) :: else fi; if :: FILLS1>0 -> run fill(1,FILLS1)
        :: else fi;
    if :: CYCLES0>0 -> run cycle(0,CYCLES0) :: else fi; if :: CYCLES1>0 -> run cycle(1,CYCLES1)
        :: else fi;
#if defined(FAILOVER) || defined(PSQL) || LOSSES>0
    run accidents()
#endif
  }
}
