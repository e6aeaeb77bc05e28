"""Metrics for Prometheus (``ops/stats/metrics.py`` defines them): an ASGI endpoint that reports all
processes, and a collector for one process.

    app.add_route("/metrics", Endpoint(publisher, token=os.environ["METRICS_TOKEN"]))

One scrape of any process returns the metrics of all processes that share its ``StatsPublisher``, so
scraping the load-balanced address is enough. The endpoint requires the scrape token, or the token
of a user with access to all tenants.

A scrape takes time of the event loop, in portions of a few milliseconds between which requests are
handled.

Needs prometheus-client: the extra ``respcache[prometheus]``.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from respcache.cache import Cache
from respcache.core.errors import AccessRefused, ConfigurationError
from respcache.ops.access import Access
from respcache.ops.stats import metrics
from respcache.ops.stats.metrics import LargestTenants, Metric, Sample, ScrapeState, worker_of
from respcache.ops.stats.publisher import StatsPublisher
from respcache.ops.stats.report import report_at_once
from respcache.telemetry.stats import BOUNDS_S, Histogram

try:
    from prometheus_client import generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.core import Metric as Family
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
    from prometheus_client.utils import floatToGoString
except ImportError:
    raise ConfigurationError(
        "metrics for Prometheus need prometheus-client: pip install 'respcache[prometheus]'"
    ) from None

log = logging.getLogger("respcache")

MIN_TOKEN = 16
PORTION = 50
"""Samples that are written before the event loop runs other tasks."""

FAMILIES: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}
UNLABELLED = frozenset((*metrics.OF_SERVER, *metrics.OF_SCRAPE))
"""Metrics without the label ``worker``."""
LE = (*map(floatToGoString, BOUNDS_S), "+Inf")

T = TypeVar("T")
Scope = MutableMapping[str, Any]
TokenCheck = Callable[[str], Awaitable[Access | None]]
"""Returns the permissions of a token; None if it is invalid."""


class Collector:
    """Collects the metrics of this process for prometheus-client:
    ``REGISTRY.register(Collector(cache))``.

    It is meant for applications that have their own endpoint and one process behind each address.
    Any thread may call it.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._id = secrets.token_hex(8)
        self._started_at = time.time()

    def describe(self) -> Iterator[Family]:
        """Yield the metrics without samples."""
        return (_family(metric, worker=True) for metric in metrics.OF_WORKERS)

    def collect(self) -> Iterator[Family]:
        """Yield the metrics. No round trip."""
        report = report_at_once(self._cache, process=self._id, started_at=self._started_at)
        for metric in metrics.OF_WORKERS:
            family = _family(metric, worker=True)
            for sample in metric.read(report):
                _add(family, sample, worker_of(report.process))
            yield family


