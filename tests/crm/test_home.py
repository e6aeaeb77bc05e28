"""The home page: what it links to, and that it names demo users in development only."""

import base64
import hashlib
import re

import httpx2
import pytest
from starlette.applications import Starlette

from crm.demo.seed import PASSWORD
from crm.home import USERS, home_page
from crm.settings import Settings

from .conftest import Crm

pytestmark = pytest.mark.anyio


async def test_the_home_page_links_to_documentation_dashboard_and_health(crm: Crm) -> None:
    """Every link works without a login, and HEAD returns the headers of GET."""
    anonymous = crm.as_user(None)
    page = await anonymous.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    links = re.findall(r'<a href="([^"]+)"', page.text)
    assert links == ["docs", "cache/", "api/system/health"]
    for link in links:
        response = await anonymous.get(f"/{link}", follow_redirects=True)
        assert response.status_code == 200, link
    head = await anonymous.head("/")
    assert (head.status_code, head.headers) == (200, page.headers)


async def test_the_home_page_loads_nothing_and_is_not_cached(crm: Crm) -> None:
    """The policy permits the inline style alone, by its hash; no second request is a hit."""
    page = await crm.as_user(None).get("/")
    style = re.search(r"<style>(.*?)</style>", page.text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in page.headers["content-security-policy"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["cache-control"] == "no-store"
    assert "cache-status" not in (await crm.as_user(None).get("/")).headers
    assert "http" not in page.text
    assert "<script" not in page.text


@pytest.mark.parametrize("environment", ["development", "production"])
async def test_demo_users_are_named_in_development_only(environment: str) -> None:
    secret = "0123456789abcdef" * 4
    settings = Settings(environment=environment, jwt_secret=secret, respcache_key=secret)
    app = Starlette()
    app.add_route("/", home_page(settings))
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app), base_url="http://crm"
    ) as client:
        text = (await client.get("/")).text
    assert 'href="docs"' in text
    named = [user in text for user in (PASSWORD, *USERS)]
    assert named == [environment == "development"] * len(named)
