"""OpenTelemetry, through its API only: without an SDK, which the application provides, it does
nothing.

    from respcache.integrations import otel
    otel.instrument(cache)

Metrics are those of this process (``ops/stats/metrics.py``), read when the SDK collects them, so a
hit costs nothing extra. Spans surround fills and invalidations, and one span is written for each
time that the cache server was unavailable. Hits have no span.

Attributes follow the semantic conventions where these define one (``http.route``, ``error.type``,
``server.address``). Of errors, only the type is recorded: the text may contain rows.

Needs opentelemetry-api: the extra ``respcache[otel]``.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from respcache.cache import Cache
from respcache.core.errors import ConfigurationError
from respcache.ops.stats.metrics import OF_WORKERS, PREFIX, Metric
from respcache.ops.stats.report import library_version, report_at_once
from respcache.ops.stats.shapes import ProcessReport
from respcache.telemetry.stats import BOUNDS_S, VALUE
from respcache.telemetry.tracing import Trace, Tracing

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import Span, StatusCode, TracerProvider
except ImportError:
    raise ConfigurationError(
        "OpenTelemetry needs opentelemetry-api: pip install 'respcache[otel]'"
    ) from None

log = logging.getLogger("respcache")

UNITS = {"": "1", "seconds": "s", "bytes": "By"}
EXCLUDED = frozenset({"worker_info", "fill"})
"""Metrics that the SDK's resource and the histogram of fills replace."""

REPORT_AGE_S = 0.5
"""How long a report is reused, so that all instruments of one collection read the same one."""

Attributes = dict[str, str | int]


def instrument(
    cache: Cache,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Report a cache to these providers, or to the global ones. Call it once for each cache."""
    version = library_version()
    meter = metrics.get_meter(PREFIX, version, meter_provider)
    fills = meter.create_histogram(
        f"{PREFIX}.fill.duration",
        "s",
        "Time spent in handlers whose responses were stored.",
        explicit_bucket_boundaries_advisory=BOUNDS_S,
    )
    cache.trace(
        _Tracing(
            trace.get_tracer(PREFIX, version, tracer_provider),
            fills.record,
            _server_attributes(cache),
        )
    )
    reports = _Reports(cache)
    for metric in OF_WORKERS:
        if metric.kind == "histogram" or metric.name in EXCLUDED:
            continue
        create = (
            meter.create_observable_counter
            if metric.kind == "counter"
            else meter.create_observable_gauge
        )
        create(f"{PREFIX}.{metric.name}", [reports.reader(metric)], UNITS[metric.unit], metric.help)


class _Reports:
    """Reads the statistics of this process when the SDK collects them, in a thread of the SDK."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._id = secrets.token_hex(8)
        self._started_at = time.time()
        self._read: tuple[float, ProcessReport] | None = None

    def reader(
        self, metric: Metric[ProcessReport]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        """Return the callback of a metric's instrument."""

        def observe(options: CallbackOptions) -> Iterator[Observation]:
            for labels, value in metric.read(self._report()):
                assert isinstance(value, int | float)
                yield Observation(value, _attributes(dict(zip(metric.labels, labels, strict=True))))

        return observe

    def _report(self) -> ProcessReport:
        now = time.monotonic()
        if self._read is None or now - self._read[0] > REPORT_AGE_S:
            self._read = (
                now,
                report_at_once(self._cache, process=self._id, started_at=self._started_at),
            )
        return self._read[1]


class _Tracing(Tracing):
    """Writes spans. Exceptions of the tracer are logged and do not affect requests."""

    def __init__(
        self, tracer: trace.Tracer, record: Callable[[float, Attributes], None], server: Attributes
    ) -> None:
        self._tracer = tracer
        self._record = record
        self._server = server
        self._outage: Span | None = None

    def fill(self, *, tenant: str, module: str, route: str) -> AbstractContextManager[Trace]:
        """See ``Tracing.fill``."""
        where = _attributes({"module": module, "route": route})
        began = time.monotonic()

        def ended(outcome: str) -> None:
            if outcome == "stored":
                self._record(time.monotonic() - began, where)

        attributes: Attributes = {**where, f"{PREFIX}.tenant": tenant}
        return _SpanContext(
            lambda: self._tracer.start_span(f"fill {route}", attributes=attributes), ended
        )

    def invalidation(self, *, tenants: int | None, cause: str) -> AbstractContextManager[Trace]:
        """See ``Tracing.invalidation``."""
        attributes: Attributes = {
            f"{PREFIX}.cause": cause,
            **({} if tenants is None else {f"{PREFIX}.tenants": tenants}),
        }
        # a relay cycle belongs to no request, even if one started it
        parent = context.Context() if cause == "outbox" else None
        return _SpanContext(
            lambda: self._tracer.start_span("invalidate", parent, attributes=attributes)
        )

    def store(self, cause: Exception | None) -> None:
        """See ``Tracing.store``."""
        if cause is None:
            outage, self._outage = self._outage, None
            if outage is not None:
                _safely(outage.end)
        elif self._outage is None:
            self._outage = _safely(self._begin_outage, cause)

    def _begin_outage(self, cause: Exception) -> Span:
        attributes: Attributes = {**self._server, "error.type": type(cause).__name__}
        span = self._tracer.start_span(
            "cache server unavailable", context.Context(), attributes=attributes
        )
        span.set_status(StatusCode.ERROR)
        return span


class _SpanContext(AbstractContextManager[Trace]):
    """A context manager in which a span is the current one."""

    def __init__(
        self, start: Callable[[], Span], ended: Callable[[str], None] | None = None
    ) -> None:
        self._start = start
        self._ended = ended
        self._span: Span | None = None
        self._token: Any = None

    def __enter__(self) -> Trace:
        self._span = _safely(self._start)
        if self._span is not None:
            self._token = context.attach(trace.set_span_in_context(self._span))
        return self._set_outcome

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        span = self._span
        if span is None:
            return
        context.detach(self._token)
        if kind is not None:
            _safely(span.set_attribute, "error.type", kind.__qualname__)
            _safely(span.set_status, StatusCode.ERROR)
        _safely(span.end)

    def _set_outcome(self, outcome: str) -> None:
        if self._span is not None:
            _safely(self._span.set_attribute, f"{PREFIX}.outcome", str(outcome))
        if self._ended is not None:
            _safely(self._ended, outcome)


def _attributes(labels: dict[str, str]) -> Attributes:
    """Return labels as OpenTelemetry attributes; values have no route."""
    found: Attributes = {
        f"{PREFIX}.{name}": value for name, value in labels.items() if name != "route"
    }
    route = labels.get("route", VALUE)
    return found if route.startswith(VALUE) else {**found, "http.route": route}


def _server_attributes(cache: Cache) -> Attributes:
    url = getattr(cache.store, "url", None)
    if url is None:
        return {}
    where: Attributes = (
        {"server.address": url.path}
        if url.path
        else {"server.address": url.host, "server.port": url.port}
    )
    return {"db.system.name": "redis", **where}


def _safely(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call the tracer; log exceptions and return None for them."""
    try:
        return call(*arguments)
    except Exception:
        log.exception("a tracer failed")
        return None
