"""The board: where every process of an application hangs out its figures, and where anybody reads
those of all.

Every two seconds each process publishes what it counts (``ops/stats.py``) and how it is, on the
cache's server, over a connection of its own: by route, and of each tenant that changed. What
happened since is added to a series that all share. Nothing here is on the way of a request, and
nothing depends on it: while the server is away there are figures of this process only, and that is
said. Whoever stops publishing is left out after ``DEAD_AFTER_S``, by the time to live of its key:
clocks need not agree.

Deltas of the series are sent at most once. What happened while the server was away is sent when it
is back, for the moments at which it happened: no gap in the series, and no peak after it.

Needs redis-py, which is for administration only: the extra ``respcache[dashboard]``.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from respcache.core import keys
from respcache.core.errors import ConfigurationError, StoreUnavailable
from respcache.ops import fleet
from respcache.ops.fleet import (
    BUCKET_S,
    Fleet,
    ProcessReport,
    RouteRow,
    Series,
    Server,
    TenantRow,
    Tenants,
    TenantStats,
    TenantTotals,
)
from respcache.ops.process import StatsSummary, chunks, report_of, summary_of
from respcache.resp.url import ServerURL
from respcache.telemetry.stats import Counters, RouteTimes, Totals

if TYPE_CHECKING:
    from respcache.cache import Cache

log = logging.getLogger("respcache")

PERIOD_S = 2.0
MOST_PERIOD_S = 10.0
MOST_SHARE_OF_TIME = 0.01
"""What publishing may take of a process's time. Who has many tenants publishes less often, but each
``MOST_PERIOD_S``."""

FIGURES_TTL_S = 60
DEAD_AFTER_S = 30.0
SERIES_TTL_S = 70 * 60
MAX_MINUTES = 60
"""Of the series that can be asked for."""

DEADLINE_S = 1.0
MAX_PROCESSES = 1_000
MAX_CHANGED = 1_000
"""Tenants that one publication says anew; those that wait longest come first."""

NO_SERVER = "the board was given no server: figures of this process only"
PRUNE_EVERY = 30
"""Publications between two looks for processes that have ended."""

T = TypeVar("T")
Order = Literal[
    "requests",
    "hits",
    "misses",
    "hit_ratio",
    "bytes_served",
    "bytes_stored",
    "invalidations",
    "tenant",
]


class StatsPublisher:
    """Publishes the figures of one cache, and reads those of all processes that share its server.

    ``url``: the address of the cache's server, as ``RedisStore`` takes it; None: figures of this
    process only. Give it to the cache (``Cache(..., board=Board(url))``), which starts and stops
    it; by itself it can read. ``client`` is its connection (of redis-py), for what else
    administration asks the server. ``deadline_s`` bounds every wait for the server.
    """

    def __init__(self, url: str | None = None, *, deadline_s: float = DEADLINE_S) -> None:
        self.id = secrets.token_hex(8)
        self.publications = 0
        self.problem = NO_SERVER if url is None else ""
        self.client: Any = None
        self._faults: tuple[type[Exception], ...] = (_Alone,)
        self._refused: tuple[type[Exception], ...] = ()
        self._place = None if url is None else ServerURL.parse(url)
        if url is not None:
            self.client, self._refused, self._faults = _client(url, deadline_s)
        self._cache: Cache | None = None
        self._started_at = time.time()
        self._publishing: asyncio.Task[None] | None = None
        # tenant -> its events, and in which publication they were said
        self._published: dict[str, tuple[int, int]] = {}
        self._shown = False  # something of this process may be on the server
        self._counted: dict[str, int] = {}
        self._own: dict[int, dict[str, int]] = {}  # the series of this process, by bucket
        self._unsent: dict[int, dict[str, int]] = {}  # what of it the server has not been told

    def __repr__(self) -> str:
        return f"Board({self._place})"

    # -- lifetime ----------------------------------------------------------------------------------

    def attach(self, cache: "Cache") -> None:
        """Publish the figures of this cache. Raises ``ConfigurationError`` for a second one."""
        if self._cache is not None:
            raise ConfigurationError("a Board belongs to one Cache: make another one")
        self._cache = cache

    def start(self) -> None:
        """Begin to publish in the background. Does no waiting."""
        if self._publishing is None:
            self._publishing = asyncio.create_task(self._keep_publishing())

    async def close(self) -> None:
        """Stop, take this process's figures away from the server if it can be reached, and
        disconnect."""
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
        if self.client is None:
            return
        with contextlib.suppress(Exception):
            if self._shown and not self.problem:
                gone = self._pipeline(transaction=True)
                gone.srem(keys.PROCESSES_KEY, self.id)
                gone.delete(
                    keys.counters_key(self.id), keys.tenants_key(self.id), keys.routes_key(self.id)
                )
                await gone.execute()
        with contextlib.suppress(Exception):
            await self.client.aclose()

    # -- reading -----------------------------------------------------------------------------------

    async def fleet(self) -> Fleet:
        """Return all processes that live and their figures, and what the server says of itself.
        Three round trips."""
        reports, server, problem = await self.reports()
        routes = fleet.by_route(reports)
        modules = fleet.by_module(
            routes, (writes for report in reports for writes in report.writes)
        )
        totals, times = Totals(), RouteTimes()
        for module in modules:
            totals.add(module.totals)
            times.add(module.times or RouteTimes())
        processes = sorted(
            (report.process for report in reports),
            key=lambda process: (process.host, process.pid, process.id),
        )
        findings = [finding for report in reports for finding in report.findings]
        findings.sort(key=lambda finding: finding.at)
        return Fleet(
            processes, totals, times, modules, routes, findings, server, bool(problem), problem
        )

    async def reports(self) -> tuple[list[ProcessReport], Server | None, str]:
        """Return what each process that lives says of itself, and the server; and why these are not
        all. Three round trips."""
        reports, server, problem = await self._others()
        own = await self._report()
        if own is not None:
            reports.append(own)
        return sorted(reports, key=lambda report: report.process.id), server, problem

    async def tenant(self, tenant: str) -> TenantStats:
        """Return the figures of one tenant, by module and route; zeros for one that nobody has
        seen. Two round trips."""
        rows: list[RouteRow] = []
        if self._cache is not None:
            rows += fleet.route_rows(self._cache.counters.counters(tenant))
        problem = ""
        try:
            for _, _, found in await self._ask(
                lambda pipeline, process: pipeline.hget(keys.routes_key(process), tenant)
            ):
                rows += fleet.decode(found, list[RouteRow]) or ()
        except self._faults as error:
            problem = self._told(error)
        return fleet.of_tenant(tenant, rows, alone=bool(problem), problem=problem)

    async def tenants(
        self, *, order: Order = "requests", offset: int = 0, limit: int = 100
    ) -> Tenants:
        """Return some tenants, the largest first (by name: alphabetically). One round trip per
        process, and two.

        Of this process too as they were last published, where they can be read. What belongs to no
        tenant, or to those beyond the bound, is the tenant ``stats.OTHER``.
        """
        problem, found = "", dict[str, Totals]()
        try:
            async for _, name, totals in self._published_totals():
                if name in found:
                    found[name].add(totals)
                else:
                    found[name] = totals
        except self._faults as error:
            problem, found = self._told(error), await self._own_totals()
        ordered = sorted(found)
        if order != "tenant":
            ordered.sort(key=lambda name: getattr(found[name], order) or 0, reverse=True)
        chosen = [TenantTotals(name, found[name]) for name in ordered[offset : offset + limit]]
        return Tenants(chosen, len(found), bool(problem), problem)

    async def tenants_by_process(self) -> dict[str, dict[str, Totals]]:
        """Return all tenants of each process that lives, by its id. One round trip per process, and
        two."""
        found: dict[str, dict[str, Totals]] = {}
        try:
            async for process, name, totals in self._published_totals():
                found.setdefault(process, {})[name] = totals
        except self._faults:
            found = {self.id: await self._own_totals()}
        return found

    async def series(self, minutes: int = MAX_MINUTES) -> Series:
        """Return what happened in the last minutes, a point each ``BUCKET_S`` seconds, the last one
        unfinished.

        Two round trips. Raises ``ValueError`` beyond ``MAX_MINUTES``.
        """
        if not 1 <= minutes <= MAX_MINUTES:
            raise ValueError(f"minutes must be 1 to {MAX_MINUTES}, not {minutes}")
        problem = ""
        count = minutes * 60 // BUCKET_S
        try:
            last = await self._now() // BUCKET_S
            buckets = range(last - count + 1, last + 1)
            pipeline = self._pipeline()
            for bucket in buckets:
                pipeline.hgetall(keys.series_key(bucket))
            fields = [_integers(found) for found in await pipeline.execute()]
        except self._faults as error:
            problem = self._told(error)
            last = int(time.time()) // BUCKET_S
            buckets = range(last - count + 1, last + 1)
            fields = [self._own.get(bucket, {}) for bucket in buckets]
        points = [
            fleet.point(bucket * BUCKET_S, found)
            for bucket, found in zip(buckets, fields, strict=True)
        ]
        return Series(points, bool(problem), problem)

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """Ask the server something else: ``question`` is called with the client. Raises
        ``StoreUnavailable``."""
        try:
            self._check()
            return await question(self.client)
        except self._faults as error:
            raise StoreUnavailable(self._told(error)) from None

    # -- publishing --------------------------------------------------------------------------------

    async def publish(self) -> bool:
        """Publish once, as is done every ``PERIOD_S``. Returns whether the server took it; it is
        said in ``problem`` why not."""
        assert self._cache is not None
        summary = await summary_of(self._cache.counters)
        counted = fleet.counters(summary.totals, summary.times, self._cache.counters)
        delta = {
            name: more
            for name, value in counted.items()
            if (more := value - self._counted.get(name, 0))
        }
        self._counted = counted
        self._note(delta)
        if self.client is None:
            return False
        try:
            await self._send(self._cache, summary)
        except self._faults as error:
            if not self.problem:
                log.info("figures are not published: %s", error)
            self.problem = self._told(error)
            return False
        self.problem = ""
        self.publications += 1
        return True

    async def _keep_publishing(self) -> None:
        own = asyncio.current_task()
        # ends here where a client swallows the cancellation, as wait_for may
        while self._publishing is own:
            began, waited = time.thread_time(), False
            try:
                waited = not await self.publish() and self.client is not None
            except Exception:
                log.exception("figures could not be published")
            if self._publishing is not own:
                return
            # with what else the event loop did meanwhile: who is busy publishes less often; who
            # waited in vain, as often as ever
            spent_s = 0.0 if waited else time.thread_time() - began
            await asyncio.sleep(_pause_s(spent_s) * random.uniform(0.9, 1.1))

    async def _send(self, cache: "Cache", summary: StatsSummary) -> None:
        tenants, routes = keys.tenants_key(self.id), keys.routes_key(self.id)
        pipeline = self._pipeline()
        pipeline.time()
        pipeline.expire(tenants, FIGURES_TTL_S)
        pipeline.expire(routes, FIGURES_TTL_S)
        (now, _), *there = await pipeline.execute()
        if not all(there):  # a server that lost them: a restart, an eviction, FLUSHALL
            self._published.clear()
        pipeline = self._pipeline(transaction=True)
        pipeline.sadd(keys.PROCESSES_KEY, self.id)
        pipeline.expire(keys.PROCESSES_KEY, FIGURES_TTL_S)
        report = report_of(cache, summary, process=self.id, started_at=self._started_at)
        pipeline.set(keys.counters_key(self.id), fleet.encode(report), ex=FIGURES_TTL_S)
        ahead_s = now - int(time.time())
        unsent, self._unsent = self._unsent, {}  # whatever becomes of this: at most once
        for bucket, fields in unsent.items():
            middle = bucket * BUCKET_S + BUCKET_S // 2
            series = keys.series_key((middle + ahead_s) // BUCKET_S)
            for name, more in fields.items():
                pipeline.hincrby(series, name, more)
            pipeline.expire(series, SERIES_TTL_S)
        self._shown = True
        await pipeline.execute()
        await self._send_tenants(cache.counters, summary.events)
        if self.publications % PRUNE_EVERY == 0:
            await self._prune()

    async def _send_tenants(self, stats: Counters, events: Mapping[str, int]) -> None:
        """Say the figures of the tenants that changed."""
        nothing = (0, -1)
        changed = [
            tenant
            for tenant, count in events.items()
            if self._published.get(tenant, nothing)[0] != count
        ]
        changed.sort(key=lambda tenant: self._published.get(tenant, nothing)[1])
        for chunk in chunks(changed[:MAX_CHANGED]):
            totals, routes = dict[str, bytes](), dict[str, bytes]()
            for tenant in chunk:
                rows = fleet.route_rows(stats.counters(tenant))
                routes[tenant], totals[tenant] = (
                    fleet.encode(rows),
                    fleet.encode(fleet.tenant_row(rows)),
                )
            pipeline = self._pipeline(transaction=True)
            for key, mapping in (
                (keys.tenants_key(self.id), totals),
                (keys.routes_key(self.id), routes),
            ):
                pipeline.hset(key, mapping=mapping)
                pipeline.expire(key, FIGURES_TTL_S)
            await pipeline.execute()
            self._published.update(
                (tenant, (events[tenant], self.publications)) for tenant in chunk
            )

    async def _prune(self) -> None:
        """Forget the processes that have no figures any more."""
        found = await self._members()
        pipeline = self._pipeline()
        for process in found:
            pipeline.exists(keys.counters_key(process))
        gone = [
            process
            for process, there in zip(found, await pipeline.execute(), strict=True)
            if not there
        ]
        if gone:
            await self.client.srem(keys.PROCESSES_KEY, *gone)

    def _note(self, delta: Mapping[str, int]) -> None:
        """Add to the series of this process."""
        bucket = int(time.time()) // BUCKET_S
        for series in (self._own, self._unsent):
            fields = series.setdefault(bucket, {})
            for name, more in delta.items():
                fields[name] = fields.get(name, 0) + more
            for old in [known for known in series if known < bucket - SERIES_TTL_S // BUCKET_S]:
                del series[old]

    async def _report(self) -> ProcessReport | None:
        """What this process would publish now."""
        if self._cache is None:
            return None
        summary = await summary_of(self._cache.counters)
        return report_of(self._cache, summary, process=self.id, started_at=self._started_at)

    async def _own_totals(self) -> dict[str, Totals]:
        found: dict[str, Totals] = {}
        stats = Counters() if self._cache is None else self._cache.counters
        for chunk in chunks(stats.tenants()):
            for tenant in chunk:
                found[tenant] = fleet.totals_of(
                    *fleet.tenant_row(fleet.route_rows(stats.counters(tenant)))
                )
            await asyncio.sleep(0)
        return found

    # -- what the others say -----------------------------------------------------------------------

    async def _others(self) -> tuple[list[ProcessReport], Server | None, str]:
        """Read the figures of the other processes, and the server's; what is wrong, if they cannot
        be read."""
        try:
            asked = await self._ask(
                lambda pipeline, process: pipeline.get(keys.counters_key(process))
            )
            server = await self._server()
        except self._faults as error:
            return [], None, self._told(error)
        reports: list[ProcessReport] = []
        for _, age_s, found in asked:
            report = fleet.decode(found, ProcessReport)
            if report is not None:
                report.process.age_s = age_s
                reports.append(report)
        return reports, server, ""

    async def _published_totals(self) -> AsyncIterator[tuple[str, str, Totals]]:
        """Read what all processes that live have published of each tenant: process, tenant,
        totals."""
        asked = await self._ask(
            lambda pipeline, process: pipeline.hlen(keys.tenants_key(process)), own=True
        )
        for process, _, _ in asked:
            found: dict[bytes, bytes] = await self.client.hgetall(keys.tenants_key(process))
            for chunk in chunks(found.items()):
                for name, data in chunk:
                    row = fleet.decode(data, TenantRow)
                    if row is not None:
                        yield process, name.decode(), fleet.totals_of(*row)
                await asyncio.sleep(0)

    async def _ask(
        self, ask: Callable[[Any, str], object], *, own: bool = False
    ) -> list[tuple[str, float, Any]]:
        """Ask something of every other process that lives, or of all: its id, how long ago it
        published, the reply.

        Two round trips.
        """
        processes = [process for process in await self._members() if own or process != self.id]
        pipeline = self._pipeline()
        for process in processes:
            pipeline.pttl(keys.counters_key(process))
            ask(pipeline, process)
        replies = await pipeline.execute()
        # -2: there is none
        ages = [FIGURES_TTL_S - remaining_ms / 1000 for remaining_ms in replies[::2]]
        found = zip(processes, ages, replies[1::2], strict=True)
        return [
            (process, max(0.0, age_s), reply)
            for process, age_s, reply in found
            if age_s < DEAD_AFTER_S
        ]

    async def _members(self) -> list[str]:
        self._check()
        return sorted(
            name.decode()
            for name in await self.client.srandmember(keys.PROCESSES_KEY, MAX_PROCESSES)
        )

    async def _server(self) -> Server | None:
        """Return what the server says of itself, if it lets us ask."""
        assert self._place is not None
        try:
            return fleet.server_of(await self.client.info(), self._place.database)
        except self._refused:
            return None

    async def _now(self) -> int:
        """Return the server's clock: Unix seconds."""
        self._check()
        seconds, _ = await self.client.time()
        return int(seconds)

    def _check(self) -> None:
        if self.client is None:
            raise _Alone(NO_SERVER)

    def _pipeline(self, *, transaction: bool = False) -> Any:
        return self.client.pipeline(transaction=transaction)

    def _told(self, error: Exception) -> str:
        return (
            str(error)
            if isinstance(error, _Alone)
            else f"{self._place}: {error or type(error).__name__}"
        )


def _pause_s(spent_s: float) -> float:
    """Say how long to wait after a publication that took so much time."""
    return max(PERIOD_S, min(MOST_PERIOD_S, spent_s / MOST_SHARE_OF_TIME))


class _Alone(Exception):
    """There is no server to ask."""


def _client(
    url: str, deadline_s: float
) -> tuple[Any, tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """Make a client of redis-py that waits for nothing longer than that, and tries nothing twice.

    Also what it raises: when the server refuses something, and whatever is wrong.
    """
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError, ResponseError
    except ImportError:
        raise ConfigurationError(
            "a Board with a server needs redis-py: pip install 'respcache[dashboard]'"
        ) from None
    client = Redis.from_url(
        url,
        socket_timeout=deadline_s,
        socket_connect_timeout=deadline_s,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    return client, (ResponseError,), (RedisError, OSError, TimeoutError)


def _integers(found: Mapping[bytes, bytes]) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in found.items()}
