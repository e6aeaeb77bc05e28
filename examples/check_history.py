"""Is a cache ever stale? A small application with its own cache, its recorded history, and the
checker's report.

Run: python examples/check_history.py [FILE]. The cache deletes on every write, and still serves
stale data.
"""

import asyncio
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from respcache.testing.checker import check
from respcache.testing.history import Read, Recorder, Write, load, now


class Books:
    """The application: copies sold of each book (a version that grows by one), behind a cache."""

    def __init__(self) -> None:
        self.sold = {"Emma": 0}
        self.cache: dict[str, dict[str, Any]] = {}
        self.handler_may_end = asyncio.Event()
        self.handler_may_end.set()

    async def read(self, book: str) -> tuple[dict[str, Any], str]:
        if book in self.cache:
            return self.cache[book], "hit"
        body = {"book": book, "sold": self.sold[book]}
        await self.handler_may_end.wait()  # the rest of a slow handler
        self.cache[book] = body
        return body, "miss"

    async def sell(self, book: str) -> tuple[int, float]:
        self.sold[book] += 1
        committed = now()
        self.cache.pop(book, None)
        return self.sold[book], committed


async def read(books: Books, book: str, recorder: Recorder) -> None:
    start = now()
    body, how = await books.read(book)
    end = now()
    recorder.append(
        Read(
            start,
            end,
            {f"acme/{body['book']}": body["sold"]},
            "reader",
            asked=book,
            received=body["book"],
            how=how,
        )
    )


async def sell(books: Books, book: str, recorder: Recorder) -> None:
    started = now()
    version, committed = await books.sell(book)
    recorder.append(
        Write(f"acme/{book}", version, started, committed, acked=now(), process="writer")
    )


async def use(books: Books, recorder: Recorder) -> None:
    """Begin a slow read, sell a copy before it ends, and read again after the acknowledgement."""
    books.handler_may_end.clear()
    slow = asyncio.create_task(read(books, "Emma", recorder))
    await asyncio.sleep(0)
    await sell(books, "Emma", recorder)
    books.handler_may_end.set()
    await slow
    await read(books, "Emma", recorder)


def main(path: Path) -> int:
    with Recorder(path) as recorder:
        asyncio.run(use(Books(), recorder))
    report = check(load([path]), bound_s=2.5)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    with TemporaryDirectory() as directory:
        sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else f"{directory}/history")))
