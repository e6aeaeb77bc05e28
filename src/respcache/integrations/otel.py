"""OpenTelemetry, through its API alone: without an SDK, which is the application's, all of it does
nothing.

    from respcache.integrations import otel
    otel.instrument(cache)

Figures are those of this process (``ops/metrics.py``), read when the SDK collects: a hit costs what
it costs without. Spans surround fills and invalidations, and one is written for each time that the
cache's server was away. There is none of a hit.

Attributes have the names of the semantic conventions where there are any (``http.route``,
``error.type``, ``server.address``). Of errors their type is said, never their text, which may hold
rows.

Needs opentelemetry-api: the extra ``respcache[otel]``.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from respcache.core.errors import ConfigurationError
from respcache.ops.fleet import ProcessReport
from respcache.ops.metrics import OF_WORKERS, PREFIX, Metric
from respcache.ops.process import library_version, report_at_once
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

if TYPE_CHECKING:
    from respcache.cache import Cache

log = logging.getLogger("respcache")

UNITS = {"": "1", "seconds": "s", "bytes": "By"}
LEFT_OUT = frozenset({"worker_info", "fill"})
"""What the SDK's resource says, and what the histogram of fills says better."""

MEMO_S = 0.5
"""All instruments of one collection are read from one sheet."""

Attributes = dict[str, str | int]


def instrument(
    cache: "Cache",
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Report a cache to OpenTelemetry: to these providers, or to the global ones. Once in a cache's
    life."""
    version = library_version()
    meter = metrics.get_meter(PREFIX, version, meter_provider)
    fills = meter.create_histogram(
        f"{PREFIX}.fill.duration", "s", "What the handlers took whose answers were stored.",
        explicit_bucket_boundaries_advisory=BOUNDS_S,
    )  # fmt: skip
    cache.trace(
        _Tracing(trace.get_tracer(PREFIX, version, tracer_provider), fills.record, _place(cache))
    )
    reports = _Reports(cache)
    for metric in OF_WORKERS:
        if metric.kind == "histogram" or metric.name in LEFT_OUT:
            continue
        create = (
            meter.create_observable_counter
            if metric.kind == "counter"
            else meter.create_observable_gauge
        )
        create(
            f"{PREFIX}.{metric.name}", [reports.reader(metric)], UNITS[metric.unit], metric.about
        )


class _Reports:
    """Reads the figures of this process when they are collected, in the SDK's own thread."""

    def __init__(self, cache: "Cache") -> None:
        self._cache = cache
        self._id = secrets.token_hex(8)
        self._started_at = time.time()
        self._read: tuple[float, ProcessReport] | None = None

    def reader(
        self, metric: Metric[ProcessReport]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        """Make the callback of a metric's instrument."""

        def observe(options: CallbackOptions) -> Iterator[Observation]:
            for labels, value in metric.read(self._report()):
                assert isinstance(value, int | float)
                yield Observation(value, _attributes(dict(zip(metric.labels, labels, strict=True))))

        return observe

    def _report(self) -> ProcessReport:
        now = time.monotonic()
        if self._read is None or now - self._read[0] > MEMO_S:
            self._read = (
                now,
                report_at_once(self._cache, process=self._id, started_at=self._started_at),
            )
        return self._read[1]


class _Tracing(Tracing):
    """Writes spans. Whatever a tracer raises is logged: no request fails for it."""

    def __init__(
        self, tracer: trace.Tracer, record: Callable[[float, Attributes], None], place: Attributes
    ) -> None:
        self._tracer = tracer
        self._record = record
        self._place = place
        self._away: Span | None = None

    def fill(self, *, tenant: str, module: str, route: str) -> AbstractContextManager[Trace]:
        """See ``Tracing.fill``."""
        where = _attributes({"module": module, "route": route})
        began = time.monotonic()

        def ended(outcome: str) -> None:
            if outcome == "stored":
                self._record(time.monotonic() - began, where)

        said: Attributes = {**where, f"{PREFIX}.tenant": tenant}
        return _Surrounding(
            lambda: self._tracer.start_span(f"fill {route}", attributes=said), ended
        )

    def invalidation(self, *, tenants: int | None, cause: str) -> AbstractContextManager[Trace]:
        """See ``Tracing.invalidation``."""
        said: Attributes = {
            f"{PREFIX}.cause": cause,
            **({} if tenants is None else {f"{PREFIX}.tenants": tenants}),
        }
        # rounds belong to no request, whichever began them
        parent = context.Context() if cause == "outbox" else None
        return _Surrounding(lambda: self._tracer.start_span("invalidate", parent, attributes=said))

    def store(self, cause: Exception | None) -> None:
        """See ``Tracing.store``."""
        if cause is None:
            away, self._away = self._away, None
            if away is not None:
                _safely(away.end)
        elif self._away is None:
            self._away = _safely(self._begin_outage, cause)

    def _begin_outage(self, cause: Exception) -> Span:
        said: Attributes = {**self._place, "error.type": type(cause).__name__}
        span = self._tracer.start_span("cache server away", context.Context(), attributes=said)
        span.set_status(StatusCode.ERROR)
        return span


class _Surrounding(AbstractContextManager[Trace]):
    """A span that is the current one meanwhile."""

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
        return self._say

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

    def _say(self, outcome: str) -> None:
        if self._span is not None:
            _safely(self._span.set_attribute, f"{PREFIX}.outcome", str(outcome))
        if self._ended is not None:
            _safely(self._ended, outcome)


def _attributes(labels: dict[str, str]) -> Attributes:
    """Name labels as OpenTelemetry does; values have no route."""
    found: Attributes = {
        f"{PREFIX}.{name}": value for name, value in labels.items() if name != "route"
    }
    route = labels.get("route", VALUE)
    return found if route.startswith(VALUE) else {**found, "http.route": route}


def _place(cache: "Cache") -> Attributes:
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
    """Call the tracer; what it raises is logged, and None returned."""
    try:
        return call(*arguments)
    except Exception:
        log.exception("a tracer failed")
        return None
