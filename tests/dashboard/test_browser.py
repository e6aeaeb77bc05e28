"""Every page in a browser, on a running CRM with several workers. Whatever goes wrong in a page
fails its test (``Faults``)."""

import re
from urllib.parse import quote
from uuid import uuid4

import pytest
from playwright.sync_api import expect

from tests import needs

from .conftest import ADMIN, MANAGER, ROOT, WORKERS, Faults, Open, Stage, main

pytestmark = needs.CHROMIUM

EVERYTHING = [
    "Overview",
    "Tenants",
    "Modules and routes",
    "Latency",
    "Invalidations",
    "Keys",
    "Explain a request",
    "Purge",
    "Switches",
    "Configuration",
    "Audit log",
]
OF_A_TENANT = [
    "Overview",
    "Modules and routes",
    "Invalidations",
    "Keys",
    "Explain a request",
    "Purge",
    "Switches",
    "Audit log",
]
LOOKING = [name for name in OF_A_TENANT if name not in ("Purge", "Switches")]
PATHS = {
    "Tenants": "tenants",
    "Latency": "latency",
    "Purge": "purge",
    "Switches": "switches",
    "Configuration": "configuration",
}


@pytest.mark.parametrize(
    ("mail", "pages"),
    [
        pytest.param(ROOT, EVERYTHING, marks=pytest.mark.long),
        (ADMIN, OF_A_TENANT),
        pytest.param(MANAGER, LOOKING, marks=pytest.mark.long),
    ],
)
def test_everybody_sees_the_pages_that_are_theirs(
    sign_in: Open, faults: Faults, mail: str, pages: list[str]
) -> None:
    """Operator of everything, operator of a tenant, viewer: each page by a click, and the others
    not even by their address."""
    page = sign_in(mail)
    links = page.locator("nav.nav a")
    assert links.all_inner_texts() == pages
    for name in pages:
        links.get_by_text(name, exact=True).click()
        expect(page.locator("nav.nav a[aria-current]")).to_have_text(name)
        heading = "acme" if name == "Overview" and mail != ROOT else name
        expect(page.locator("h1")).to_contain_text(heading)
        page.wait_for_load_state(
            "networkidle" if name not in ("Overview", "Invalidations") else "load"
        )
        assert len(main(page)) > len(heading)
    for name, path in PATHS.items():
        if name not in pages:
            faults.expected.append((403, path))
            page.goto(f"/cache/{path}")
            expect(page.locator("h1")).to_have_text("Forbidden")


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


@pytest.mark.long
def test_invalidations_appear_as_they_happen_with_their_cause_and_time(
    sign_in: Open, stage: Stage
) -> None:
    """A write through another worker; who reaches one tenant is not even told that another one
    wrote."""
    page, own = sign_in(ROOT), sign_in(ADMIN, worker=1)
    for one in (page, own):
        one.goto("/cache/feed")
        expect(one.locator("#live")).to_have_text("live")
    for tenant in ("globex", "acme"):
        made = stage.ask(
            "POST", "/api/accounts", tenant=tenant, worker=2, json={"name": f"Written by {tenant}"}
        )
        assert made.status_code == 201
    for one in (page, own):
        newest = one.locator("#feed tr.new").first
        expect(newest).to_contain_text("acme")
        expect(newest.locator("[data-label=Cause]")).to_have_text("POST /api/accounts")
        expect(newest.locator("[data-label=Duration]")).to_have_text(
            re.compile(r"^[\d.]+ (µs|ms|s)$")
        )
        expect(newest.locator("[data-label=Outcome]")).to_have_text("confirmed")
        expect(newest.locator("[data-label=Modules]")).to_contain_text("accounts")
    expect(page.locator("#feed tr.new", has_text="globex")).to_have_count(1)
    assert "globex" not in main(own)


@pytest.mark.long
def test_a_tenants_admin_learns_nothing_of_another_tenant(
    sign_in: Open, stage: Stage, faults: Faults
) -> None:
    """By no address: what exists is answered like what does not, letter for letter."""
    globex, nobody = stage.tenant("globex"), str(uuid4())
    key = stage.key("/api/leads", tenant="globex")
    page = sign_in(ADMIN)
    for address in (
        "tenants/{}",
        "keys?tenant={}",
        "modules?tenant={}",
        "feed?tenant={}",
        "purge?tenant={}",
        "key?key={key}",
        "purge?key={key}",
    ):
        faults.expected.append((404, f"/cache/{address.partition('?')[0].partition('{')[0]}"))
        said = []
        for tenant in (globex, nobody):
            answer = page.goto("/cache/" + address.format(tenant, key=key.replace(globex, tenant)))
            assert answer is not None
            assert answer.status == 404, address
            said.append(page.locator("body").inner_text().replace(tenant, "it"))
        assert said[0] == said[1], address
        assert "globex" not in said[0].lower(), address
    for stream in ("live", "live/feed"):
        answers = [
            page.request.get(f"/cache/{stream}?tenant={tenant}") for tenant in (globex, nobody)
        ]
        assert [answer.status for answer in answers] == [404, 404], stream
        assert answers[0].text().replace(globex, "it") == answers[1].text().replace(nobody, "it"), (
            stream
        )


