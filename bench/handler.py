"""The one handler behind every lane: 64 pages of a list, 40,000 bytes of JSON each, made once, the
same in every process.

The rows look like a CRM's accounts. ``fetch`` gives the objects, which whoever answers must
serialise; ``body`` the bytes that must come out. Pages are numbered without end (a fresh key
whenever one is needed), their content repeats after 64. ``fills`` counts how often the handler ran:
a cache that answers itself leaves it alone.
"""

import asyncio
import json
import random
import uuid
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from fastapi import FastAPI, HTTPException, Request

PAGES = 64
ROWS = 50
BODY_BYTES = 40_000
TTL_S = 3600
SLOW_S = 0.2
PATH = "/items"
SLOW_PATH = "/slow"
LOCKED_PATH = "/slow-locked"
TENANT = "acme"
AUTHORIZATION = "Bearer of-an-admin-at-acme"
CALLERS = {AUTHORIZATION: TENANT}
"""Who may ask: every lane that checks its callers looks them up here, and does nothing else."""

OutboxPage = dict[str, Any]
TEXT = (
    "pump valve motor offer visit contract price quote repair spare delivery crane sensor panel "
    "board cable order invoice "
    "meeting phone reminder budget quarter plant factory branch office region partner dealer "
    "customer supplier service tender"
)
WORDS = TEXT.split()
CITIES = (
    "Hamburg",
    "Lyon",
    "Porto",
    "Gdańsk",
    "Zürich",
    "Malmö",
    "Graz",
    "Leeds",
    "Turin",
    "Ghent",
)

_counter = [0]


def fills() -> int:
    """Return how often the handler ran in this process."""
    return _counter[0]


def page(number: int) -> OutboxPage:
    """Return the objects of a page."""
    return _page(number % PAGES)


def body(number: int) -> bytes:
    """Return the bytes of a page, as every JSON response class of Starlette and FastAPI writes
    them."""
    return _body(number % PAGES)


async def fetch(number: int) -> OutboxPage:
    """Be the handler: what a database would be asked for. Here it costs nothing, so that nothing
    hides what a cache costs."""
    _counter[0] += 1
    return page(number)


async def fetch_slowly(number: int) -> OutboxPage:
    """Be a handler that takes 200 ms."""
    await asyncio.sleep(SLOW_S)
    return await fetch(number)


async def caller(request: Request) -> str:
    """Say which tenant asks: the check that every FastAPI lane makes, ours included (once a token,
    in its resolver)."""
    tenant = CALLERS.get(request.headers.get("authorization", ""))
    if tenant is None:
        raise HTTPException(401)
    return tenant


def application(**options: Any) -> FastAPI:
    """Make the FastAPI application that a lane adds its routes to."""
    app = FastAPI(openapi_url=None, **options)

    @app.get("/fills")
    async def count_fills() -> dict[str, int]:
        return {"fills": fills()}

    return app


def request(number: int, path: str = PATH) -> bytes:
    """Build the request for a page."""
    return f"GET {path}?page={number} HTTP/1.1\r\nHost: bench\r\nAuthorization: {AUTHORIZATION}\r\n\r\n".encode()


@cache
def _page(number: int) -> OutboxPage:
    chance = random.Random(number)
    rows = [_row(chance) for _ in range(ROWS)]
    made = {"status": "success", "data": {"items": rows, "total": PAGES * ROWS, "page": number}}
    missing = BODY_BYTES - len(_encode(made))
    assert missing > 0
    filler = " ".join(chance.choice(WORDS) for _ in range(missing // 4))
    rows[-1]["description"] += " " + filler[: missing - 1]
    return made


@cache
def _body(number: int) -> bytes:
    encoded = _encode(_page(number))
    assert len(encoded) == BODY_BYTES
    return encoded


def _row(chance: random.Random) -> OutboxPage:
    name = (
        f"{chance.choice(WORDS).title()} {chance.choice(WORDS).title()} "
        f"{chance.choice(('GmbH', 'SA', 'AB', 'Ltd', 'Lda'))}"
    )
    host = name.lower().replace(" ", "-")
    made = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(microseconds=chance.randrange(10**13))
    changed = made + timedelta(microseconds=chance.randrange(10**12))
    return {
        "id": str(uuid.UUID(int=chance.getrandbits(128), version=4)),
        "name": name,
        "type": chance.choice(("customer", "prospect", "partner")),
        "industry": chance.choice(("energy", "mechanical engineering", "logistics", "food")),
        "email": f"{chance.choice(WORDS)}@{host}.example",
        "website": f"https://www.{host}.example/{chance.choice(WORDS)}",
        "phone": f"+{chance.randrange(30, 50)} {chance.randrange(10**9)}",
        "city": chance.choice(CITIES),
        "employee_count": chance.randrange(1, 5000),
        "annual_revenue": chance.randrange(10**8),
        "health_status": chance.choice(("good", "at risk", None)),
        "is_deleted": False,
        "assigned_to": str(uuid.UUID(int=chance.getrandbits(128), version=4)),
        "team_id": None,
        "tags": chance.sample(WORDS, 3),
        "description": " ".join(chance.choice(WORDS) for _ in range(33)),
        "created_at": made.isoformat(),
        "updated_at": changed.isoformat(),
    }


def _encode(made: OutboxPage) -> bytes:
    return json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode()
