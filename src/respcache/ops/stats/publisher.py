"""Publishes the statistics of each process, and reads those of all processes.

Every two seconds each process publishes its counters (``telemetry/stats.py``) and its state on the
cache server, over a connection of its own: by route, and for each tenant whose counters changed.
It adds what happened since the last time to a time series that all processes share. No request
waits for any of this or depends on it: while the server is unavailable, readers get the statistics
of their own process only, and the result says so. A process that stops publishing disappears after
``DEAD_AFTER_S``, because its key expires: clocks need not agree.

Increments of the series are sent at most once. Those that could not be sent while the server was
unavailable are sent when it is back, for the time at which they happened: the series has no gap,
and no peak after it.

Needs redis-py, which only administration uses: the extra ``respcache[dashboard]``.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar

from respcache.cache import Cache
from respcache.core import keys
from respcache.core.errors import ConfigurationError, StoreUnavailable
from respcache.ops.stats import shapes
from respcache.ops.stats.report import StatsSummary, chunks, report_of, summary_of
from respcache.ops.stats.shapes import (
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
from respcache.resp.url import ServerURL
from respcache.telemetry.stats import Counters, RouteTimes, Totals

log = logging.getLogger("respcache")

PERIOD_S = 2.0
MAX_PERIOD_S = 10.0
MAX_CPU_SHARE = 0.01
"""Share of a process's CPU time that publishing may take. A process with many tenants publishes
less often, but at least every ``MAX_PERIOD_S``."""

STATS_TTL_S = 60
DEAD_AFTER_S = 30.0
SERIES_TTL_S = 70 * 60
MAX_MINUTES = 60
"""Length of the series that can be read."""

DEADLINE_S = 1.0
MAX_PROCESSES = 1_000
MAX_CHANGED = 1_000
"""Tenants that are sent in one publication, those that have waited longest first."""

NO_SERVER = "the StatsPublisher has no server: these are the statistics of this process only"
PRUNE_EVERY = 30
"""Publications between two searches for processes that have ended."""

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
    """Publishes the statistics of one cache, and reads those of all processes that share its
    server.

    ``url`` is the address of the cache server, as for ``RedisStore``; None restricts statistics to
    this process. Pass it to the cache (``Cache(..., publisher=StatsPublisher(url))``), which starts
    and closes it; without a cache it can only read. ``client`` is its redis-py connection, which
    other administration code uses too. ``deadline_s`` bounds every wait for the server.
    """

    def __init__(self, url: str | None = None, *, deadline_s: float = DEADLINE_S) -> None:
        self.id = secrets.token_hex(8)
        self.publications = 0
        self.problem = NO_SERVER if url is None else ""
        self.client: Any = None
        self._errors: tuple[type[Exception], ...] = (_NoServer,)
        self._refused: tuple[type[Exception], ...] = ()
        self._address = None if url is None else ServerURL.parse(url)
        if url is not None:
            self.client, self._refused, self._errors = _client(url, deadline_s)
        self._cache: Cache | None = None
        self._started_at = time.time()
        self._publishing: asyncio.Task[None] | None = None
        # tenant -> its events, and the publication that sent them
        self._published: dict[str, tuple[int, int]] = {}
        self._sent = False  # the server may hold data of this process
        self._counted: dict[str, int] = {}
        self._own: dict[int, dict[str, int]] = {}  # the series of this process, by bucket
        self._unsent: dict[int, dict[str, int]] = {}  # the part of it that was not sent

    def __repr__(self) -> str:
        return f"StatsPublisher({self._address})"

    # -- lifetime ----------------------------------------------------------------------------------

    def attach(self, cache: Cache) -> None:
        """Publish the statistics of this cache. Raises ``ConfigurationError`` for a second one."""
        if self._cache is not None:
            raise ConfigurationError("a StatsPublisher belongs to one Cache: create another one")
        self._cache = cache

    def start(self) -> None:
        """Start publishing in the background. Does not block."""
        if self._publishing is None:
            self._publishing = asyncio.create_task(self._keep_publishing())

    async def close(self) -> None:
        """Stop publishing, delete this process's statistics if the server is reachable, and
        disconnect."""
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
        if self.client is None:
            return
        with contextlib.suppress(Exception):
            if self._sent and not self.problem:
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
        """Return all live processes, the sum of their counters, and the server's INFO. Three round
        trips."""
        reports, server, problem = await self.reports()
        routes = shapes.by_route(reports)
        modules = shapes.by_module(
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
        """Return the report of each live process and the server's INFO. Three round trips.

        The third value says why the reports of other processes are missing; empty if they are not.
        """
        reports, server, problem = await self._other_reports()
        own = await self._report()
        if own is not None:
            reports.append(own)
        return sorted(reports, key=lambda report: report.process.id), server, problem

    async def tenant(self, tenant: str) -> TenantStats:
        """Return the statistics of one tenant, by module and route. Two round trips.

        All counters of an unknown tenant are 0.
        """
        rows: list[RouteRow] = []
        if self._cache is not None:
            rows += shapes.route_rows(self._cache.counters.counters(tenant))
        problem = ""
        try:
            for _, _, found in await self._for_each_process(
                lambda pipeline, process: pipeline.hget(keys.routes_key(process), tenant)
            ):
                rows += shapes.decode(found, list[RouteRow]) or ()
        except self._errors as error:
            problem = self._reason(error)
        return shapes.of_tenant(tenant, rows, alone=bool(problem), problem=problem)

    async def tenants(
        self, *, order: Order = "requests", offset: int = 0, limit: int = 100
    ) -> Tenants:
        """Return a page of tenants, the largest first; ordered by ``tenant``, alphabetically.

        Takes two round trips and one for each process. The counters are those last published, also
        for this process. Requests without a tenant, and of tenants beyond ``MAX_COUNTERS``, are
        counted for the tenant ``telemetry.stats.OTHER``.
        """
        problem, found = "", dict[str, Totals]()
        try:
            async for _, name, totals in self._published_totals():
                if name in found:
                    found[name].add(totals)
                else:
                    found[name] = totals
        except self._errors as error:
            problem, found = self._reason(error), await self._own_totals()
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
        except self._errors:
            found = {self.id: await self._own_totals()}
        return found

    async def series(self, minutes: int = MAX_MINUTES) -> Series:
        """Return the points of the last minutes, of which the last is unfinished. Two round trips.

        Raises ``ValueError`` beyond ``MAX_MINUTES``.
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
        except self._errors as error:
            problem = self._reason(error)
            last = int(time.time()) // BUCKET_S
            buckets = range(last - count + 1, last + 1)
            fields = [self._own.get(bucket, {}) for bucket in buckets]
        points = [
            shapes.series_point(bucket * BUCKET_S, found)
            for bucket, found in zip(buckets, fields, strict=True)
        ]
        return Series(points, bool(problem), problem)

    async def ask(self, query: Callable[[Any], Awaitable[T]]) -> T:
        """Call ``query`` with the redis-py client. Raises ``StoreUnavailable``."""
        try:
            self._check()
            return await query(self.client)
        except self._errors as error:
            raise StoreUnavailable(self._reason(error)) from None

    # -- publishing --------------------------------------------------------------------------------

    async def publish(self) -> bool:
        """Publish once. Return whether the server accepted it; if not, ``problem`` says why."""
        assert self._cache is not None
        summary = await summary_of(self._cache.counters)
        counted = shapes.series_fields(summary.totals, summary.times, self._cache.counters)
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
        except self._errors as error:
            if not self.problem:
                log.info("statistics are not published: %s", error)
            self.problem = self._reason(error)
            return False
        self.problem = ""
        self.publications += 1
        return True

    async def _keep_publishing(self) -> None:
        own = asyncio.current_task()
        # a client may swallow the cancellation, as wait_for does: then this condition ends the loop
        while self._publishing is own:
            began, waited = time.thread_time(), False
            try:
                waited = not await self.publish() and self.client is not None
            except Exception:
                log.exception("statistics could not be published")
            if self._publishing is not own:
                return
            # thread time includes other tasks: a busy process publishes less often, but a process
            # that waited for an unavailable server does not
            spent_s = 0.0 if waited else time.thread_time() - began
            await asyncio.sleep(_pause_s(spent_s) * random.uniform(0.9, 1.1))

    async def _send(self, cache: Cache, summary: StatsSummary) -> None:
        tenants, routes = keys.tenants_key(self.id), keys.routes_key(self.id)
        pipeline = self._pipeline()
        pipeline.time()
        pipeline.expire(tenants, STATS_TTL_S)
        pipeline.expire(routes, STATS_TTL_S)
        (now, _), *there = await pipeline.execute()
        if not all(there):  # the server lost them: a restart, an eviction, FLUSHALL
            self._published.clear()
        pipeline = self._pipeline(transaction=True)
        pipeline.sadd(keys.PROCESSES_KEY, self.id)
        pipeline.expire(keys.PROCESSES_KEY, STATS_TTL_S)
        report = report_of(cache, summary, process=self.id, started_at=self._started_at)
        pipeline.set(keys.counters_key(self.id), shapes.encode(report), ex=STATS_TTL_S)
        ahead_s = now - int(time.time())
        unsent, self._unsent = self._unsent, {}  # even if this fails: at most once
        for bucket, fields in unsent.items():
            middle = bucket * BUCKET_S + BUCKET_S // 2
            series = keys.series_key((middle + ahead_s) // BUCKET_S)
            for name, more in fields.items():
                pipeline.hincrby(series, name, more)
            pipeline.expire(series, SERIES_TTL_S)
        self._sent = True
        await pipeline.execute()
        await self._send_tenants(cache.counters, summary.events)
        if self.publications % PRUNE_EVERY == 0:
            await self._prune()

    async def _send_tenants(self, stats: Counters, events: Mapping[str, int]) -> None:
        """Send the counters of the tenants that changed."""
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
                rows = shapes.route_rows(stats.counters(tenant))
                routes[tenant], totals[tenant] = (
                    shapes.encode(rows),
                    shapes.encode(shapes.tenant_row(rows)),
                )
            pipeline = self._pipeline(transaction=True)
            for key, mapping in (
                (keys.tenants_key(self.id), totals),
                (keys.routes_key(self.id), routes),
            ):
                pipeline.hset(key, mapping=mapping)
                pipeline.expire(key, STATS_TTL_S)
            await pipeline.execute()
            self._published.update(
                (tenant, (events[tenant], self.publications)) for tenant in chunk
            )

    async def _prune(self) -> None:
        """Remove processes whose report has expired."""
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
        """Add increments to the series of this process."""
        bucket = int(time.time()) // BUCKET_S
        for series in (self._own, self._unsent):
            fields = series.setdefault(bucket, {})
            for name, more in delta.items():
                fields[name] = fields.get(name, 0) + more
            for old in [known for known in series if known < bucket - SERIES_TTL_S // BUCKET_S]:
                del series[old]

    async def _report(self) -> ProcessReport | None:
        """Return what this process would publish now."""
        if self._cache is None:
            return None
        summary = await summary_of(self._cache.counters)
        return report_of(self._cache, summary, process=self.id, started_at=self._started_at)

    async def _own_totals(self) -> dict[str, Totals]:
        found: dict[str, Totals] = {}
        stats = Counters() if self._cache is None else self._cache.counters
        for chunk in chunks(stats.tenants()):
            for tenant in chunk:
                found[tenant] = shapes.totals_of(
                    *shapes.tenant_row(shapes.route_rows(stats.counters(tenant)))
                )
            await asyncio.sleep(0)
        return found

    # -- other processes ---------------------------------------------------------------------------

    async def _other_reports(self) -> tuple[list[ProcessReport], Server | None, str]:
        """Return the reports of other processes, the server's INFO, and why these are missing."""
        try:
            replies = await self._for_each_process(
                lambda pipeline, process: pipeline.get(keys.counters_key(process))
            )
            server = await self._server()
        except self._errors as error:
            return [], None, self._reason(error)
        reports: list[ProcessReport] = []
        for _, age_s, found in replies:
            report = shapes.decode(found, ProcessReport)
            if report is not None:
                report.process.age_s = age_s
                reports.append(report)
        return reports, server, ""

    async def _published_totals(self) -> AsyncIterator[tuple[str, str, Totals]]:
        """Yield process, tenant and counters, as all live processes have published them."""
        replies = await self._for_each_process(
            lambda pipeline, process: pipeline.hlen(keys.tenants_key(process)), own=True
        )
        for process, _, _ in replies:
            found: dict[bytes, bytes] = await self.client.hgetall(keys.tenants_key(process))
            for chunk in chunks(found.items()):
                for name, data in chunk:
                    row = shapes.decode(data, TenantRow)
                    if row is not None:
                        yield process, name.decode(), shapes.totals_of(*row)
                await asyncio.sleep(0)

    async def _for_each_process(
        self, command: Callable[[Any, str], object], *, own: bool = False
    ) -> list[tuple[str, float, Any]]:
        """Queue one command for each live process; return its id, its age in seconds, the reply.

        This process is included only if ``own``. Two round trips.
        """
        processes = [process for process in await self._members() if own or process != self.id]
        pipeline = self._pipeline()
        for process in processes:
            pipeline.pttl(keys.counters_key(process))
            command(pipeline, process)
        replies = await pipeline.execute()
        # -2 means that the key does not exist
        ages = [STATS_TTL_S - remaining_ms / 1000 for remaining_ms in replies[::2]]
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
        """Return the server's INFO; None if this user may not read it."""
        assert self._address is not None
        try:
            return shapes.server_of(await self.client.info(), self._address.database)
        except self._refused:
            return None

    async def _now(self) -> int:
        """Return the time of the server's clock in Unix seconds."""
        self._check()
        seconds, _ = await self.client.time()
        return int(seconds)

    def _check(self) -> None:
        if self.client is None:
            raise _NoServer(NO_SERVER)

    def _pipeline(self, *, transaction: bool = False) -> Any:
        return self.client.pipeline(transaction=transaction)

    def _reason(self, error: Exception) -> str:
        return (
            str(error)
            if isinstance(error, _NoServer)
            else f"{self._address}: {error or type(error).__name__}"
        )


def _pause_s(spent_s: float) -> float:
    """Return the pause after a publication that took ``spent_s`` of CPU time."""
    return max(PERIOD_S, min(MAX_PERIOD_S, spent_s / MAX_CPU_SHARE))


class _NoServer(Exception):
    """No server is configured."""


def _client(
    url: str, deadline_s: float
) -> tuple[Any, tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """Return a redis-py client that waits at most ``deadline_s`` and does not retry.

    Also return the exceptions that it raises if the server refuses a command, and all of them.
    """
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError, ResponseError
    except ImportError:
        raise ConfigurationError(
            "a StatsPublisher with a server needs redis-py: pip install 'respcache[dashboard]'"
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
