"""Traces of the CRM: writes of its own and writes that rounds find."""

import asyncio
from collections.abc import Callable

import asyncpg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from respcache.integrations import otel

from .conftest import Crm

pytestmark = pytest.mark.anyio


async def test_a_write_of_psql_is_traced_apart_from_all_requests(
    crm: Crm, database_url: str
) -> None:
    """The CRM's own writes belong to the request that wrote; what a round finds belongs to none."""
    spans, tracers = InMemorySpanExporter(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    otel.instrument(crm.cache, tracer_provider=tracers)

    def invalidations(cause: str) -> list[ReadableSpan]:
        return [
            span
            for span in spans.get_finished_spans()
            if (span.attributes or {}).get("respcache.cause") == cause
        ]

    with tracers.get_tracer("server").start_as_current_span("POST") as request:
        await crm.as_user("abe").post("/api/accounts", json={"name": "Acorn"})
    own = invalidations("write")
    assert own
    assert {span.parent.span_id for span in own if span.parent} == {
        request.get_span_context().span_id
    }
    connection = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    await connection.execute("UPDATE accounts SET name = 'Oak'")
    await connection.close()
    await until(lambda: bool(invalidations("outbox")))
    found = invalidations("outbox")[-1]
    assert dict(found.attributes or {}) == {
        "respcache.cause": "outbox",
        "respcache.tenants": 1,
        "respcache.outcome": "confirmed",
    }
    assert found.parent is None


async def test_rounds_that_a_request_began_are_not_its_own(crm: Crm) -> None:
    """Servers without lifespan events connect in the first request: its span must not be that of
    all rounds to come."""
    spans, tracers = InMemorySpanExporter(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    otel.instrument(crm.cache, tracer_provider=tracers)
    assert crm.cache.runtime.relay is not None
    with tracers.get_tracer("server").start_as_current_span("GET"):
        with crm.cache.runtime.relay.tracing.invalidation(tenants=1, cause="outbox"):
            assert trace.get_current_span().get_span_context().is_valid
    (found,) = [span for span in spans.get_finished_spans() if span.name == "invalidate"]
    assert found.parent is None


async def until(fact: Callable[[], bool]) -> None:
    """Look until it is so."""
    async with asyncio.timeout(60):
        while not fact():
            await asyncio.sleep(0.05)
