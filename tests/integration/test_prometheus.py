"""Metrics for Prometheus: what is written, who may scrape, and several processes through a real
Valkey."""

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests import needs

from respcache import Cache, MemoryStore, RedisStore, SingleTenant
from respcache.core.errors import ConfigurationError
from respcache.integrations.prometheus import PORTION, Collector, Endpoint
from respcache.ops.access import Access, Role
from respcache.ops.stats.publisher import StatsPublisher
from respcache.testing.servers import EmbeddedValkey

pytestmark = pytest.mark.anyio
TOKEN = "scrape-token-of-these-tests"


def make_cache(publisher: StatsPublisher | None = None) -> Cache:
    return Cache(
        MemoryStore(), secret=b"k" * 32, resolver=SingleTenant("public"), publisher=publisher
    )


async def scrape(
    endpoint: Endpoint, token: str | None = TOKEN, method: str = "GET"
) -> tuple[int, dict[bytes, bytes], str]:
    """Ask the endpoint; return status, headers and body."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
    await endpoint(
        {"type": "http", "method": method, "path": "/metrics", "headers": headers}, None, send
    )
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"].decode()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Read an exposition: by name and the values of its labels besides ``worker``, in the order of
    the labels' names."""
    return {
        (
            sample.name,
            *(value for label, value in sorted(sample.labels.items()) if label != "worker"),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# -- what is written -------------------------------------------------------------------------------


def fill(cache: Cache) -> None:
    counters = cache.counters.at("acme", "leads", '/leads/{id}\\"\n')
    counters.hits, counters.misses, counters.bytes_served = 7, 3, 9000
    counters.times.misses.observe(0.0004)
    counters.times.misses.observe(0.0005)
    counters.times.misses.observe(60)
    counters.store(size_bytes=100, seconds=0.25)
    counters.bypass("store")
    cache.counters.at("acme", "leads").invalidations += 2
    cache.counters.errors += 5


async def test_a_scrape_reports_what_was_counted() -> None:
    """With labels escaped, histograms cumulative, and one worker whose board has no server."""
    publisher = StatsPublisher(None)
    cache = make_cache(publisher)
    fill(cache)
    status, headers, body = await scrape(Endpoint(publisher, token=TOKEN))
    assert (status, headers[b"content-type"]) == (200, b"text/plain; version=0.0.4; charset=utf-8")
    assert (headers[b"cache-control"], int(headers[b"content-length"])) == (b"no-store", len(body))
    found, route = samples(body), '/leads/{id}\\"\n'
    assert found["respcache_hits_total", "leads", route] == 7
    assert found["respcache_bypasses_total", "leads", "store", route] == 1
    assert found["respcache_served_bytes_total", "leads", route] == 9000
    assert found["respcache_fill_seconds_total", "leads", route] == 0.25
    assert found["respcache_invalidations_total", "leads"] == 2
    buckets = [
        value
        for (name, *_), value in found.items()
        if name == "respcache_miss_duration_seconds_bucket"
    ]
    assert buckets == sorted(buckets)
    assert found["respcache_miss_duration_seconds_bucket", "0.0005", "leads", route] == 2
    assert found["respcache_miss_duration_seconds_bucket", "10.0", "leads", route] == 2
    assert found["respcache_miss_duration_seconds_bucket", "+Inf", "leads", route] == 3
    assert found["respcache_miss_duration_seconds_count", "leads", route] == 3
    assert found["respcache_miss_duration_seconds_sum", "leads", route] == pytest.approx(60.0009)
    assert found[("respcache_errors_total",)] == 5
    assert found[("respcache_workers",)] == 1
    assert found[("respcache_fleet_complete",)] == 0
    assert not [
        name for name, *_ in found if name.startswith(("respcache_tenant", "respcache_server"))
    ]


async def test_tenants_are_reported_where_they_are_asked_for() -> None:
    """The largest by each figure, and the rest."""
    publisher = StatsPublisher(None)
    cache = make_cache(publisher)
    for number in range(5):
        cache.counters.at(f"t{number}", "leads", "/leads").hits += number
        cache.counters.at(f"t{number}", "leads", "/leads").misses += 5 - number
    cache.counters.at(None, "leads", "/leads").bypass("denied")
    found = samples((await scrape(Endpoint(publisher, token=TOKEN, tenants=2)))[2])
    hits = {
        key[1]: value for key, value in found.items() if key[0] == "respcache_tenant_hits_total"
    }
    misses = {
        key[1]: value for key, value in found.items() if key[0] == "respcache_tenant_misses_total"
    }
    assert (hits, misses) == ({"t4": 4, "t3": 3, "other": 3}, {"t0": 5, "t1": 4, "other": 6})
    assert found["respcache_tenant_bypasses_total", "other"] == 1


async def test_a_metric_of_many_portions_has_one_head() -> None:
    """The exposition allows HELP and TYPE once, before all samples of the metric."""
    publisher = StatsPublisher(None)
    cache = make_cache(publisher)
    count = 2 * PORTION + 1
    for number in range(count):
        cache.counters.at("acme", "leads", f"/leads/{number}").hits += 1
    body = (await scrape(Endpoint(publisher, token=TOKEN)))[2]
    assert body.count("# TYPE respcache_hits_total counter\n") == 1
    assert body.count("# HELP respcache_hits_total ") == 1
    assert sum(line.startswith("respcache_hits_total{") for line in body.splitlines()) == count
    assert (
        sum(value for (name, *_), value in samples(body).items() if name == "respcache_hits_total")
        == count
    )


def test_a_registry_collects_this_process() -> None:
    """Beside the application's own metrics; names that are taken are refused when it is
    registered."""
    cache = make_cache()
    fill(cache)
    registry = CollectorRegistry()
    registry.register(Collector(cache))
    found = samples(generate_latest(registry).decode())
    assert found["respcache_hits_total", "leads", '/leads/{id}\\"\n'] == 7
    with pytest.raises(ValueError, match="respcache_hits"):
        registry.register(Collector(cache))


# -- who may scrape --------------------------------------------------------------------------------


def auth(**known: Access) -> Callable[[str], Awaitable[Access | None]]:
    async def access(token: str) -> Access | None:
        if token == "broken":
            raise OSError("the database is away")
        return known.get(token)

    return access


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [
        (TOKEN, 200, "respcache_workers 1"),
        ("root", 200, "respcache_workers 1"),
        ("viewer", 200, "respcache_workers 1"),
        ("admin-of-acme", 403, "concerns all tenants"),
        ("unknown", 401, "unknown or has expired"),
        (TOKEN[:-1], 401, "unknown or has expired"),
        (TOKEN + "x", 401, "unknown or has expired"),
        (None, 401, "send 'Authorization: Bearer TOKEN'"),
        ("", 401, "send 'Authorization: Bearer TOKEN'"),
        ("broken", 503, "cannot be checked"),
    ],
)
async def test_only_the_scrape_token_and_those_who_reach_all_tenants_are_answered(
    token: str | None, status: int, said: str
) -> None:
    """What is refused says why, and shows nothing."""
    publisher = StatsPublisher(None)
    fill(make_cache(publisher))
    people = {
        "root": Access(name="root", role=Role.OPERATOR),
        "viewer": Access(name="viewer", role=Role.VIEWER),
        "admin-of-acme": Access(name="abe", role=Role.OPERATOR, tenant="acme"),
    }
    got, headers, body = await scrape(Endpoint(publisher, token=TOKEN, auth=auth(**people)), token)
    assert (got, said in body) == (status, True)
    assert (b"www-authenticate" in headers) == (status == 401)
    assert ("respcache_hits_total" in body) == (status == 200)


async def test_without_a_token_of_its_own_nobody_but_people_are_answered() -> None:
    """And without people either, nobody at all."""
    publisher = StatsPublisher(None)
    make_cache(publisher)
    people = auth(root=Access(name="root", role=Role.OPERATOR))
    assert (await scrape(Endpoint(publisher, auth=people), "root"))[0] == 200
    assert (await scrape(Endpoint(publisher, auth=people), ""))[0] == 401
    assert [(await scrape(Endpoint(publisher), token))[0] for token in (TOKEN, "", None)] == [
        403,
        403,
        403,
    ]


async def test_other_methods_are_refused() -> None:
    """HEAD is GET without the body."""
    publisher = StatsPublisher(None)
    make_cache(publisher)
    endpoint = Endpoint(publisher, token=TOKEN)
    status, headers, body = await scrape(endpoint, method="HEAD")
    assert (status, body, int(headers[b"content-length"]) > 0) == (200, "", True)
    status, headers, _ = await scrape(endpoint, method="POST")
    assert (status, headers[b"allow"]) == (405, b"GET, HEAD")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"token": "short"}, "16"), ({"token": "é" * 40}, "ASCII"), ({"tenants": -1}, "-1")],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    """The message names the fix, and never the token."""
    with pytest.raises(ConfigurationError, match=said) as error:
        Endpoint(StatsPublisher(None), **options)
    assert options.get("token", "~") not in str(error.value)
    assert TOKEN not in repr(Endpoint(StatsPublisher(None), token=TOKEN))