@pytest.mark.long
@pytest.mark.parametrize("place", ["", "keys"])
def test_a_page_of_an_ended_session_leads_to_sign_in(
    sign_in: Open, stage: Stage, faults: Faults, place: str
) -> None:
    """An open page with live figures by itself, any other with the next click; no figure is shown
    afterwards."""
    page = sign_in(MANAGER)
    page.goto(f"/cache/{place}")
    faults.expected.append((401, "/cache/"))
    stage.psql("UPDATE employees SET status = 'inactive' WHERE email = $1", MANAGER)
    try:
        if place:
            page.get_by_role("link", name="Modules and routes").click()
        page.wait_for_url("**/cache/sign-in**")
        expect(page.get_by_role("button", name="Sign in")).to_be_visible()
        assert "accounts" not in page.content()
        for address in ("keys", "feed", "modules", "audit-log"):
            page.goto(f"/cache/{address}")
            assert page.url.endswith(f"/cache/sign-in?next=%2Fcache%2F{address}")
    finally:
        stage.psql("UPDATE employees SET status = 'active' WHERE email = $1", MANAGER)


PLANTED = "<script>planted = 1</script><i class=planted>"


def plant(stage: Stage) -> str:
    """Make a tenant and somebody in it whose names are markup, have them ask and purge; return the
    tenant's id."""
    tenant, mail = str(uuid4()), "<i class=planted>@x.example"
    stage.psql(
        "INSERT INTO tenants (id, slug, name) VALUES ($1::text::uuid, $2, $2)", tenant, PLANTED
    )
    stage.psql(
        "INSERT INTO employees (id, tenant_id, email, name, role) VALUES (gen_random_uuid(), "
        "$1::text::uuid, $2, $2, 'admin')",
        tenant,
        mail,
    )
    assert (
        stage.ask("GET", "/api/accounts/search", tenant=tenant, params={"q": PLANTED}).status_code
        == 200
    )
    purged = stage.ask(
        "POST", "/cache/api/purge", tenant=tenant, json={"module": "leads", "dry_run": False}
    )
    assert purged.status_code == 200
    return tenant


@pytest.mark.long
def test_what_others_wrote_is_shown_as_text(sign_in: Open, stage: Stage, faults: Faults) -> None:
    """Names of tenants and people, queries, whatever stands in an address: never as markup."""
    tenant = plant(stage)
    page = sign_in(ROOT)
    mail, query = "<i class=planted>@x.example", quote(PLANTED)
    key = stage.key(f"/api/accounts/search?q={query}", tenant=tenant)
    faults.expected.append((404, "/cache/"))
    for address, shown in (
        ("tenants", PLANTED),
        (f"tenants/{tenant}", PLANTED),
        (f"keys?tenant={tenant}", PLANTED),
        (f"key?key={key}", PLANTED),
        (f"purge?tenant={tenant}", PLANTED),
        ("audit-log", mail),
        ("feed", f"purge by {mail}"),
        (f"tenants?q={query}none", f"{PLANTED}none"),
        ("tenants/<i class=planted>", "no tenant '<i class=planted>'"),
        (f"key?key={query}", PLANTED),
        ("feed?tenant=<i class=planted>", "no tenant '<i class=planted>'"),
    ):
        page.goto(f"/cache/{address}")
        expect(page.locator("main")).to_contain_text(shown)
        expect(page.locator("i.planted")).to_have_count(0)
        assert page.evaluate("typeof planted") == "undefined", address


@pytest.mark.long
@pytest.mark.parametrize("mail", [ROOT, MANAGER])
def test_every_page_can_be_read_without_scripts(sign_in: Open, mail: str) -> None:
    """With pictures instead of live charts, and nothing that waits for a script."""
    page = sign_in(mail, java_script_enabled=False)
    links = page.locator("nav.nav a")
    for name in links.all_inner_texts():
        links.get_by_text(name, exact=True).click()
        expect(page.locator("nav.nav a[aria-current]")).to_have_text(name)
        expect(page.locator("main #live:visible, main .scripted:visible")).to_have_count(0)
        assert page.locator("main form, main table, main .tile").count() > 0, name
    if mail == ROOT:
        page.goto("/cache/")
        expect(page.locator("svg.still")).to_have_count(5)
        assert page.locator("svg.still path[d]").first.get_attribute("d")
        expect(page.locator("[data-state=workers] [data-value]")).to_have_text(str(WORKERS))


