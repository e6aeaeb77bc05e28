"""The lanes: one module for each way of answering, and here the list of them.

A lane is a factory of an ASGI application (the address of a Valkey in, the application out),
started in a process of its own. Each answers ``/items?page=N`` with the page's bytes,
``/slow?page=N`` with the same after 200 ms (the lanes that cache) and ``/fills`` with the number of
times that the handler ran. A name with a colon (``my_module:factory``) is a lane of one's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from handler import LOCKED_PATH, SLOW_PATH

Front = Callable[[int, int, Path], list[str]]
"""Makes the command of a server that listens on the first port and caches what the second one
answers."""


@dataclass(frozen=True)
class Lane:
    """One way of answering. ``about`` says what a hit does and checks, for the caveats beside the
    figures."""

    name: str
    target: str
    about: str
    caches: bool = True
    ours: bool = False
    store: bool = False
    """Whether its hits ask Valkey."""
    hit: bytes = b""
    """What the head of every hit holds, in lower case; without it, the handler's own count must
    stand still."""
    front: Front | None = None
    coding: str = ""
    """The content coding that its clients accept; none: they take plain bytes alone."""
    needs: tuple[str, ...] = ()
    cold: Mapping[str, str] = field(default_factory=dict)
    """Ways in which it may fill a cold key: a label and the path that takes it."""

    def missing(self) -> str | None:
        """Say why this lane cannot run here, or return None."""
        for module in self.needs:
            if find_spec(module) is None:
                return f"the package of {module} is not installed"
        module, _, factory = self.target.partition(":")
        reason: Callable[[str], str | None] | None = getattr(import_module(module), "missing", None)
        return None if reason is None else reason(factory)


CHECKS = "the caller's token looked up in a dict by a dependency"
MARK = b"; hit"


def _ours(
    name: str, about: str, *, store: bool = True, cold: bool = False, coding: str = ""
) -> Lane:
    ways = {f"respcache {name}": SLOW_PATH} if cold else {}
    target = f"lanes.ours:{name.removesuffix('-' + coding)}"
    return Lane(name, target, about, ours=True, store=store, hit=MARK, cold=ways, coding=coding)


def _front(name: str) -> Lane:
    module = import_module(f"lanes.{name}")
    about = (
        "caches the same handler's answer as a proxy; token in the key, not looked up; stale "
        "until it expires or is purged"
    )
    return Lane(name, f"lanes.{name}:make", about, front=module.command, cold={name: SLOW_PATH})


LANES = (
    Lane(
        "bare",
        "lanes.bare:make",
        "an ASGI function that sends prepared bytes by raw query; checks nothing",
        caches=False,
    ),
    Lane(
        "uncached",
        "crm",
        "GET /api/accounts?limit=50 of the CRM from PostgreSQL: another list of about 40 KB; "
        "token verified, rows filtered",
        caches=False,
    ),
    _ours(
        "near",
        "near cache, level ttl: fresh for the entry's time to live; claim of the resolver, route "
        "table",
        store=False,
    ),
    _ours(
        "strict",
        "level strict: nothing overwritten is served, checked at Valkey for every hit (the default)",
        cold=True,
    ),
    _ours(
        "bounded",
        "level bounded: what was overwritten is served for a bounded time at most",
        store=False,
    ),
    _ours(
        "store", "level strict, near cache off: entry and generation from Valkey in one round trip"
    ),
    _ours(
        "store-zstd", "the same for clients that accept zstd: sent as it is stored", coding="zstd"
    ),
    _ours("turbo", "level strict, answered by the HTTP protocol class below ASGI"),
    Lane(
        "cashews",
        "lanes.cashews:make",
        f"client side cache (Valkey tells of changes), the Response object; FastAPI route, "
        f"{CHECKS}; not checked at Valkey",
        needs=("cashews",),
        cold={"cashews": SLOW_PATH, "cashews, lock=True": LOCKED_PATH},
    ),
    Lane(
        "fastapi-cache2",
        "lanes.fastapi_cache2:make",
        f"its decorator as in its README: JSON in Valkey, decoded and serialised anew; FastAPI "
        f"route, {CHECKS}",
        store=True,
        hit=b"x-fastapi-cache: hit",
        needs=("fastapi_cache", "jinja2"),
        cold={"fastapi-cache2": SLOW_PATH},
    ),
    Lane(
        "aiocache",
        "lanes.aiocache:make",
        f"its decorator as in its README: JSON in Valkey, decoded and serialised anew; FastAPI "
        f"route, {CHECKS}",
        store=True,
        needs=("aiocache",),
        cold={"aiocache": SLOW_PATH},
    ),
    Lane(
        "redis-py",
        "lanes.redis_py:make",
        f"written by hand: GET and SETEX of the body's bytes with redis.asyncio; FastAPI route, "
        f"{CHECKS}; no invalidation",
        store=True,
        needs=("redis",),
        cold={"redis-py": SLOW_PATH},
    ),
    _front("nginx"),
    _front("varnish"),
)
BARE = LANES[0]
BY_NAME = {lane.name: lane for lane in LANES}


def named(name: str) -> Lane:
    """Return a lane of the list, or one's own (``module:factory``). Raises ``KeyError``."""
    return Lane(name, name, "given by its import path") if ":" in name else BY_NAME[name]
