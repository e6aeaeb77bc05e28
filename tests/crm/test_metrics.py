"""The CRM's /metrics: closed to all but the scrape token and superadmins."""

from collections.abc import AsyncIterator

import httpx2
import pytest
from pydantic import ValidationError

from crm.app import create_app
from crm.settings import Settings
from respcache.middleware import CacheMiddleware

from .conftest import SECRET, Crm

pytestmark = pytest.mark.anyio
TOKEN = "0123456789abcdef" * 2


@pytest.fixture
async def scraped(database_url: str, valkey_url: str) -> AsyncIterator[CacheMiddleware]:
    """The application with a scrape token."""
    app = create_app(
        Settings(
            database_url=database_url,
            redis_cache_url=valkey_url,
            jwt_secret=SECRET,
            respcache_key=SECRET,
            metrics_token=TOKEN,
            metrics_tenants=1,
        )
    )
    await app.cache.connect()
    app.prepare()
    yield app
    await app.cache.close()


async def test_without_a_scrape_token_superadmins_alone_are_answered(crm: Crm) -> None:
    """The first request of a list is a miss, and counted under its route."""
    abe, root, nobody = crm.as_user("abe"), crm.as_user("root"), crm.as_user(None)
    await abe.get("/api/accounts")
    assert [
        (await client.get("/metrics")).status_code for client in (nobody, abe, crm.as_user("ann"))
    ] == [401, 403, 401]
    answer = await root.get("/metrics")
    assert answer.status_code == 200
    assert 'respcache_misses_total{module="accounts",route="/api/accounts",' in answer.text
    assert "respcache_tenant_" not in answer.text
    assert "cache-status" not in answer.headers


async def test_the_scrape_token_is_answered(scraped: CacheMiddleware) -> None:
    """And nothing that resembles it."""
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(scraped), base_url="http://crm"
    ) as client:
        answers = [
            await client.get("/metrics", headers={"authorization": f"Bearer {token}"})
            for token in (TOKEN, TOKEN.upper(), "")
        ]
    assert [answer.status_code for answer in answers] == [200, 401, 401]
    assert "respcache_serving_lease_held{" in answers[0].text


@pytest.mark.parametrize("token", ["short", "x" * 40])
def test_a_weak_scrape_token_is_refused_in_production(token: str) -> None:
    """As other secrets are."""
    with pytest.raises(ValidationError, match="METRICS_TOKEN"):
        Settings(
            environment="production", jwt_secret=TOKEN, respcache_key=TOKEN, metrics_token=token
        )


def test_a_scrape_token_is_not_demanded() -> None:
    """Without one the page is closed, which is safe."""
    assert (
        Settings(environment="production", jwt_secret=TOKEN, respcache_key=TOKEN).metrics_token
        is None
    )
