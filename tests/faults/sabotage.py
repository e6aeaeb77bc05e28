"""Rules of the protocol taken out, one at a time, to see that the suite notices. Only ever in
processes of the suite."""

import hashlib
from collections.abc import Callable
from typing import Any

from respcache.core.decision import HIT
from respcache.core.errors import StoreError
from respcache.core.generations import GenerationView, Verdict
from respcache.core.serving_lease import Outcome, ServingLease
from respcache.integrations import uvicorn
from respcache.read.proofs import InMemory
from respcache.read.views import Tags, ViewReader
from respcache.resp.connection import Connection
from respcache.stores.redis import RedisStore
from respcache.writes.relay import OutboxRelay

SOME_SERVER = "0" * 40


def commit(name: str) -> None:
    """Take out the rule of this name in this process."""
    SABOTAGES[name]()


def _no_fence() -> None:
    """Serve for ever what the store holds."""
    ServingLease.allows = lambda self, server, now: True  # type: ignore[method-assign]


def _ack_always() -> None:
    """Acknowledge a write whose bump was not confirmed at once."""

    async def safe(self: OutboxRelay, since: float) -> Outcome:
        return Outcome.SAFE

    OutboxRelay.safe = safe  # type: ignore[method-assign]


def _no_identity() -> None:
    """Take every server life for the same one."""
    shake_hands, prepare, epoch = Connection._shake_hands, RedisStore.__init__, RedisStore.epoch

    async def shake_anonymous_hands(self: Connection, *args: Any) -> None:
        await shake_hands(self, *args)
        self.identity = SOME_SERVER

    def prepare_anonymous(self: RedisStore, *args: Any, **options: Any) -> None:
        prepare(self, *args, **options)
        for script in (self._open, self._bump, self._epoch):
            script.text = script.text.replace(
                "string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')",
                f"'{SOME_SERVER}'",
            )
            assert SOME_SERVER in script.text
            script.digest = hashlib.sha1(script.text.encode(), usedforsecurity=False).hexdigest()

    async def anonymous_epoch(self: RedisStore, *args: Any, **options: Any) -> Any:
        record, _ = await epoch(self, *args, **options)
        return record, SOME_SERVER

    Connection._shake_hands = shake_anonymous_hands  # type: ignore[method-assign]
    RedisStore.__init__ = prepare_anonymous  # type: ignore[method-assign]
    RedisStore.epoch = anonymous_epoch  # type: ignore[method-assign]
    RedisStore._compare = lambda self, identity, server: None  # type: ignore[method-assign]


def _no_replay() -> None:
    """Let rounds pass over what they find in the outbox."""

    async def bump(self: OutboxRelay, due: Any) -> None:
        return None

    OutboxRelay._bump = bump  # type: ignore[method-assign]


def _no_certificate() -> None:
    """Take every stored answer for a valid one."""
    judge = GenerationView.judge

    def judge_kindly(self: GenerationView, *args: Any) -> Verdict:
        judge(self, *args)
        return Verdict.VALID

    GenerationView.judge = judge_kindly  # type: ignore[method-assign]


def _no_bound() -> None:
    """Let the last view of a tenant last: nobody looks at its age or hears of bumps."""

    def last(
        self: ViewReader, generation: str, tags: Tags, *, since: float
    ) -> GenerationView | None:
        batch = self._batches.get(generation)
        return batch.view if batch is not None and tags in batch.tag_sets else None

    ViewReader.recent = last  # type: ignore[method-assign]
    _no_push()


def _no_push() -> None:
    """Hear of no bump, of one's own process neither: views last as long as they may."""
    ViewReader.expire = lambda self, generation: None  # type: ignore[method-assign]


def _no_view_below() -> None:
    """Send below ASGI what lies in memory, whatever the view says that was read for it."""
    on_view = uvicorn._HitProtocol._on_view

    def on_view_unjudged(
        self: Any, request: Any, found: InMemory, result: GenerationView | StoreError
    ) -> None:
        proofs = self.middleware.cache.runtime.proofs
        if isinstance(result, GenerationView):
            proofs.decide = lambda *others, **named: HIT
        try:
            on_view(self, request, found, result)
        finally:
            proofs.__dict__.pop("decide", None)

    uvicorn._HitProtocol._on_view = on_view_unjudged  # type: ignore[method-assign]


SABOTAGES: dict[str, Callable[[], None]] = {
    "no-fence": _no_fence,
    "ack-always": _ack_always,
    "no-identity": _no_identity,
    "no-replay": _no_replay,
    "no-certificate": _no_certificate,
    "no-bound": _no_bound,
    "no-push": _no_push,
    "no-view-below": _no_view_below,
}
