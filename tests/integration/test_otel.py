"""OpenTelemetry: what an SDK gets of a cache, and that nothing depends on it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Response
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from respcache import Cache, RedisStore, SingleTenant, cache_list, invalidate_cache
from respcache.core.errors import StoreUnavailable
from respcache.integrations import otel
from respcache.ops.stats import metrics
from respcache.testing.servers import EmbeddedValkey

pytestmark = pytest.mark.anyio
SECRET_TEXT = "rows of somebody"


@dataclass
class Seen:
    """An application, and what its SDK was told."""

    cache: Cache
    client: httpx2.AsyncClient
    tracers: TracerProvider
    spans: InMemorySpanExporter
    reader: InMemoryMetricReader
    inner: list[Any] = field(default_factory=list)
    """The span that was the current one while a handler ran."""

    def span(self, name: str) -> ReadableSpan:
        """Return the one span of this name."""
        (found,) = (span for span in self.spans.get_finished_spans() if span.name == name)
        return found

    def points(self) -> dict[str, dict[tuple[Any, ...], Any]]:
        """Collect; return the points by instrument, and by the values of their attributes in the
        order of the names."""
        data = self.reader.get_metrics_data()
        assert data is not None
        return {
            metric.name: {
                tuple(value for _, value in sorted(dict(point.attributes or {}).items())): point
                for point in metric.data.data_points
            }
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def application(seen: list[Any]) -> FastAPI:
    app = FastAPI()

    @app.get("/things/{number}")
    @cache_list("things")
    async def things(number: int) -> dict[str, int]:
        seen.append(trace.get_current_span())
        if number == 13:
            raise ValueError(SECRET_TEXT)
        return {"number": number}

    @app.get("/private")
    @cache_list("things")
    async def private(response: Response) -> dict[str, int]:
        response.headers["cache-control"] = "private"
        return {}

    @app.post("/things")
    @invalidate_cache("things")
    async def change() -> dict[str, int]:
        return {}

    return app


async def run(url: str, processors: list[SpanProcessor] | None = None) -> AsyncIterator[Seen]:
    inner: list[Any] = []
    app = application(inner)
    cache = Cache(RedisStore(url, deadline_s=5.0), secret=b"k" * 32, resolver=SingleTenant("acme"))
    wrapped = cache.wrap(app)
    spans, reader, tracers = InMemorySpanExporter(), InMemoryMetricReader(), TracerProvider()
    for processor in processors or [SimpleSpanProcessor(spans)]:
        tracers.add_span_processor(processor)
    otel.instrument(cache, tracer_provider=tracers, meter_provider=MeterProvider([reader]))
    await cache.connect()
    wrapped.prepare()
    transport = httpx2.ASGITransport(wrapped, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://app") as client:
        yield Seen(cache, client, tracers, spans, reader, inner)
    await cache.close()


@pytest.fixture
async def seen(valkey_url: str) -> AsyncIterator[Seen]:
    async for one in run(valkey_url):
        yield one


# -- spans -----------------------------------------------------------------------------------------


async def test_a_fill_has_a_span_and_a_hit_has_none(seen: Seen) -> None:
    """It is the current one while the handler runs, so that those of the database are below it."""
    with seen.tracers.get_tracer("server").start_as_current_span("GET") as request:
        answers = [await seen.client.get("/things/1") for _ in range(3)]
    assert [("; hit" in answer.headers["cache-status"]) for answer in answers] == [
        False,
        True,
        True,
    ]
    span = seen.span("fill /things/{number}")
    assert dict(span.attributes or {}) == {
        "http.route": "/things/{number}",
        "respcache.module": "things",
        "respcache.outcome": "stored",
        "respcache.tenant": "acme",
    }
    assert span.parent is not None
    assert span.parent.span_id == request.get_span_context().span_id
    assert [one.get_span_context().span_id for one in seen.inner] == [
        span.get_span_context().span_id
    ]
    assert len(seen.spans.get_finished_spans()) == 2


async def test_a_fill_that_is_not_stored_says_why(seen: Seen) -> None:
    """In the words of Cache-Status."""
    await seen.client.get("/private")
    assert (seen.span("fill /private").attributes or {})["respcache.outcome"] == "cache-control"


async def test_of_an_error_only_its_type_is_said(seen: Seen) -> None:
    """Its text may hold rows."""
    assert (await seen.client.get("/things/13")).status_code == 500
    span = seen.span("fill /things/{number}")
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "ValueError"
    assert SECRET_TEXT not in span.to_json()


async def test_a_value_has_a_span_without_a_route(seen: Seen) -> None:
    """It answers no request by itself."""

    async def make() -> int:
        return 1

    with seen.tracers.get_tracer("server").start_as_current_span("task") as task:
        for _ in range(2):
            await seen.cache.get_or_set("acme", "sums", {"of": 1}, make)
        assert trace.get_current_span() is task
    span = seen.span("fill value:sums")
    assert dict(span.attributes or {}) == {
        "respcache.module": "sums",
        "respcache.outcome": "stored",
        "respcache.tenant": "acme",
    }


async def test_an_invalidation_belongs_to_the_request_that_wrote(seen: Seen) -> None:
    """With its outcome, and of how many tenants."""
    with seen.tracers.get_tracer("server").start_as_current_span("POST") as request:
        await seen.client.post("/things")
    span = seen.span("invalidate")
    assert dict(span.attributes or {}) == {
        "respcache.cause": "write",
        "respcache.tenants": 1,
        "respcache.outcome": "confirmed",
    }
    assert span.parent is not None
    assert span.parent.span_id == request.get_span_context().span_id


async def test_an_outage_is_a_span_of_its_own(make_valkey: Callable[..., EmbeddedValkey]) -> None:
    """From when the server was missed until it was back, beneath no request."""
    server = make_valkey()
    async for seen in run(server.url):
        await seen.client.get("/things/1")
        server.stop()
        with seen.tracers.get_tracer("server").start_as_current_span("GET"):
            assert (await seen.client.get("/things/2")).status_code == 200
        server.start()
        assert seen.cache.store is not None
        while not seen.cache.store.available:
            await seen.cache.store.connect()
            await asyncio.sleep(0.02)
        span = seen.span("cache server unavailable")
        attributes = dict(span.attributes or {})
        assert attributes.pop("error.type") in ("StoreUnavailable", "Refused")
        assert attributes == {
            "db.system.name": "redis",
            "server.address": "127.0.0.1",
            "server.port": server.port,
        }
        assert span.parent is None
        assert span.status.status_code is StatusCode.ERROR
        assert span.end_time is not None
        assert span.start_time is not None
        assert span.end_time > span.start_time


async def test_an_outage_that_a_request_notices_is_not_its_own(seen: Seen) -> None:
    """It goes on after the request, and concerns all of them."""
    with seen.tracers.get_tracer("server").start_as_current_span("GET"):
        seen.cache.tracing.store(StoreUnavailable("the deadline passed"))
    seen.cache.tracing.store(None)
    assert seen.span("cache server unavailable").parent is None


async def test_an_outage_ends_with_the_process(make_valkey: Callable[..., EmbeddedValkey]) -> None:
    """A span that is never ended is never seen."""
    server = make_valkey()
    url = server.url
    server.stop()
    spans = InMemorySpanExporter()
    async for _ in run(url, [SimpleSpanProcessor(spans)]):
        assert spans.get_finished_spans() == ()
    assert [span.name for span in spans.get_finished_spans()] == ["cache server unavailable"]


class Broken(SpanProcessor):
    """Raises whatever it is told."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("no start")

    def on_end(self, span: Any) -> None:
        raise RuntimeError("no end")


