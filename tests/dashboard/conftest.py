"""The dashboard as the CRM mounts it: in process, and with a browser on a running system of several
workers."""

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import httpx2
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from crm.demo.seed import PASSWORD
from respcache.testing.servers import free_port
from tests import needs
from tests.crm.conftest import crm, lease_s
from tests.crm.system import PATIENT, System

__all__ = ["crm", "lease_s"]

ROOT, ADMIN, MANAGER = "root@crm.example", "admin@acme.example", "manager@acme.example"
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WATCHED = """
    document.addEventListener("securitypolicyviolation", (event) =>
        console.error(`CSP: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""
WORKERS = 3
PATIENCE_MS = 60_000
"""A busy machine may take long; a page that never says what is expected takes this long to fail."""
Open = Callable[..., Page]


@dataclass
class Stage:
    """A running CRM with demo data and several workers on one cache."""

    system: System
    bases: list[str]
    database_url: str
    tokens: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The address of the first worker."""
        return self.bases[0]

    def token(self, tenant: str, role: str = "admin") -> str:
        """Return somebody's token."""
        if (tenant, role) not in self.tokens:
            asked = ("--tenant", tenant) if tenant else ()
            self.tokens[tenant, role] = self.system.command(
                "token", *asked, "--role", role
            ).stdout.strip()
        return self.tokens[tenant, role]

    def ask(
        self,
        method: str,
        path: str,
        *,
        tenant: str,
        worker: int = 0,
        role: str = "admin",
        **more: object,
    ) -> httpx2.Response:
        """Send a request of the API to a worker."""
        headers = {"authorization": f"Bearer {self.token(tenant, role)}"}
        return httpx2.request(
            method, self.bases[worker] + path, headers=headers, timeout=30, **more
        )  # type: ignore[arg-type]

    def status(self, path: str, *, tenant: str, worker: int = 0) -> str:
        """Return what an answer says of the cache."""
        return self.ask("GET", path, tenant=tenant, worker=worker).headers["cache-status"]

    def know(self, what: str, *, tenant: str = "", role: str = "superadmin", **query: str) -> Any:
        """Ask the dashboard's own API."""
        answer = self.ask("GET", f"/cache/api/{what}", tenant=tenant, role=role, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def tenant(self, name: str) -> str:
        """Return a tenant's id."""
        return next(id for id, called in self.know("me")["tenants"].items() if called == name)

    def key(self, path: str, *, tenant: str) -> str:
        """Have an answer stored, and return its key."""
        assert self.ask("GET", path, tenant=tenant).status_code == 200
        headers = {"authorization": f"Bearer {self.token(tenant)}"}
        asked = {"path": path, "headers": headers}
        return str(
            self.ask("POST", "/cache/api/explain", tenant="", role="superadmin", json=asked).json()[
                "key"
            ]
        )

    def psql(self, statement: str, *arguments: object) -> None:
        """Write into the database as nobody that the cache knows of; in a thread, as the browser's
        event loop is in this one."""

        async def run() -> None:
            connection = await asyncpg.connect(self.database_url.replace("+asyncpg", ""))
            try:
                await connection.execute(statement, *arguments)
            finally:
                await connection.close()

        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, run()).result()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Start the system and more workers on its servers; some requests have been answered by each of
    them."""
    data = tmp_path_factory.mktemp("stage") / "data"
    system, workers, bases = System(data), list[subprocess.Popen[bytes]](), list[str]()
    try:
        system.ready()
        state = json.loads((data / "running.json").read_text())
        for _ in range(WORKERS - 1):
            port = free_port()
            servers = {
                "DATABASE_URL": state["database_url"],
                "REDIS_CACHE_URL": state["cache_url"],
                "PORT": str(port),
            }
            with (data.parent / f"{port}.log").open("wb") as log:
                command = [*PATIENT, "serve"]
                workers.append(
                    subprocess.Popen(
                        command, env={**system.environment, **servers}, stdout=log, stderr=log
                    )
                )
            bases.append(f"http://127.0.0.1:{port}")
        made = Stage(system, [system.base, *bases], state["database_url"])
        for base, worker in zip(bases, workers, strict=True):
            _until_up(base, worker)
        for number in range(WORKERS):
            for tenant in ("acme", "globex"):
                for path in (
                    "/api/accounts",
                    "/api/leads",
                    "/api/opportunities/stats",
                    "/api/accounts",
                ):
                    assert made.ask("GET", path, tenant=tenant, worker=number).status_code == 200
        yield made
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(30)
        system.end()


def until(said: Callable[[], bool]) -> bool:
    """Look again and again until something is so; False if it is not in time."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while time.monotonic() < deadline:
        if said():
            return True
        time.sleep(0.05)
    return False


def main(page: Page) -> str:
    """Return what a page says."""
    return page.locator("main").inner_text()


def _until_up(base: str, worker: "subprocess.Popen[bytes]") -> None:
    while worker.poll() is None:
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{base}/api/system/health").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"{base} did not start")


@pytest.fixture(scope="module")
def browser(stage: Stage) -> Iterator[Browser]:
    """A Chromium. After ``stage``: while it runs, no event loop of ours can."""
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE_MS)
        started = playwright.chromium.launch(
            executable_path=str(needs.CHROMIUM_PATH), args=SWITCHES
        )
        yield started
        started.close()


@dataclass
class Faults:
    """What went wrong in a browser's pages, but for answers that a test expects (by status and a
    part of their address)."""

    seen: list[str] = field(default_factory=list)
    expected: list[tuple[int, str]] = field(default_factory=list)

    def watch(self, context: BrowserContext) -> None:
        """Note violations of the content policy, errors in the console, failed requests and bad
        answers of all its pages."""
        context.add_init_script(WATCHED)
        context.on(
            "console", lambda said: self._said(said.type, said.text, said.location.get("url", ""))
        )
        context.on("weberror", lambda error: self.seen.append(f"script: {error.error}"))
        context.on(
            "requestfailed",
            lambda request: self._failed(request.resource_type, request.url, request.failure or ""),
        )
        context.on("response", lambda answer: self._answered(answer.status, answer.url))

    def _said(self, kind: str, text: str, url: str) -> None:
        told = text.startswith("Failed to load resource") and any(
            part in url for _, part in self.expected
        )
        if kind in ("error", "warning") and not told:
            self.seen.append(f"{kind}: {text}")

    def _failed(self, kind: str, url: str, why: str) -> None:
        if why != "net::ERR_ABORTED":  # a stream or a look for news that ends with its page
            self.seen.append(f"failed: {kind} {url} {why}")

    def _answered(self, status: int, url: str) -> None:
        if status >= 400 and not any(
            status == known and part in url for known, part in self.expected
        ):
            self.seen.append(f"{status}: {url}")


@pytest.fixture
def faults() -> Iterator[Faults]:
    """Fail the test where anything went wrong in its pages."""
    noted = Faults()
    yield noted
    assert noted.seen == []


@pytest.fixture
def sign_in(browser: Browser, stage: Stage, faults: Faults) -> Iterator[Open]:
    """Open a browser of its own and sign somebody in by hand: ``sign_in("root@crm.example",
    worker=0, ...)``."""
    contexts: list[BrowserContext] = []

    def open_for(mail: str, *, worker: int = 0, **options: object) -> Page:
        context = browser.new_context(base_url=stage.bases[worker], **options)  # type: ignore[arg-type]
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        faults.watch(context)
        page = context.new_page()
        page.goto("/cache")
        page.get_by_label("Name").fill(mail)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/cache/")
        return page

    yield open_for
    for context in contexts:
        context.close()
