"""``make test-cache``: does the cache of a running system keep its promises, and what does it
bring?

Every statement is checked from outside, over HTTP, with the rows themselves: what was written must
be read at once, what is another tenant's must not appear. It cleans up the rows that it makes. The
exit status is 1 when anything does not hold.
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
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2

from crm.demo.seed import PASSWORD
from crm.settings import Settings
from respcache.testing.servers import free_port

REPEATS = 30
START_DEADLINE_S = 60
MODULES = {
    "accounts": (
        "accounts",
        "account",
        {"name": "Checked Ltd"},
        {"city": "Checkville"},
        "type=customer",
    ),
    "leads": (
        "leads",
        "lead",
        {"first_name": "Check", "last_name": "Lead"},
        {"company": "Checked Ltd"},
        "status=new",
    ),
    "contacts": (
        "contacts",
        "contact",
        {"first_name": "Check", "last_name": "Contact"},
        {"job_title": "Checker"},
        "status=active",
    ),
    "bizdevsources": (
        "bizdevsources",
        "bizdevsource",
        {"source_name": "Checked list"},
        {"city": "Checkville"},
        "priority=high",
    ),
    "opportunities": (
        "opportunities",
        "opportunity",
        {"name": "Checked deal"},
        {"next_step": "Check"},
        "stage=proposal",
    ),
    "activities": (
        "activities",
        "activity",
        {"type": "note"},
        {"subject": "Checked"},
        "status=completed",
    ),
}
"""Module: name of its list, name of its record, a new one, a change, a filter."""


class Check:
    """What was checked, and whether it held."""

    def __init__(self, *, quiet: bool) -> None:
        self.results: list[dict[str, Any]] = []
        self.timings: list[dict[str, Any]] = []
        self._quiet = quiet

    def that(self, statement: str, holds: bool, seen: object = "") -> None:
        """Note a statement."""
        self.results.append(
            {
                "statement": statement,
                "holds": bool(holds),
                **({} if holds else {"seen": str(seen)[:300]}),
            }
        )
        if not self._quiet:
            print(
                f"  {'ok  ' if holds else 'FAIL'} "
                f"{statement}{'' if holds else f' -- {str(seen)[:300]}'}",
                flush=True,
            )

    def say(self, text: str) -> None:
        """Print a heading or a table, unless JSON was asked for."""
        if not self._quiet:
            print(text, flush=True)

    @property
    def failed(self) -> int:
        """How many statements do not hold."""
        return sum(not result["holds"] for result in self.results)


def check(options: argparse.Namespace) -> int:
    """Run all checks; return the exit status."""
    with _system(options) as base:
        report = Check(quiet=options.json)
        report.say(f"checking {base}, tenants {options.tenant} and {options.other_tenant}")
        run_checks(base, report, tenant=options.tenant, other=options.other_tenant)
    if options.json:
        print(
            json.dumps(
                {"checks": report.results, "timings": report.timings, "failed": report.failed}
            )
        )
    else:
        print(f"\n{len(report.results) - report.failed} of {len(report.results)} statements hold")
    return 1 if report.failed else 0


def run_checks(base: str, report: Check, *, tenant: str, other: str) -> None:
    """Check a running system."""
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(_login(base, f"admin@{tenant}.example"))
        stranger = stack.enter_context(_login(base, f"admin@{other}.example"))
        employee = stack.enter_context(_login(base, f"employee@{other}.example"))
        nobody = stack.enter_context(httpx2.Client(base_url=base, timeout=10))
        report.say("\nRepeated requests")
        for module in MODULES:
            _repeated(report, admin, module)
        _table(report)
        report.say("\nA write, then a read")
        for module in MODULES:
            _written(report, admin, module)
        report.say("\nOthers")
        for module in MODULES:
            _others(
                report,
                module,
                admin=admin,
                stranger=stranger,
                employee=employee,
                nobody=nobody,
                tenant=tenant,
            )
        report.say("\nConversion and promotion")
        _converted(report, admin)
        _promoted(report, admin)


def _repeated(report: Check, http: httpx2.Client, module: str) -> None:
    plural, _, _, _, filtered = MODULES[module]
    http.post("/api/cache/invalidate", json={"modules": [module]}).raise_for_status()
    for what, path in (
        ("first page", f"/api/{module}"),
        ("filtered", f"/api/{module}?{filtered}"),
        ("second page", f"/api/{module}?offset=50&limit=50"),
    ):
        (cold, first), (_, second) = _timed(http, path), _timed(http, path)
        report.that(
            f"{module}, {what}: first request is a miss", "fwd=" in _status(first), _status(first)
        )
        report.that(
            f"{module}, {what}: repeated request is a hit", _is_hit(second), _status(second)
        )
        report.that(
            f"{module}, {what}: both say the same",
            first.content == second.content and first.status_code == 200,
            first.text,
        )
        warm = statistics.median(_timed(http, path)[0] for _ in range(REPEATS))
        report.timings.append(
            {"module": module, "request": what, "miss_ms": round(cold, 2), "hit_ms": round(warm, 2)}
        )
    assert plural in first.json()["data"]


def _written(report: Check, http: httpx2.Client, module: str) -> None:
    plural, single, new, change, _ = MODULES[module]
    path = f"/api/{module}"
    before = http.get(path).json()["data"]["total"]
    http.get(path)
    created = http.post(path, json={**new, "is_test_data": True, "check_run": uuid4().hex}).json()[
        "data"
    ][single]
    one = f"{path}/{created['id']}"
    try:
        listed = http.get(path).json()["data"]
        held = listed["total"] == before + 1 and listed[plural][0]["id"] == created["id"]
        report.that(
            f"{module}: a created record is in the next list",
            held,
            f"total {before} -> {listed['total']}",
        )
        http.get(one)
        http.put(one, json=change).raise_for_status()
        name, value = next(iter(change.items()))
        report.that(
            f"{module}: a change is in the next answer",
            http.get(one).json()["data"][single][name] == value,
        )
        again = http.get(path).json()["data"][plural][0]
        report.that(f"{module}: a change is in the next list", again.get(name) == value, again)
    finally:
        deleted = http.delete(one)
    report.that(
        f"{module}: the answer of a write says that its invalidation is confirmed",
        _confirmed(deleted),
    )
    report.that(f"{module}: a deleted record is gone at once", http.get(one).status_code == 404)
    after = http.get(path).json()["data"]["total"]
    report.that(
        f"{module}: a deleted record is not in the next list",
        after == before,
        f"{before} -> {after}",
    )


def _others(
    report: Check,
    module: str,
    *,
    admin: httpx2.Client,
    stranger: httpx2.Client,
    employee: httpx2.Client,
    nobody: httpx2.Client,
    tenant: str,
) -> None:
    plural, path = MODULES[module][0], f"/api/{module}"
    mine = {row["id"] for row in admin.get(path).json()["data"][plural]}
    foreign = {row["id"] for row in stranger.get(path).json()["data"][plural]}
    report.that(
        f"{module}: another tenant sees other rows under the same URL",
        mine and foreign and not mine & foreign,
    )
    refused = stranger.get(path, params={"tenant_id": tenant})
    report.that(
        f"{module}: another tenant is refused these rows", refused.status_code == 403, refused.text
    )
    detail = stranger.get(f"{path}/{next(iter(mine))}")
    unknown = stranger.get(f"{path}/{uuid4()}")
    same = (detail.status_code, detail.content) == (404, unknown.content)
    report.that(f"{module}: another tenant's record looks like an unknown one", same, detail.text)
    all_rows = stranger.get(path).json()["data"]["total"]
    fewer = employee.get(path).json()["data"]["total"]
    report.that(
        f"{module}: an employee with a narrower view gets fewer rows",
        0 < fewer < all_rows,
        f"{fewer} of {all_rows}",
    )
    report.that(
        f"{module}: without a token nothing is answered", nobody.get(path).status_code == 401
    )


def _converted(report: Check, http: httpx2.Client) -> None:
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
    report.that(
        "before a conversion the lists of five modules, lead and search are hits",
        all(_is_hit(http.get(p)) for p in warm),
    )
    converted = http.post(
        f"/api/leads/{lead['id']}/convert",
        json={"create_account": True, "create_opportunity": True},
    ).json()["data"]
    try:
        fresh = [http.get(path) for path in warm]
        report.that(
            "after it none of them is", not any(map(_is_hit, fresh)), [*map(_status, fresh)]
        )
        leads, contacts, accounts, deals, activities, gone, found = fresh
        report.that("the lead has left the list", lead["id"] not in leads.text)
        report.that(
            "the contact is in the list",
            contacts.json()["data"]["contacts"][0]["id"] == converted["contact"]["id"],
        )
        report.that(
            "the account is in the list",
            accounts.json()["data"]["accounts"][0]["id"] == converted["account"]["id"],
        )
        report.that("the opportunity is in the list", converted["opportunity"]["id"] in deals.text)
        moved = activities.json()["data"]["activities"][0]
        now_about = (moved["related_to"], moved["related_id"], moved["related_name"])
        report.that(
            "its activity is about the contact",
            now_about == ("contact", converted["contact"]["id"], f"Conny {name}"),
            moved,
        )
        report.that("the lead is gone", gone.status_code == 404)
        report.that("the contact is found", converted["contact"]["id"] in found.text)
        again = http.post(f"/api/leads/{lead['id']}/convert", json={})
        report.that("a second conversion is refused", again.status_code == 409, again.text)
    finally:
        http.delete(f"/api/activities/{call['id']}")
        http.delete(f"/api/opportunities/{converted['opportunity']['id']}")
        http.delete(f"/api/contacts/{converted['contact']['id']}")
        http.delete(f"/api/accounts/{converted['account']['id']}")


def _promoted(report: Check, http: httpx2.Client) -> None:
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
    report.that(
        "before a promotion all four reads are hits", all(_is_hit(http.get(path)) for path in warm)
    )
    promoted = http.post(f"/api/bizdevsources/{source['id']}/promote", json={}).json()["data"]
    try:
        fresh = [http.get(path) for path in warm]
        report.that(
            "after it none of them is",
            not any(_is_hit(answer) for answer in fresh),
            [_status(answer) for answer in fresh],
        )
        report.that(
            "the source is promoted",
            fresh[3].json()["data"]["bizdevsource"]["status"] == "Promoted",
        )
        report.that(
            "the account is in the list",
            fresh[1].json()["data"]["accounts"][0]["id"] == promoted["account"]["id"],
        )
        report.that(
            "the contact is in the list",
            fresh[2].json()["data"]["contacts"][0]["id"] == promoted["contact"]["id"],
        )
    finally:
        http.delete(f"/api/bizdevsources/{source['id']}")
        http.delete(f"/api/contacts/{promoted['contact']['id']}")
        http.delete(f"/api/accounts/{promoted['account']['id']}")


def _table(report: Check) -> None:
    report.say(f"\n  {'module':<15}{'request':<14}{'miss ms':>9}{'hit ms':>9}{'faster':>9}")
    for row in report.timings:
        share = 100 * (1 - row["hit_ms"] / row["miss_ms"])
        report.say(
            f"  "
            f"{row['module']:<15}{row['request']:<14}{row['miss_ms']:>9.2f}{row['hit_ms']:>9.2f}{share:>8.0f}%"
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
    answer = httpx2.post(
        f"{base}/api/auth/login", json={"email": email, "password": PASSWORD}, timeout=10
    )
    if answer.status_code != 200:
        raise LookupError(
            f"cannot log in as {email} at {base} ({answer.status_code}): the check needs the demo "
            f"data"
        )
    token = answer.json()["data"]["access_token"]
    return httpx2.Client(base_url=base, headers={"authorization": f"Bearer {token}"}, timeout=10)


@contextlib.contextmanager
def _system(options: argparse.Namespace) -> Iterator[str]:
    """Yield the address of the system to check: the given one, the one running on DATA_DIR, or one
    started for this."""
    running = Settings().data_dir / "running.json"
    if options.url:
        yield options.url.rstrip("/")
    elif running.exists() and _answers(
        base := f"http://127.0.0.1:{json.loads(running.read_text())['port']}"
    ):
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
            while not _answers(base):
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
    """Delete what an embedded PostgreSQL left outside the data folder."""
    from respcache.testing.servers import EmbeddedPostgres

    EmbeddedPostgres(data / "postgres", password="").find().remove()


def _answers(base: str) -> bool:
    try:
        return httpx2.get(f"{base}/api/system/health", timeout=2).status_code == 200
    except httpx2.HTTPError:
        return False
