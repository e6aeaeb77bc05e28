"""How a read is decided: hit, miss or bypass. Pure, and the only place that decides it.

Every way of answering calls ``decide``: the middleware, the protocol class below ASGI,
``get_or_set``, the verifier that re-executes hits, and ``explain``. The order of its checks is the
guarantee: ``admit`` comes first, then the serving lease, the caller's scope, and the entry.

``read/proofs.py`` remembers what a hit rested on and compares that instead of deciding again. A
property test shows that a proof that still stands implies ``Hit``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from respcache.core.entry import Entry
from respcache.core.generations import Certificate, GenerationView, Verdict
from respcache.core.keys import CacheKey
from respcache.core.serving_lease import ServingLease


@dataclass(frozen=True, slots=True)
class Hit:
    """The entry may be served."""


@dataclass(frozen=True, slots=True)
class Miss:
    """A fill is needed. ``reason`` is ``absent``, ``unreadable``, ``expired``, ``digest`` or a
    verdict on the entry's certificate."""

    reason: str

    @property
    def outdated(self) -> bool:
        """Whether something is stored that may not be served."""
        return self.reason != "absent"


@dataclass(frozen=True, slots=True)
class Bypass:
    """The cache is not used for this request. ``reason`` is the ``detail`` of ``Cache-Status``."""

    reason: str
    tenant: str | None = None


class Need(Enum):
    """What must be read or created before the read can be decided."""

    VIEW = "view"
    """A view of the generations."""
    SCOPE = "scope"
    """The caller's scope: the cached one is outdated."""
    GENERATION = "generation"
    """The tenant has no usable generation; one must be created."""


Decision = Hit | Miss | Bypass | Need
HIT = Hit()


@dataclass(slots=True)  # not frozen: one is made for each lookup
class Caller:
    """The facts about one caller and one policy that a decision depends on.

    ``certificate`` and ``tags`` certify the caller's scope; both are empty for values, which have
    no caller.
    """

    tenant: str | None
    covered: bool = True
    """Every write to the tables of the policy and the resolver reaches this process."""
    permitted: bool = True
    """The resolver allows the caller's role to use the route."""
    is_off: bool = False
    """The cache, the tenant or the module is switched off."""
    blocked: bool = False
    """An invalidation of the tenant by this process is not confirmed yet."""
    certificate: Certificate | None = None
    tags: Sequence[str] = ()


@dataclass(slots=True)
class Candidate:
    """What a lookup found under a key. ``entry`` is None where nothing is stored (``present`` is
    False) or where the bytes cannot be decoded. ``expires_at`` is in seconds of the clock that also
    gives ``now``."""

    key: CacheKey
    entry: Entry | None
    present: bool = True
    expires_at: float = float("inf")


def admit(caller: Caller) -> Bypass | None:
    """Return why this caller's request must bypass the cache, or None. Needs no key and no view."""
    tenant = caller.tenant
    if not caller.covered:
        return Bypass("no-trigger", tenant)
    if tenant is None:
        return Bypass("no-tenant")
    if not caller.permitted:
        return Bypass("denied", tenant)
    if caller.is_off:
        return Bypass("off", tenant)
    if caller.blocked:
        return Bypass("pending-invalidation", tenant)
    return None


def check_lease(
    lease: ServingLease | None, view: GenerationView | None, now: float
) -> Bypass | None:
    """Return a bypass unless the lease is alive and, if a view is given, names its server.

    The lease must have been held before the view was requested. Without an outbox there is no
    lease, and nothing to check.
    """
    if lease is None:
        return None
    covered = now < lease.until if view is None else lease.allows(view.server, now)
    return None if covered else Bypass("no-lease")


def decide(
    candidate: Candidate,
    caller: Caller,
    lease: ServingLease | None,
    *,
    view: GenerationView | None,
    owner_view: GenerationView | None,
    now: float,
    needs_view: bool = True,
) -> Decision:
    """Decide a read.

    ``view`` shows the generation of the caller's tenant, ``owner_view`` the one that covers the
    caller's scope; often they are the same. ``needs_view=False`` is for entries that may be served
    for their whole lifetime even if no view can be read (level ``ttl``).
    """
    bypass = admit(caller) or check_lease(lease, view, now)
    if bypass is not None:
        return bypass
    if view is None or owner_view is None:
        if needs_view:
            return Need.VIEW
    else:
        certificate = caller.certificate
        if certificate is not None and not _is_valid(owner_view, certificate, caller.tags):
            return Need.SCOPE
        if view.certificate() is None:
            return Need.GENERATION
    entry, key = candidate.entry, candidate.key
    if entry is None:
        return Miss("unreadable" if candidate.present else "absent")
    if now >= candidate.expires_at:
        return Miss("expired")
    if entry.digest != key.digest:
        return Miss("digest")
    if view is not None:
        verdict = view.judge(entry.certificate, key.tags)
        if verdict is not Verdict.VALID:
            return Miss(verdict.value)
    return HIT


def _is_valid(view: GenerationView, certificate: Certificate, tags: Sequence[str]) -> bool:
    return view.judge(certificate, tags) is Verdict.VALID
