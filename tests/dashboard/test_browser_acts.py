"""Forms in a browser, on a running CRM with several workers: what they do, what they refuse, and
what is written down.

``scripts``: with JavaScript and without; everything can be done either way.
"""

import re

import pytest
from playwright.sync_api import Page, expect

from tests import needs

from .conftest import ADMIN, MANAGER, ROOT, WORKERS, Faults, Open, Stage, main, until

pytestmark = [needs.CHROMIUM, pytest.mark.long]
with_and_without_scripts = pytest.mark.parametrize(
    "scripts", [True, False], ids=["scripts", "no-scripts"]
)


def acts(stage: Stage) -> list[tuple[str, str]]:
    """Return who did what, the latest first."""
    return [(act["name"], act["action"]) for act in stage.know("audit-log")]


def comes(stage: Stage, what: str, path: str, *, tenant: str, worker: int = 0) -> bool:
    """Whether a worker comes to say something of the cache."""
    return until(lambda: what in stage.status(path, tenant=tenant, worker=worker))


def said(page: Page) -> str:
    """Return what a page answers to an act."""
    return page.locator("main .notice").first.inner_text()


@with_and_without_scripts
@pytest.mark.parametrize(("mail", "tenant"), [(ROOT, "globex"), (ADMIN, "acme")])
def test_a_purge_is_counted_confirmed_and_written_down(
    sign_in: Open, stage: Stage, faults: Faults, mail: str, tenant: str, *, scripts: bool
) -> None:
    """All workers had a hit before and have none after; a wrong confirmation purges nothing and
    keeps what was typed."""
    faults.expected.append((400, "/cache/purge"))
    path, before = "/api/tasks?limit=3", acts(stage)
    for worker in range(WORKERS):
        assert comes(stage, "; hit", path, tenant=tenant, worker=worker)
    page = sign_in(mail, java_script_enabled=scripts)
    page.locator("nav.nav").get_by_role("link", name="Purge").click()
    if mail == ROOT:
        page.get_by_label("Tenant").fill(tenant)
    page.get_by_label("Module").select_option("tasks")
    page.get_by_role("button", name="Count").click()
    expect(page.locator("main")).to_contain_text(
        re.compile(rf"[1-9]\d* stored responses?\s+of {tenant}, module tasks")
    )
    field, button = (
        page.get_by_label(f"Type {tenant} to purge"),
        page.get_by_role("button", name="Purge", exact=True),
    )
    field.fill("everything")
    if scripts:
        expect(button).to_be_disabled()
    else:
        button.click()
        assert "Nothing was purged" in said(page)
        expect(field).to_have_value("everything")
        expect(page.get_by_label("Module")).to_have_value("tasks")
    assert acts(stage) == before
    assert "; hit" in stage.status(path, tenant=tenant)
    field.fill(tenant)
    button.click()
    expect(page.locator("main .notice")).to_contain_text("Purged")
    assert acts(stage) == [(mail, "purge"), *before]
    assert "fwd=stale" in stage.status(path, tenant=tenant, worker=2)


def test_a_key_is_purged_from_its_page(sign_in: Open, stage: Stage) -> None:
    """By the end of it; that one only."""
    key = stage.key("/api/contacts?limit=4", tenant="acme")
    stage.key("/api/contacts?limit=5", tenant="acme")
    page = sign_in(ADMIN)
    page.goto(f"/cache/key?key={key}")
    page.get_by_role("link", name="Purge this key").click()
    expect(page.locator("main")).to_contain_text("1 stored response of acme")
    page.get_by_label(f"Type {key[-8:]} to purge").fill(key[-8:])
    page.get_by_role("button", name="Purge", exact=True).click()
    expect(page.locator("main .notice")).to_contain_text("Purged")
    assert "fwd=uri-miss" in stage.status("/api/contacts?limit=4", tenant="acme")
    assert "; hit" in stage.status("/api/contacts?limit=5", tenant="acme")


@with_and_without_scripts
def test_a_tenant_is_switched_off_and_on_by_its_admin_and_all_workers_follow(
    sign_in: Open, stage: Stage, *, scripts: bool
) -> None:
    """Others are served as before."""
    before = acts(stage)
    page = sign_in(ADMIN, worker=1, java_script_enabled=scripts)
    page.get_by_role("link", name="Switches").click()
    page.get_by_role("button", name="Switch off").click()
    assert "Switched off" in said(page)
    for worker in range(WORKERS):
        assert comes(stage, "fwd=bypass", "/api/accounts", tenant="acme", worker=worker)
    assert comes(stage, "; hit", "/api/accounts", tenant="globex")
    page.get_by_role("button", name="Switch on").click()
    assert "Switched on" in said(page)
    for worker in range(WORKERS):
        assert comes(stage, "; hit", "/api/accounts", tenant="acme", worker=worker)
    assert acts(stage) == [(ADMIN, "switch"), (ADMIN, "switch"), *before]


@with_and_without_scripts
def test_a_module_is_switched_off_and_on_for_all_tenants(
    sign_in: Open, stage: Stage, *, scripts: bool
) -> None:
    """The other modules are served as before, and the tenant's admin reads who switched it off."""
    page = sign_in(ROOT, java_script_enabled=scripts)
    page.get_by_role("link", name="Switches").click()
    leads = page.locator("tr", has=page.get_by_role("cell", name="leads", exact=True))
    leads.get_by_role("button", name="Switch off").click()
    assert "Switched off" in said(page)
    assert comes(stage, "fwd=bypass", "/api/leads", tenant="acme", worker=2)
    assert comes(stage, "; hit", "/api/accounts", tenant="acme", worker=2)
    other = sign_in(ADMIN, java_script_enabled=scripts)
    other.goto("/cache/switches")
    expect(other.locator("main")).to_contain_text("Switched off by an operator")
    leads.get_by_role("button", name="Switch on").click()
    assert comes(stage, "; hit", "/api/leads", tenant="acme", worker=2)


