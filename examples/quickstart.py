"""The library without the CRM: a cached list, and a write that invalidates it.

Run: uvicorn examples.quickstart:app
"""

import os

from fastapi import FastAPI

from respcache import Cache, MemoryStore, RedisStore, SingleTenant, cache_list, invalidate_cache

api = FastAPI()
books = ["Middlemarch"]


@api.get("/books")
@cache_list("books", ttl=180)
async def list_books(limit: int = 50) -> list[str]:
    return books[:limit]


@api.post("/books/{title}")
@invalidate_cache("books")
async def add_book(title: str) -> dict[str, int]:
    books.append(title)
    return {"count": len(books)}


url = os.environ.get("REDIS_CACHE_URL")
cache = Cache(
    RedisStore(url) if url else MemoryStore(),
    secret=os.environ.get("RESPCACHE_KEY", "a key for trying it out, 32 bytes or more").encode(),
    resolver=SingleTenant("public"),  # no tenants and no login: all callers see the same
)
app = cache.wrap(api)
