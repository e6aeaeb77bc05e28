"""``respcache bench`` on small applications: figures of right answers, none of wrong ones. No
figure has a limit here."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.middleware.cors import CORSMiddleware

from respcache.ops.application import find_middleware
from respcache.ops.bench.serve import without_cache
from respcache.testing.servers import free_port
from tests import needs

from .conftest import Run, clean, document

pytestmark = needs.LINUX

QUICK = ("--rounds", "1", "--seconds", "0.05", "--connections", "1,4", "--json")
FIGURES = {"rps", "p50_ms", "p99_ms", "cpu_us", "rps_ratio", "cpu_ratio"}

APPLICATION = """
import itertools, os
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.middleware.cors import CORSMiddleware
from respcache import Cache, MemoryStore, SingleTenant, cache_list

api = FastAPI()
runs = itertools.count()
off = os.environ.get("OFF") == "1"

@api.get("/books")
@cache_list("books")
async def books(limit: int = 3) -> list[str]:
    return ["Middlemarch"] * limit

@api.get("/now")
async def now() -> int:
    return next(runs)

@api.get("/tired")
async def tired() -> str:
    return "well" if next(runs) < 20 else "ill"

@api.get("/secret")
@cache_list("secret")
async def secret(request: Request) -> str:
    from fastapi import HTTPException
    if request.headers.get("x-password") != "sesame":
        raise HTTPException(401)
    return "gold"

@api.get("/stream")
async def stream() -> StreamingResponse:
    return StreamingResponse(iter(["a", "b"]))

cache = Cache(
    MemoryStore(),
    secret=b"x" * 32,
    resolver=SingleTenant("public"),
    enabled=not off,
    verify_share=0,
)
app = CORSMiddleware(cache.wrap(api))
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """The folder in which the command is run, with an application in it."""
    (tmp_path / "shop.py").write_text(APPLICATION)
    return tmp_path


@pytest.fixture
def running(shop: Path) -> Iterator[list[tuple[str, int]]]:
    """Two servers of it, the second with its cache off: addresses and process ids."""
    started: list[tuple[str, subprocess.Popen[bytes]]] = []
    try:
        for off in ("0", "1"):
            port = free_port()
            command = [
                sys.executable,
                "-m",
                "uvicorn",
                "shop:app",
                "--port",
                str(port),
                "--log-level",
                "error",
            ]
            process = subprocess.Popen(command, cwd=shop, env=clean(OFF=off))
            started.append((f"http://127.0.0.1:{port}", process))
        for url, _ in started:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx2.HTTPError):
                    httpx2.get(f"{url}/books")
                    break
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield [(url, process.pid) for url, process in started]
    finally:
        for _, process in started:
            process.terminate()
            process.wait(20)