# -- several processes -----------------------------------------------------------------------------


@asynccontextmanager
async def process(url: str) -> AsyncIterator[tuple[Cache, StatsPublisher]]:
    """Run a cache whose board publishes only when it is told to."""
    publisher = StatsPublisher(url)
    cache = Cache(
        RedisStore(url, deadline_s=5.0),
        secret=b"k" * 32,
        resolver=SingleTenant("public"),
        publisher=publisher,
    )
    assert cache.store is not None
    await cache.store.connect()
    try:
        yield cache, publisher
    finally:
        await publisher.close()
        await cache.store.close()


async def page_of(publisher: StatsPublisher, tenants: int = 0) -> str:
    status, _, body = await scrape(Endpoint(publisher, token=TOKEN, tenants=tenants))
    assert status == 200
    return body


async def test_any_process_reports_all_of_them(valkey_url: str) -> None:
    """Each under a label of its own, with what the server says of itself, and tenants by
    process."""
    async with process(valkey_url) as (one, publisher), process(valkey_url) as (two, other):
        fill(one)
        two.counters.at("globex", "tasks", "/tasks").hits += 5
        assert await publisher.publish()
        assert await other.publish()
        first, second = await page_of(publisher, 1), await page_of(other, 1)
    for body in (first, second):
        found = samples(body)
        assert found[("respcache_workers",)] == 2
        assert found[("respcache_fleet_complete",)] == 1
        assert found["respcache_hits_total", "tasks", "/tasks"] == 5
        assert found["respcache_bypasses_total", "leads", "store", '/leads/{id}\\"\n'] == 1
        assert found["respcache_tenant_hits_total", "globex"] == 5
        assert found["respcache_tenant_misses_total", "acme"] == 3
        assert found[("respcache_server_memory_bytes",)] > 0
        assert body.count("respcache_worker_info{") == 2
    workers = [
        set(re.findall(r'respcache_store_up{worker="(.+)"}', body)) for body in (first, second)
    ]
    assert len(workers[0]) == 2
    assert workers[0] == workers[1]  # a process is called the same, whoever reports it


