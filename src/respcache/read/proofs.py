"""Hits from memory: decided once, then reused while nothing that they depend on has changed.

A first hit is decided by ``core.decision.decide``. What it rested on is remembered in a
``HitProof``. As long as all of that is unchanged, the next request of the same scoped plan is a hit
without deciding again (``still_proven``). A property test checks that a standing proof implies
``Hit``.

At level ``strict`` a view must be read for every request. If the server's reply is unchanged, the
store returns the same view object, and the proof stands.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from respcache.core.decision import HIT, Bypass, Candidate, Decision, admit, decide
from respcache.core.errors import StoreError
from respcache.core.generations import GenerationView, Verdict
from respcache.core.serving_lease import ServingLease
from respcache.core.tokens import ConsistencyToken, reached
from respcache.read.guards import Guards
from respcache.read.memory import MemoryEntry, NearCache
from respcache.read.plans import HitProof, ScopedPlan
from respcache.read.views import ViewReader


class InMemory(NamedTuple):
    """An entry in memory that may be a hit, and what is needed to decide that.

    ``lease`` is the serving lease from before a view was requested. ``view`` is None if one must be
    read first.
    """

    memory_entry: MemoryEntry
    lease: ServingLease | None
    view: GenerationView | None


class Proofs:
    """Proves hits from memory. One per runtime."""

    def __init__(
        self, near: NearCache, views: ViewReader, guards: Guards, *, clock: Callable[[], float]
    ) -> None:
        self._near = near
        self._views = views
        self._guards = guards
        self._clock = clock

    def recall(self, scoped: ScopedPlan, now: float) -> HitProof | None:
        """Return the proof if it stands and the level needs no new view. Counts a use."""
        if not scoped.max_view_age_s:
            return None
        proof = self.still_proven(scoped, now)
        if proof is not None:
            proof.count_use()
        return proof

    async def hit(self, scoped: ScopedPlan, now: float) -> HitProof | None:
        """Return the proof that this process's memory answers the request, or None.

        At most one round trip, for a view.
        """
        proof = self.still_proven(scoped, now)
        if proof is not None:
            if scoped.max_view_age_s:
                proof.count_use()
                return proof
            found = InMemory(proof.memory_entry, proof.lease, None)
        else:
            candidate = self.candidate(scoped, now)
            if candidate is None:
                return None
            found = candidate
        view: GenerationView | None = found.view
        if view is None:
            with suppress(StoreError):
                view = await self._views.read(scoped.cache_key.generation_key, scoped.tags)
            now = self._clock()
        return self.confirm(scoped, proof, found, view=view, now=now)

    def still_proven(self, scoped: ScopedPlan, now: float) -> HitProof | None:
        """Return the last proof of this plan if nothing that it rests on has changed.

        At level ``strict`` a view must still be read and be the one of the proof.
        """
        proof, guards = scoped.proof, self._guards
        if proof is None or now >= proof.until or guards.restricted:
            return None
        slot, lease = proof.slot, proof.lease
        if slot is None or slot.value is not proof.memory_entry:
            return None
        if lease is not None and (lease is not guards.lease or proof.tables is not guards.tables):
            return None
        if scoped.max_view_age_s and proof.batch.view is not proof.view:
            return None
        return proof

    def candidate(self, scoped: ScopedPlan, now: float) -> InMemory | None:
        """Return the entry in memory that may answer a request, or None. Counts a use."""
        near, entry_key = self._near, scoped.cache_key.entry_key
        if not scoped.tags:  # two generations count, so one view does not decide
            return None
        memory_entry = near.get(entry_key)
        if memory_entry is None:
            return None
        if now >= memory_entry.expires_at:
            near.discard(entry_key)
            return None
        return self.examine(scoped, memory_entry, now)

    def examine(self, scoped: ScopedPlan, memory_entry: MemoryEntry, now: float) -> InMemory | None:
        """Return what is needed to decide about a memory entry. Changes nothing.

        The caller is admitted before a view is requested, and again by ``decide``: a tenant that
        was blocked when the request arrived must be read anew, and what is switched off must not
        wait for the cache server.
        """
        if not scoped.tags or not _varies_as_before(scoped):
            return None
        if admit(self._guards.caller_of(scoped, in_memory=True)) is not None:
            return None
        lease = self._guards.lease if scoped.needs_view else None
        if lease is not None and now >= lease.until:
            return None
        view = None
        if scoped.max_view_age_s:
            generation, since = scoped.cache_key.generation_key, now - scoped.max_view_age_s
            view = self._views.recent(generation, scoped.tags, since=since)
        return InMemory(memory_entry, lease, view)

    def confirm(
        self,
        scoped: ScopedPlan,
        proof: HitProof | None,
        found: InMemory,
        *,
        view: GenerationView | None,
        now: float,
    ) -> HitProof | None:
        """Return the former proof if it stands in this view, else a new one; None: no hit.

        ``view`` is the one that was read for the request, None if the store is away.
        """
        if proof is not None:
            proof.count_use()
            if view is proof.view and now < proof.until and not self._guards.restricted:
                return proof
        return self.prove(scoped, found, view=view, now=now)

    def prove(
        self, scoped: ScopedPlan, found: InMemory, *, view: GenerationView | None, now: float
    ) -> HitProof | None:
        """Decide about an entry in memory, and remember the proof of a hit."""
        decision = self.decide(scoped, found, view=view, now=now)
        entry_key, generation = scoped.cache_key.entry_key, scoped.cache_key.generation_key
        memory_entry = found.memory_entry
        if decision is not HIT:
            if view is not None and not isinstance(decision, Bypass):
                verdict = view.judge(memory_entry.entry.certificate, scoped.cache_key.tags)
                if verdict is not Verdict.VALID:
                    self._near.drop(entry_key, memory_entry)
                    # the view may be an old one, which must not judge what is filled next
                    self._views.expire(generation)
            return None
        representation = memory_entry.representations.get(scoped.coding)
        if representation is None:
            representation = self._near.represent(
                entry_key, memory_entry, scoped.coding, max_bytes=scoped.policy.max_body_bytes
            )
            if representation is None:
                return None
        batch = self._views.batch(generation)
        until = memory_entry.expires_at
        if found.lease is not None:
            until = min(until, found.lease.until)
        if scoped.max_view_age_s:
            until = min(until, batch.requested_at + scoped.max_view_age_s)
        proof = HitProof(
            memory_entry,
            representation,
            view=view,
            slot=self._near.slot(entry_key),
            batch=batch,
            lease=found.lease,
            tables=self._guards.tables,
            until=until,
        )
        if view is not None and scoped.policy.varies_by is None:
            scoped.proof = proof  # with varies_by, the value must be computed for every request
        return proof

    def decide(
        self, scoped: ScopedPlan, found: InMemory, *, view: GenerationView | None, now: float
    ) -> Decision:
        """Return the decision about an entry in memory. Changes nothing."""
        memory_entry, cache_key = found.memory_entry, scoped.cache_key
        bumped = view is None and self._views.bumped(cache_key.generation_key)
        return decide(
            Candidate(cache_key, memory_entry.entry, expires_at=memory_entry.expires_at),
            self._guards.caller_of(scoped, in_memory=True),
            found.lease,
            view=view,
            owner_view=view,
            now=now,
            needs_view=scoped.needs_view or bumped,
        )

    def require_token(
        self, scoped: ScopedPlan, token: ConsistencyToken | None, now: float
    ) -> ScopedPlan:
        """Return the plan for a request that brings this consistency token.

        It is a strict one unless the view that may be used has reached the token.
        """
        if token is None or not scoped.max_view_age_s:
            return scoped
        generation, since = scoped.cache_key.generation_key, now - scoped.max_view_age_s
        view = self._views.recent(generation, scoped.tags, since=since)
        return scoped if view is not None and reached(token, view) else scoped.strict()


def _varies_as_before(scoped: ScopedPlan) -> bool:
    """Whether ``varies_by`` still returns the value that the key was built from."""
    varies_by, cached = scoped.policy.varies_by, scoped.cached_scope
    if varies_by is None:
        return True
    try:
        return cached is not None and varies_by(cached.scope) == scoped.vary_value
    except Exception:  # the lookup meets it too, and reports it
        return False
