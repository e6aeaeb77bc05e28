"""``make test-cache``: check the cache of a running system from outside, over HTTP.

Each statement is checked with real records: a write must be visible to the next read, another
tenant's records must never appear, and so on. The records that it creates are deleted. The exit
status is 1 if a statement is false.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2

from crm.cli.running import read_state
from crm.demo.seed import PASSWORD
from crm.settings import Settings
from respcache.testing.servers import EmbeddedPostgres, free_port

REPEATS = 30
START_DEADLINE_S = 60


@dataclass(frozen=True)
class CheckedModule:
    """A module's record: its name, a new one, a change of one field, and a filter of its list."""

    singular: str
    new: dict[str, str]
    change: tuple[str, str]
    filter: str


MODULES = {
    "accounts": CheckedModule(
        "account", {"name": "Checked Ltd"}, ("city", "Checkville"), "type=customer"
    ),
    "leads": CheckedModule(
        "lead",
        {"first_name": "Check", "last_name": "Lead"},
        ("company", "Checked Ltd"),
        "status=new",
    ),
    "contacts": CheckedModule(
        "contact",
        {"first_name": "Check", "last_name": "Contact"},
        ("job_title", "Checker"),
        "status=active",
    ),
    "bizdevsources": CheckedModule(
        "bizdevsource", {"source_name": "Checked list"}, ("city", "Checkville"), "priority=high"
    ),
    "opportunities": CheckedModule(
        "opportunity", {"name": "Checked deal"}, ("next_step", "Check"), "stage=proposal"
    ),
    "activities": CheckedModule(
        "activity", {"type": "note"}, ("subject", "Checked"), "status=completed"
    ),
}


class CheckReport:
    """The statements that were checked, with results, and the response times."""

    def __init__(self, *, quiet: bool) -> None:
        self.results: list[dict[str, Any]] = []
        self.timings: list[dict[str, Any]] = []
        self._quiet = quiet

    def check(self, statement: str, holds: object, seen: object = "") -> None:
        """Add a statement, whether it is true, and what was seen instead."""
        result = {"statement": statement, "holds": bool(holds)}
        found = str(seen)[:300]
        self.results.append(result if holds else {**result, "seen": found})
        if holds:
            self.print(f"  ok   {statement}")
        else:
            self.print(f"  FAIL {statement} -- {found}")

    def print(self, text: str) -> None:
        """Print a line, unless the report is JSON."""
        if not self._quiet:
            print(text, flush=True)

    @property
    def failed(self) -> int:
        """The number of false statements."""
        return sum(not result["holds"] for result in self.results)


@dataclass(frozen=True)
class Clients:
    """HTTP clients of the users of two tenants, and one without a token."""

    admin: httpx2.Client
    other_admin: httpx2.Client
    other_employee: httpx2.Client
    anonymous: httpx2.Client


def check(options: argparse.Namespace) -> int:
    """Run all checks; return the exit status."""
    with _system(options) as base:
        report = CheckReport(quiet=options.json)
        report.print(f"checking {base}, tenants {options.tenant} and {options.other_tenant}")
        run_checks(base, report, tenant=options.tenant, other=options.other_tenant)
    if options.json:
        document = {
            "checks": report.results,
            "timings": report.timings,
            "failed": report.failed,
        }
        print(json.dumps(document))
    else:
        print(f"\n{len(report.results) - report.failed} of {len(report.results)} statements hold")
    return 1 if report.failed else 0


def run_checks(base: str, report: CheckReport, *, tenant: str, other: str) -> None:
    """Check a running system."""
    with contextlib.ExitStack() as stack:
        clients = Clients(
            admin=stack.enter_context(_login(base, f"admin@{tenant}.example")),
            other_admin=stack.enter_context(_login(base, f"admin@{other}.example")),
            other_employee=stack.enter_context(_login(base, f"employee@{other}.example")),
            anonymous=stack.enter_context(httpx2.Client(base_url=base, timeout=10)),
        )
        report.print("\nRepeated requests")
        for module in MODULES:
            _check_repeats(report, clients.admin, module)
        _print_timings(report)
        report.print("\nA write, then a read")
        for module in MODULES:
            _check_writes(report, clients.admin, module)
        report.print("\nOther tenants and users")
        for module in MODULES:
            _check_isolation(report, clients, module, tenant=tenant)
        report.print("\nConversion and promotion")
        _check_conversion(report, clients.admin)
        _check_promotion(report, clients.admin)


def _check_repeats(report: CheckReport, http: httpx2.Client, module: str) -> None:
    http.post("/api/cache/invalidate", json={"modules": [module]}).raise_for_status()
    for name, path in (
        ("first page", f"/api/{module}"),
        ("filtered", f"/api/{module}?{MODULES[module].filter}"),
        ("second page", f"/api/{module}?offset=50&limit=50"),
    ):
        (cold, first), (_, second) = _timed(http, path), _timed(http, path)
        what = f"{module}, {name}"
        report.check(f"{what}: first request is a miss", "fwd=" in _status(first), _status(first))
        report.check(f"{what}: repeated request is a hit", _is_hit(second), _status(second))
        equal = first.content == second.content and first.status_code == 200
        report.check(f"{what}: both responses are equal", equal, first.text)
        warm = statistics.median(_timed(http, path)[0] for _ in range(REPEATS))
        report.timings.append(
            {"module": module, "request": name, "miss_ms": round(cold, 2), "hit_ms": round(warm, 2)}
        )
    assert module in first.json()["data"]


