"""Every page in a browser, on a running CRM with several workers. Whatever goes wrong in a page fails its test (``Faults``)."""

import pytest
from playwright.sync_api import Page, expect

from .conftest import CHROMIUM, WORKERS, Faults, Open, Stage

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}: apt-get install chromium")

ROOT, ADMIN, MANAGER = "root@crm.example", "admin@acme.example", "manager@acme.example"
EVERYTHING = [
    "Overview", "Tenants", "Modules and routes", "Latency", "Invalidations", "Keys", "Explain a request", "Purge", "Switches",
    "Configuration", "Trail",
]  # fmt: skip
OF_A_TENANT = ["Overview", "Modules and routes", "Invalidations", "Keys", "Explain a request", "Purge", "Switches", "Trail"]
LOOKING = [name for name in OF_A_TENANT if name not in ("Purge", "Switches")]
PATHS = {"Tenants": "tenants", "Latency": "latency", "Purge": "purge", "Switches": "switches", "Configuration": "configuration"}


def main(page: Page) -> str:
    """Return what a page says."""
    return page.locator("main").inner_text()


@pytest.mark.parametrize(("mail", "pages"), [(ROOT, EVERYTHING), (ADMIN, OF_A_TENANT), (MANAGER, LOOKING)])
def test_everybody_sees_the_pages_that_are_theirs(sign_in: Open, faults: Faults, mail: str, pages: list[str]) -> None:
    """Operator of everything, operator of a tenant, viewer: each page by a click, and the others not even by their address."""
    page = sign_in(mail)
    links = page.locator("nav.nav a")
    assert links.all_inner_texts() == pages
    for name in pages:
        links.get_by_text(name, exact=True).click()
        expect(page.locator("nav.nav a[aria-current]")).to_have_text(name)
        heading = "acme" if name == "Overview" and mail != ROOT else name
        expect(page.locator("h1")).to_contain_text(heading)
        page.wait_for_load_state("networkidle" if name not in ("Overview", "Invalidations") else "load")
        assert len(main(page)) > len(heading)
    for name, path in PATHS.items():
        if name not in pages:
            faults.expected.append((403, path))
            page.goto(f"/cache/{path}")
            expect(page.locator("h1")).to_have_text("Not allowed")


def test_the_overview_is_live_and_over_all_workers(sign_in: Open, stage: Stage) -> None:
    """Its figures follow what other workers answer; charts are drawn from the stream."""
    page = sign_in(ROOT, worker=1)
    expect(page.locator("#live")).to_have_text("live")
    expect(page.locator("[data-state=workers] [data-value]")).to_have_text(str(WORKERS))
    expect(page.locator(".chart canvas")).to_have_count(5)
    expect(page.locator("svg.still")).to_have_count(0)
    before = page.locator("[data-tile=requests] [data-sub]").inner_text()
    for _ in range(20):
        stage.ask("GET", "/api/accounts", tenant="acme", worker=2)
    expect(page.locator("[data-tile=requests] [data-sub]")).not_to_have_text(before)
    page.get_by_role("link", name="60 min").click()
    expect(page.get_by_role("link", name="60 min")).to_have_attribute("aria-current", "true")