async def test_a_tracer_that_raises_fails_no_request(
    valkey_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither reads nor writes; it is in the log."""
    async for seen in run(valkey_url, [Broken()]):
        answers = [
            await seen.client.get("/things/1"),
            await seen.client.get("/things/1"),
            await seen.client.post("/things"),
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert "; hit" in answers[1].headers["cache-status"]
    assert "a tracer failed" in caplog.text


# -- figures ---------------------------------------------------------------------------------------


async def test_figures_are_those_of_the_process(seen: Seen) -> None:
    """Read when they are collected, under the names of the conventions."""
    for _ in range(3):
        await seen.client.get("/things/1")
    await seen.client.get("/private")
    await seen.client.post("/things")
    points = seen.points()
    assert points["respcache.hits"]["/things/{number}", "things"].value == 2
    assert points["respcache.misses"]["/things/{number}", "things"].value == 1
    assert points["respcache.refusals"]["/private", "things", "cache-control"].value == 1
    assert points["respcache.invalidations"][("things",)].value == 1
    assert points["respcache.store_up"][()].value == 1
    assert {key: point.count for key, point in points["respcache.fill.duration"].items()} == {
        ("/things/{number}", "things"): 1
    }
    left_out = {f"respcache.{one.name}" for one in metrics.OF_WORKERS} - points.keys()
    assert left_out == {
        "respcache.hit_duration",
        "respcache.miss_duration",
        "respcache.fill",
        "respcache.worker_info",
        "respcache.bypasses",
        "respcache.serving_lease_held",
        "respcache.serving_lease_age",
        "respcache.relay_cycles",
        "respcache.epochs",
        "respcache.pending_invalidations",
        "respcache.pending_invalidations_oldest",
    }


async def test_units_are_those_of_ucum(seen: Seen) -> None:
    """Names do not repeat them."""
    await seen.client.get("/things/1")
    data = seen.reader.get_metrics_data()
    assert data is not None
    units = {
        metric.name: metric.unit
        for one in data.resource_metrics
        for scope in one.scope_metrics
        for metric in scope.metrics
    }
    assert (units["respcache.served"], units["respcache.saved"], units["respcache.hits"]) == (
        "By",
        "s",
        "1",
    )


async def test_without_an_sdk_nothing_happens(valkey_url: str) -> None:
    """The API alone keeps nothing."""
    app = application([])
    cache = Cache(
        RedisStore(valkey_url, deadline_s=5.0), secret=b"k" * 32, resolver=SingleTenant("acme")
    )
    wrapped = cache.wrap(app)
    otel.instrument(cache)
    await cache.connect()
    wrapped.prepare()
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(wrapped), base_url="http://app"
    ) as client:
        statuses = [(await client.get("/things/1")).headers["cache-status"] for _ in range(2)]
    await cache.close()
    assert "; hit" in statuses[1]