def test_everything_is_switched_off_by_typing_it(
    sign_in: Open, stage: Stage, faults: Faults
) -> None:
    """And by nothing less; what was typed is kept."""
    faults.expected.append((400, "/cache/switches"))
    page = sign_in(ROOT, java_script_enabled=False)
    page.goto("/cache/switches")
    everything = page.locator("section", has=page.get_by_role("heading", name="Everything"))
    field = everything.get_by_label("Type off")
    field.fill("of")
    everything.get_by_role("button", name="Switch off").click()
    assert "Nothing was switched" in said(page)
    expect(field).to_have_value("of")
    assert stage.know("switches")["everything"] is False
    field.fill("off")
    everything.get_by_role("button", name="Switch off").click()
    assert until(lambda: "; hit" not in stage.status("/api/leads", tenant="globex", worker=1))
    everything.get_by_role("button", name="Switch on").click()
    assert comes(stage, "; hit", "/api/leads", tenant="globex", worker=1)


@with_and_without_scripts
def test_a_body_is_hidden_until_somebody_reveals_it_and_that_is_written_down(
    sign_in: Open, stage: Stage, *, scripts: bool
) -> None:
    """Who may only look has no button for it."""
    account = stage.ask(
        "POST", "/api/accounts", tenant="acme", json={"name": "Hidden Acorns"}
    ).json()["data"]["account"]["id"]
    key, before = stage.key(f"/api/accounts/{account}", tenant="acme"), acts(stage)
    viewer = sign_in(MANAGER, java_script_enabled=scripts)
    viewer.goto(f"/cache/key?key={key}")
    expect(viewer.locator("main")).to_contain_text("Hidden. Operators can reveal it")
    assert "Hidden Acorns" not in viewer.content()
    expect(viewer.get_by_role("button", name="Reveal")).to_have_count(0)
    page = sign_in(ADMIN, java_script_enabled=scripts)
    page.goto(f"/cache/key?key={key}")
    assert "Hidden Acorns" not in page.content()
    assert acts(stage) == before
    page.get_by_role("button", name="Reveal").click()
    expect(page.locator("#revealed")).to_contain_text("Hidden Acorns")
    assert acts(stage) == [(ADMIN, "reveal"), *before]
    assert stage.know("audit-log")[0]["details"] == {"key": key}
    page.get_by_role("link", name="Audit log").click()
    row = page.locator("tbody tr").first
    expect(row).to_contain_text(ADMIN)
    expect(row).to_contain_text("reveal")
    assert "Hidden Acorns" not in main(page)


@with_and_without_scripts
def test_a_request_is_explained(sign_in: Open, stage: Stage, *, scripts: bool) -> None:
    """Hit, miss and bypass, each with the reason; credentials stand in no address and are not sent
    back."""
    page, token = sign_in(ADMIN, java_script_enabled=scripts), stage.token("acme")
    page.get_by_role("link", name="Explain").click()
    path = f"/api/activities?limit={5 if scripts else 6}"

    def explain(method: str = "GET", headers: str = f"Authorization: Bearer {token}") -> str:
        page.get_by_label("Method").select_option(method)
        page.get_by_label("Path and query").fill(path)
        page.get_by_label("Headers").fill(headers)
        page.get_by_role("button", name="Explain").click()
        assert page.url.endswith("/cache/explain")
        assert token not in page.content()
        return said(page)

    assert explain().startswith("Miss")
    assert "; hit" not in stage.status(path, tenant="acme")
    assert explain().startswith("Hit")
    assert "/api/activities" in main(page)
    assert "limit" in main(page)
    assert explain("POST").startswith("Bypass")
    assert explain(headers="").startswith("Bypass")
    assert stage.status(path, tenant="acme").count("; hit") == 1


def test_a_line_that_is_no_header_is_named_and_kept(sign_in: Open, faults: Faults) -> None:
    """Nothing else that was typed is lost either."""
    faults.expected.append((400, "/cache/explain"))
    page = sign_in(MANAGER)
    page.goto("/cache/explain")
    page.get_by_label("Path and query").fill("/api/leads")
    page.get_by_label("Headers").fill("Accept: text/html\nBearer x")
    page.get_by_role("button", name="Explain").click()
    expect(page.locator("main .notice")).to_contain_text("line 2")
    expect(page.get_by_label("Path and query")).to_have_value("/api/leads")
    expect(page.get_by_label("Headers")).to_have_value("Accept: text/html\nBearer x")


@with_and_without_scripts
def test_signing_out_ends_the_session_and_signing_in_leads_back(
    sign_in: Open, *, scripts: bool
) -> None:
    """To the page that was asked for."""
    page = sign_in(ADMIN, java_script_enabled=scripts)
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/cache/sign-in")
    assert [
        cookie["name"] for cookie in page.context.cookies() if "session" in cookie["name"]
    ] == []
    page.goto("/cache/keys?module=leads")
    assert "acme" not in page.content()
    page.get_by_label("Name").fill(ADMIN)
    page.get_by_label("Password").fill("demo-password")
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/cache/keys?module=leads")


@with_and_without_scripts
def test_colours_are_chosen_and_remembered(sign_in: Open, *, scripts: bool) -> None:
    """As the system is, light, dark."""
    page = sign_in(MANAGER, java_script_enabled=scripts, color_scheme="light")
    page.goto("/cache/keys")
    for theme in ("light", "dark"):
        with page.expect_response("**/cache/theme"):
            page.get_by_role("button", name="Change theme").click()
        expect(page.locator("html")).to_have_attribute("data-theme", theme)
    page.goto("/cache/audit-log")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