class Endpoint:
    """An ASGI application that handles scrapes.

    ``token`` is the scrape token, of at least 16 characters; ``auth`` checks other tokens. Without
    both, every request is refused. ``tenants`` is the number of tenants that are exported, the
    largest for each metric.
    """

    def __init__(
        self,
        publisher: StatsPublisher,
        *,
        token: str | None = None,
        auth: TokenCheck | None = None,
        tenants: int = 0,
    ) -> None:
        if token is not None and (len(token) < MIN_TOKEN or not token.isascii()):
            raise ConfigurationError(
                f"the scrape token must be at least {MIN_TOKEN} ASCII characters: openssl rand "
                f"-hex 32"
            )
        if tenants < 0:
            raise ConfigurationError(f"tenants={tenants} must not be negative: 0 exports none")
        self._publisher = publisher
        self._token = None if token is None else token.encode()
        self._auth = auth
        self._tenants = tenants

    def __repr__(self) -> str:
        return f"Endpoint({self._publisher})"

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Handle a request (ASGI 3.0)."""
        if scope["type"] != "http":
            raise RuntimeError(f"metrics are served over HTTP, not {scope['type']}")
        status, body, headers = await self._respond(scope)
        headers = [
            *headers,
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send(
            {"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body}
        )

    async def _respond(self, scope: Scope) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
        plain = (b"content-type", b"text/plain; charset=utf-8")
        if scope["method"] not in ("GET", "HEAD"):
            return 405, b"use GET or HEAD\n", [plain, (b"allow", b"GET, HEAD")]
        refused = await self._refuse(dict(scope["headers"]).get(b"authorization", b""))
        if refused is not None:
            status, why = refused
            challenge = [(b"www-authenticate", b'Bearer realm="metrics"')] if status == 401 else []
            return status, f"{why}\n".encode(), [plain, *challenge]
        return 200, await self._exposition(), [(b"content-type", CONTENT_TYPE_PLAIN_0_0_4.encode())]

    async def _refuse(self, authorization: bytes) -> tuple[int, str] | None:
        """Return a status and a reason to refuse this request, or None to accept it."""
        if self._token is None and self._auth is None:
            return 403, "no scrape token is configured, so metrics are not served"
        scheme, _, token = authorization.strip().partition(b" ")
        token = token.strip()
        if scheme.lower() != b"bearer" or not token:
            return (
                401,
                "the endpoint requires authentication: send 'Authorization: Bearer TOKEN' with the "
                "scrape token, or with the token of a user with access to all tenants",
            )
        if self._token is not None and hmac.compare_digest(token, self._token):
            return None
        try:
            access = None if self._auth is None else await self._auth(token.decode("latin-1"))
        except Exception as error:
            log.warning("the token of a scrape could not be checked: %s", type(error).__name__)
            return 503, "the token cannot be checked at the moment"
        if access is None:
            return 401, "the token is unknown or has expired"
        try:
            access.demand_everything("the metrics endpoint")
        except AccessRefused as error:
            return 403, str(error)
        return None

    async def _exposition(self) -> bytes:
        """Return all metrics. Three round trips; with tenants, two more and one per process."""
        reports, server, problem = await self._publisher.reports()
        page = _Page()
        for metric in metrics.OF_WORKERS:
            await page.write(
                metric, ((worker_of(report.process), metric.read(report)) for report in reports)
            )
        for of_scrape in metrics.OF_SCRAPE:
            await page.write(
                of_scrape,
                [(None, of_scrape.read(ScrapeState(len(reports), complete=not problem)))],
            )
        if server is not None:
            for of_server in metrics.OF_SERVER:
                await page.write(of_server, [(None, of_server.read(server))])
        if self._tenants:
            workers = {report.process.id: worker_of(report.process) for report in reports}
            found = await self._publisher.tenants_by_process()
            read = [
                (workers[process], LargestTenants(totals, self._tenants))
                for process, totals in found.items()
                if process in workers
            ]
            for of_tenants in metrics.OF_TENANTS:
                await page.write(
                    of_tenants, ((worker, of_tenants.read(tenants)) for worker, tenants in read)
                )
        return page.bytes()


class _Page:
    """Writes metrics in portions, between which the event loop runs other tasks."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def bytes(self) -> bytes:
        """Return what was written."""
        return b"".join(self._parts)

    async def write(
        self, metric: Metric[T], read: Iterable[tuple[str | None, Iterable[Sample]]]
    ) -> None:
        """Write the samples of a metric, by worker; None for metrics without a worker."""
        family, has_header = _family(metric, worker=metric not in UNLABELLED), False
        for worker, samples in read:
            for sample in samples:
                _add(family, sample, worker)
                if len(family.samples) >= PORTION:
                    has_header = self._flush(family, has_header=has_header)
                    await asyncio.sleep(0)
        if family.samples:
            self._flush(family, has_header=has_header)
        await asyncio.sleep(0)

    def _flush(self, family: Family, *, has_header: bool) -> bool:
        text = generate_latest(_Only(family))
        # HELP and TYPE appear once, before all samples
        self._parts.append(text.split(b"\n", 2)[2] if has_header else text)
        family.samples.clear()
        return True


@dataclass(frozen=True, slots=True)
class _Only:
    """A registry with one metric."""

    family: Family

    def collect(self) -> tuple[Family]:
        """Return that metric."""
        return (self.family,)


def _family(metric: Metric[T], *, worker: bool) -> Any:
    return FAMILIES[metric.kind](
        metric.full_name,
        metric.help,
        labels=("worker", *metric.labels) if worker else metric.labels,
    )


def _add(family: Any, sample: Sample, worker: str | None) -> None:
    labels, value = sample
    if worker is not None:
        labels = (worker, *labels)
    if isinstance(value, Histogram):
        if value.count:
            family.add_metric(
                labels, [*zip(LE, accumulate(value.counts), strict=True)], value.seconds
            )
    else:
        family.add_metric(labels, value)