def _check_writes(report: CheckReport, http: httpx2.Client, module: str) -> None:
    checked, path = MODULES[module], f"/api/{module}"
    field, value = checked.change
    before = http.get(path).json()["data"]["total"]
    http.get(path)
    body = {**checked.new, "is_test_data": True, "check_run": uuid4().hex}
    created = http.post(path, json=body).json()["data"][checked.singular]
    record = f"{path}/{created['id']}"
    try:
        listed = http.get(path).json()["data"]
        shown = listed["total"] == before + 1 and listed[module][0]["id"] == created["id"]
        seen = f"total {before} -> {listed['total']}"
        report.check(f"{module}: a created record is in the next list", shown, seen)
        http.get(record)
        http.put(record, json={field: value}).raise_for_status()
        read = http.get(record).json()["data"][checked.singular]
        report.check(f"{module}: a change is in the next response", read[field] == value, read)
        first = http.get(path).json()["data"][module][0]
        report.check(f"{module}: a change is in the next list", first.get(field) == value, first)
    finally:
        deleted = http.delete(record)
    report.check(f"{module}: a write confirms its invalidation", _confirmed(deleted))
    gone = http.get(record).status_code == 404
    report.check(f"{module}: a deleted record is not found at once", gone)
    after = http.get(path).json()["data"]["total"]
    seen = f"{before} -> {after}"
    report.check(f"{module}: a deleted record is not in the next list", after == before, seen)


def _check_isolation(report: CheckReport, clients: Clients, module: str, *, tenant: str) -> None:
    path, other = f"/api/{module}", clients.other_admin
    own = {row["id"] for row in clients.admin.get(path).json()["data"][module]}
    foreign = {row["id"] for row in other.get(path).json()["data"][module]}
    report.check(
        f"{module}: another tenant gets other rows under the same URL",
        own and foreign and not own & foreign,
    )
    refused = other.get(path, params={"tenant_id": tenant})
    report.check(
        f"{module}: another tenant is refused these rows", refused.status_code == 403, refused.text
    )
    detail, unknown = other.get(f"{path}/{next(iter(own))}"), other.get(f"{path}/{uuid4()}")
    same = (detail.status_code, detail.content) == (404, unknown.content)
    report.check(f"{module}: another tenant's record looks like an unknown one", same, detail.text)
    total = other.get(path).json()["data"]["total"]
    fewer = clients.other_employee.get(path).json()["data"]["total"]
    report.check(
        f"{module}: an employee with a narrower view gets fewer rows",
        0 < fewer < total,
        f"{fewer} of {total}",
    )
    unauthenticated = clients.anonymous.get(path).status_code == 401
    report.check(f"{module}: a request without a token is refused", unauthenticated)


def _check_conversion(report: CheckReport, http: httpx2.Client) -> None:
    name = f"Converted {uuid4().hex[:8]}"
    body = {"first_name": "Conny", "last_name": name, "company": name, "is_test_data": True}
    lead = http.post("/api/leads", json=body).json()["data"]["lead"]
    about = {"type": "call", "related_to": "lead", "related_id": lead["id"], "is_test_data": True}
    call = http.post("/api/activities", json=about).json()["data"]["activity"]
    lists = (
        "/api/leads",
        "/api/contacts",
        "/api/accounts",
        "/api/opportunities",
        "/api/activities",
    )
    warm = (*lists, f"/api/leads/{lead['id']}", f"/api/contacts/search?q={name}")
    for path in warm * 2:
        http.get(path)
    report.check(
        "before a conversion, the lists of five modules, the lead and a search are hits",
        all(_is_hit(http.get(p)) for p in warm),
    )
    converted = http.post(
        f"/api/leads/{lead['id']}/convert",
        json={"create_account": True, "create_opportunity": True},
    ).json()["data"]
    try:
        fresh = [http.get(path) for path in warm]
        report.check(
            "afterwards none of them is a hit", not any(map(_is_hit, fresh)), [*map(_status, fresh)]
        )
        leads, contacts, accounts, opportunities, activities, gone, found = fresh
        report.check("the lead is not in the list", lead["id"] not in leads.text)
        report.check(
            "the contact is in the list",
            contacts.json()["data"]["contacts"][0]["id"] == converted["contact"]["id"],
        )
        report.check(
            "the account is in the list",
            accounts.json()["data"]["accounts"][0]["id"] == converted["account"]["id"],
        )
        report.check(
            "the opportunity is in the list", converted["opportunity"]["id"] in opportunities.text
        )
        moved = activities.json()["data"]["activities"][0]
        now_about = (moved["related_to"], moved["related_id"], moved["related_name"])
        report.check(
            "its activity is about the contact",
            now_about == ("contact", converted["contact"]["id"], f"Conny {name}"),
            moved,
        )
        report.check("the lead is not found", gone.status_code == 404)
        report.check("the contact is found", converted["contact"]["id"] in found.text)
        again = http.post(f"/api/leads/{lead['id']}/convert", json={})
        report.check("a second conversion is refused", again.status_code == 409, again.text)
    finally:
        http.delete(f"/api/activities/{call['id']}")
        http.delete(f"/api/opportunities/{converted['opportunity']['id']}")
        http.delete(f"/api/contacts/{converted['contact']['id']}")
        http.delete(f"/api/accounts/{converted['account']['id']}")