def everywhere(stage: Stage) -> list[str]:
    """Return the addresses of all pages with something on them."""
    acme, key = (
        stage.tenant("acme"),
        stage.key("/api/accounts?limit=7&sort=-annual_revenue", tenant="acme"),
    )
    return [
        "",
        "tenants",
        f"tenants/{acme}",
        "modules",
        "latency",
        "feed",
        "keys",
        f"key?key={key}",
        "explain",
        "purge?tenant=acme&module=leads",
        f"purge?key={key}",
        "switches",
        "configuration",
        "audit-log",
        "nothing",
    ]


@pytest.mark.long
def test_no_page_scrolls_sideways_on_a_phone(sign_in: Open, stage: Stage, faults: Faults) -> None:
    """Of 360 pixels; the menu opens there."""
    faults.expected.append((404, "/cache/nothing"))
    page = sign_in(ROOT, viewport={"width": 360, "height": 740}, has_touch=True)
    for address in everywhere(stage):
        page.goto(f"/cache/{address}")
        if address == "":
            expect(page.locator(".chart canvas")).to_have_count(5)
        if address == "explain":
            page.get_by_label("Path and query").fill("/api/accounts?limit=7&sort=-annual_revenue")
            page.get_by_label("Headers").fill(f"Authorization: Bearer {stage.token('acme')}")
            page.get_by_role("button", name="Explain").click()
            expect(page.locator("main .notice strong")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 360, address
    page.goto("/cache/keys")
    expect(page.locator("nav.nav")).to_be_hidden()
    page.locator(".menu-button").tap()
    page.get_by_role("link", name="Audit log").tap()
    expect(page.locator("h1")).to_have_text("Audit log")


LOOK = """() => {
    const one = document.activeElement, box = one.getBoundingClientRect();
    const again = (window.reached ||= new Set()).has(one);
    reached.add(one);
    const shown = getComputedStyle(one.matches(".menu-toggle") ? one.nextElementSibling : one);
    return { again, end: one === document.body, is: one.outerHTML.slice(0, 120),
        seen: shown.outlineStyle !== "none" && parseFloat(shown.outlineWidth) >= 1
            && box.bottom > 0 && box.top < innerHeight };
}"""
MISSED = """() => [...document.querySelectorAll(
        "a[href], button, input:not([type=hidden]), select, textarea, [tabindex='0']")]
    .filter((one) => !one.disabled && one.getClientRects().length && !reached.has(one))
    .map((one) => one.outerHTML)"""


@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 360])
def test_the_tab_key_reaches_everything_and_shows_where_it_is(
    sign_in: Open, stage: Stage, faults: Faults, width: int
) -> None:
    """Links, buttons and fields of every page, none of them hidden; the first leads past the
    navigation."""
    faults.expected.append((404, "/cache/nothing"))
    page = sign_in(ROOT, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    for address in everywhere(stage):
        page.goto(f"/cache/{address}")
        page.keyboard.press("Tab")
        if address != "nothing":
            expect(page.locator(":focus")).to_have_text("Skip to the content")
        while not (found := page.evaluate(LOOK))["end"] and not found["again"]:
            assert found["seen"], (address, found["is"])
            page.keyboard.press("Tab")
        assert page.evaluate(MISSED) == [], address


def test_everything_can_be_done_by_keys(sign_in: Open, stage: Stage) -> None:
    """Skip, go, search, open a row, list the keys, change the colours, and a form by Enter."""
    page = sign_in(ROOT)
    press = page.keyboard.press
    press("Tab")
    press("Enter")
    expect(page.locator("#main")).to_be_focused()
    press("g")
    press("t")
    page.wait_for_url("**/cache/tenants")
    press("/")
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.type("acme")
    expect(page.locator("#polled tbody tr")).to_have_count(1)
    press("Escape")
    press("j")
    press("Enter")
    expect(page.locator("h1")).to_contain_text("acme")
    press("?")
    expect(page.locator("#help")).to_be_visible()
    press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    before = page.evaluate("document.documentElement.dataset.theme")
    press("d")
    expect(page.locator("html")).not_to_have_attribute("data-theme", before)
    press("g")
    press("k")
    page.wait_for_url("**/cache/keys")
    press("/")
    page.keyboard.type("acme")
    press("Enter")
    page.wait_for_url("**/cache/keys?tenant=acme**")