async def test_while_the_server_is_away_a_process_reports_itself(
    make_valkey: Callable[..., EmbeddedValkey],
) -> None:
    """And that these are not all; with tenants too."""
    server = make_valkey()
    async with process(server.url) as (one, publisher), process(server.url) as (_, other):
        fill(one)
        assert await publisher.publish()
        assert await other.publish()
        assert samples(await page_of(publisher))[("respcache_fleet_complete",)] == 1
        server.stop()
        found = samples(await page_of(publisher, 1))
        assert found[("respcache_fleet_complete",)] == 0
        assert found[("respcache_workers",)] == 1
        assert found["respcache_tenant_misses_total", "acme"] == 3
        assert ("respcache_server_memory_bytes",) not in found


async def test_a_server_that_says_nothing_of_itself_is_left_out(
    make_valkey: Callable[..., EmbeddedValkey],
) -> None:
    """An account without the permission for INFO: the processes' figures are there all the same."""
    server = make_valkey()
    with redis.Redis.from_url(server.url) as client:
        client.acl_setuser(
            "metrics",
            enabled=True,
            passwords=["+pass"],
            commands=["+@all", "-info"],
            keys=["*"],
            channels=["*"],
        )
    async with process(server.url) as (one, publishing):
        fill(one)
        assert await publishing.publish()
        publisher = StatsPublisher(
            f"redis://metrics:pass@{server.url.rpartition('@')[2].removeprefix('redis://')}"
        )
        try:
            found = samples(await page_of(publisher))
        finally:
            await publisher.close()
    assert found["respcache_hits_total", "leads", '/leads/{id}\\"\n'] == 7
    assert ("respcache_server_memory_bytes",) not in found


@needs.PROMTOOL
async def test_promtool_finds_nothing_to_complain_of(valkey_url: str) -> None:
    """Names, units, help and syntax, as Prometheus itself would have them."""
    async with process(valkey_url) as (one, publisher):
        fill(one)
        body = await page_of(publisher, 3)
    command = ["promtool", "check", "metrics"]
    done = await asyncio.to_thread(
        subprocess.run, command, input=body, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