def test_an_application_is_measured_with_its_cache_and_without(respcache: Run, shop: Path) -> None:
    """Three lanes, finite figures, hits only with the cache; nothing is left behind."""
    done = respcache("bench", "--app", "shop:app", "/books", "/books?limit=2", *QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    report = document(done)
    assert set(report["lanes"]) == {"with", "without", "bare"}
    for way, counters in report["lanes"].items():
        assert set(counters) == {"c1", "c4"}
        for cell in counters.values():
            assert all(cell[name] > 0 for name in FIGURES)
            assert cell["hit_share"] == (1 if way == "with" else 0)
    assert report["lanes"]["bare"]["c1"]["cpu_ratio"] == 1
    assert set(report["with_against_without"]) == {"c1", "c4"}
    assert report["notes"] == []
    assert not servers()


@pytest.mark.long
def test_the_table_is_plain_in_a_pipe(respcache: Run, shop: Path) -> None:
    """``--path`` is an argument by another name."""
    done = respcache("bench", "--app", "shop:app", "--path", "/books", *QUICK[:-1])
    assert (done.returncode, "\x1b" in done.stdout, done.stderr) == (0, False, "")
    for words in ("with the cache", "without it", "bare ASGI", "times the requests/s"):
        assert words in done.stdout


@pytest.mark.long
def test_running_servers_are_measured(respcache: Run, running: list[tuple[str, int]]) -> None:
    """CPU where process ids are given; without a second server it is said what is missing."""
    (cached, pid), (uncached, other) = running
    more = ("--without", uncached, "--pid", str(pid), "--without-pid", str(other))
    report = document(respcache("bench", f"{cached}/books", *more, *QUICK))
    assert {way: cell["c1"]["hit_share"] for way, cell in report["lanes"].items()} == {
        "with": 1,
        "without": 0,
        "bare": 0,
    }
    assert all(counters["c4"]["cpu_us"] > 0 for counters in report["lanes"].values())
    report = document(respcache("bench", f"{cached}/books", *QUICK))
    assert report["lanes"]["with"]["c1"]["cpu_us"] is None
    assert "give --without URL" in report["notes"][-1]


@pytest.mark.long
def test_headers_are_sent(respcache: Run, shop: Path) -> None:
    """Given, or from a file, where no process list shows them."""
    (shop / "headers").write_text("X-Password: sesame\n\n")
    for header in ("X-Password: sesame", "@headers"):
        assert (
            respcache("bench", "--app", "shop:app", "/secret", "-H", header, *QUICK).returncode == 0
        )
    done = respcache("bench", "--app", "shop:app", "/secret", *QUICK)
    assert (done.returncode, "401" in document(done)["error"]["message"]) == (1, True)


@pytest.mark.long
def test_answers_that_differ_by_themselves_are_measured_and_noted(
    respcache: Run, shop: Path
) -> None:
    """They cannot be compared; and as none is a hit, that is said too."""
    report = document(respcache("bench", "--app", "shop:app", "/now", *QUICK))
    assert "its response varies" in report["notes"][0]
    assert "not every response with the cache was a hit" in report["notes"][1]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--app", "shop:app", "/tired"), 1, "/tired"),
        (("--app", "shop:app", "/stream"), 1, "streamed"),
        (("--app", "shop:app", "/nowhere"), 1, "404"),
        (("--app", "shop:app", "http://127.0.0.1:1/books"), 2, "must be a path"),
        (("--app", "shop:app", "/books", "--pid", "1"), 2, "--pid"),
        (("--app", "shop:cache", "/books"), 2, "has no cache"),
        (("--app", "shop:nothing", "/books"), 2, "nothing"),
        ((), 2, "name a request"),
        (("/books",), 2, "--app"),
        (("https://127.0.0.1/books",), 2, "must be like http://"),
        (("http://127.0.0.1:1/books", "http://127.0.0.1:2/books"), 2, "name one server"),
        (("http://127.0.0.1:1/books", "--pid", "999999999"), 2, "no process"),
        (("http://127.0.0.1:1/books", "-H", "hidden-one"), 2, "-H"),
        (("http://127.0.0.1:1/books", "--connections", "many"), 2, "--connections"),
        (("http://127.0.0.1:1/books",), 3, "no response"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_measured_is_said(
    respcache: Run, shop: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    """With its own exit status, no traceback, no process left, and no header's value."""
    done = respcache("bench", *QUICK, *arguments)
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (
        status,
        True,
        False,
    ), done.stderr
    assert document(done)["error"]["message"] in done.stderr
    assert "hidden-one" not in done.stderr
    assert not servers()


@pytest.mark.long
def test_an_application_that_does_not_start_is_shown_with_its_last_words(
    respcache: Run, shop: Path
) -> None:
    """Those of its log."""
    broken = "from contextlib import asynccontextmanager\n" + APPLICATION.replace(
        "FastAPI()", "FastAPI(lifespan=fails)"
    )
    fails = (
        "@asynccontextmanager\nasync def fails(app):\n    raise RuntimeError('no coffee')\n    "
        "yield\n"
    )
    (shop / "broken.py").write_text(broken.replace("api = ", f"{fails}\napi = "))
    done = respcache("bench", "--app", "broken:app", "/books", *QUICK)
    assert (done.returncode, "no coffee" in done.stderr) == (1, True)


def test_the_wrapper_is_taken_out_wherever_it_stands() -> None:
    """Outermost, or within middleware."""
    from respcache import Cache, SingleTenant

    async def api(scope: Any, receive: Any, send: Any) -> None: ...

    def wrapped() -> Any:
        return Cache(None, secret=b"x" * 32, resolver=SingleTenant("public")).wrap(api, routes=[])

    assert without_cache(wrapped()) is api
    around: Any = CORSMiddleware(CORSMiddleware(wrapped()))
    assert without_cache(around) is around
    assert around.app.app is api
    assert find_middleware(around) is None


def servers() -> list[str]:
    """Find processes of a benchmark that are children of nobody or of us."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"respcache.ops.bench.serve" in words and os.readlink(entry / "cwd").startswith(
                    "/tmp/pytest"
                ):
                    found.append(entry.name)
    return found