def _check_promotion(report: CheckReport, http: httpx2.Client) -> None:
    body = {"source_name": "Promoted", "contact_person": "Penny Promoted", "is_test_data": True}
    source = http.post("/api/bizdevsources", json=body).json()["data"]["bizdevsource"]
    warm = (
        "/api/bizdevsources",
        "/api/accounts",
        "/api/contacts",
        f"/api/bizdevsources/{source['id']}",
    )
    for path in warm * 2:
        http.get(path)
    report.check(
        "before a promotion, all four reads are hits", all(_is_hit(http.get(path)) for path in warm)
    )
    promoted = http.post(f"/api/bizdevsources/{source['id']}/promote", json={}).json()["data"]
    try:
        fresh = [http.get(path) for path in warm]
        report.check(
            "afterwards none of them is a hit",
            not any(map(_is_hit, fresh)),
            [*map(_status, fresh)],
        )
        report.check(
            "the source is promoted",
            fresh[3].json()["data"]["bizdevsource"]["status"] == "Promoted",
        )
        report.check(
            "the account is in the list",
            fresh[1].json()["data"]["accounts"][0]["id"] == promoted["account"]["id"],
        )
        report.check(
            "the contact is in the list",
            fresh[2].json()["data"]["contacts"][0]["id"] == promoted["contact"]["id"],
        )
    finally:
        http.delete(f"/api/bizdevsources/{source['id']}")
        http.delete(f"/api/contacts/{promoted['contact']['id']}")
        http.delete(f"/api/accounts/{promoted['account']['id']}")


def _print_timings(report: CheckReport) -> None:
    report.print(f"\n  {'module':<15}{'request':<14}{'miss ms':>9}{'hit ms':>9}{'faster':>9}")
    for row in report.timings:
        share = 100 * (1 - row["hit_ms"] / row["miss_ms"])
        report.print(
            f"  {row['module']:<15}{row['request']:<14}{row['miss_ms']:>9.2f}"
            f"{row['hit_ms']:>9.2f}{share:>8.0f}%"
        )


def _timed(http: httpx2.Client, path: str) -> tuple[float, httpx2.Response]:
    started = time.perf_counter()
    response = http.get(path)
    return (time.perf_counter() - started) * 1000, response


def _status(response: httpx2.Response) -> str:
    return response.headers.get("cache-status", f"no Cache-Status ({response.status_code})")


def _is_hit(response: httpx2.Response) -> bool:
    return "; hit" in _status(response)


def _confirmed(response: httpx2.Response) -> bool:
    return response.status_code == 200 and "x-cache-invalidation" not in response.headers


def _login(base: str, email: str) -> httpx2.Client:
    response = httpx2.post(
        f"{base}/api/auth/login", json={"email": email, "password": PASSWORD}, timeout=10
    )
    if response.status_code != 200:
        raise LookupError(
            f"cannot log in as {email} at {base} ({response.status_code}): the check needs the "
            f"demo data"
        )
    token = response.json()["data"]["access_token"]
    return httpx2.Client(base_url=base, headers={"authorization": f"Bearer {token}"}, timeout=10)


@contextlib.contextmanager
def _system(options: argparse.Namespace) -> Iterator[str]:
    """Yield the base URL of the system: the given one, the one on DATA_DIR, or a new one."""
    running = read_state(Settings().data_dir)
    if options.url:
        yield options.url.rstrip("/")
    elif running and _is_up(base := f"http://127.0.0.1:{running['port']}"):
        yield base
    else:
        with tempfile.TemporaryDirectory(prefix="crm-check-") as folder:
            yield from _started(Path(folder))


def _started(folder: Path) -> Iterator[str]:
    base = f"http://127.0.0.1:{(port := free_port())}"
    environment = {**os.environ, "PORT": str(port), "DATA_DIR": str(folder / "data")}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "crm", "run"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + START_DEADLINE_S
            while not _is_up(base):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise LookupError(f"the system to check did not start:\n{log.read()[-2000:]}")
                time.sleep(0.1)
            yield base
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
            _remove_cluster(folder / "data")


def _remove_cluster(data: Path) -> None:
    """Delete the files of an embedded PostgreSQL outside the data folder."""
    EmbeddedPostgres(data / "postgres", password="").find().remove()


def _is_up(base: str) -> bool:
    try:
        return httpx2.get(f"{base}/api/system/health", timeout=2).status_code == 200
    except httpx2.HTTPError:
        return False
