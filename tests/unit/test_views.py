"""Views of generations: one reading at a time for all who need it, never one that left before they
came; and how old they are."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from respcache.core.errors import StoreError, StoreUnavailable
from respcache.core.generations import GenerationView
from respcache.read import views as views_module
from respcache.read.views import ViewReader
from respcache.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio
GEN = "tenant:t:~gen"
TAGS = frozenset({"*", "T:things"})


class Link(MemoryStore):
    """A store whose answers come when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self.answers: list[Callable[[GenerationView | StoreError], None]] = []
        self.down = False

    def view(
        self,
        generation: str,
        tags: Sequence[str],
        done: Callable[[GenerationView | StoreError], None],
    ) -> None:
        """Note what is asked."""
        if self.down:
            raise StoreUnavailable("down")
        self.asked.append((generation, tuple(tags)))
        self.answers.append(done)

    def answer(self, number: int, sequence: int = 0) -> GenerationView:
        """Answer a question."""
        found = GenerationView("s", b"n" * 16, "s", sequence)
        self.answers[number](found)
        return found


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def now() -> list[float]:
    return [100.0]


@pytest.fixture
def views(link: Link, now: list[float]) -> ViewReader:
    return ViewReader(link, clock=lambda: now[0])


async def turn() -> None:
    """Let what is due in this turn of the loop happen."""
    await asyncio.sleep(0)


async def test_requests_of_one_turn_share_a_reading(link: Link, views: ViewReader) -> None:
    """However many there are: one question, of each tenant."""
    waiting = [views.read(GEN, TAGS) for _ in range(50)]
    other = views.read("tenant:u:~gen", TAGS)
    await turn()
    assert link.asked == [(GEN, ("*", "T:things")), ("tenant:u:~gen", ("*", "T:things"))]
    found = link.answer(0, 7)
    assert [await one for one in waiting] == [found] * 50
    assert not other.done()


async def test_a_request_never_joins_a_reading_that_has_left(link: Link, views: ViewReader) -> None:
    """It might have been answered before the request began; those who came meanwhile share the next
    one."""
    first = views.read(GEN, TAGS)
    await turn()
    late = [views.read(GEN, TAGS) for _ in range(3)]
    await turn()
    assert len(link.asked) == 1
    link.answer(0, 1)
    await turn()
    assert (first.done(), [one.done() for one in late], len(link.asked)) == (True, [False] * 3, 2)
    found = link.answer(1, 2)
    assert [await one for one in late] == [found] * 3
    assert views.reads == 2


async def test_a_cancelled_request_disturbs_no_other(link: Link, views: ViewReader) -> None:
    """Each waits for a future of its own."""
    waiting = [views.read(GEN, TAGS) for _ in range(3)]
    waiting[1].cancel()
    await turn()
    found = link.answer(0)
    assert [await waiting[0], await waiting[2]] == [found] * 2


async def test_what_goes_wrong_is_told_to_all_and_the_next_reading_goes_on(
    link: Link, views: ViewReader
) -> None:
    """An answer that failed, and a link that is down when the question leaves."""
    first, second = views.read(GEN, TAGS), views.read(GEN, TAGS)
    await turn()
    third = views.read(GEN, TAGS)
    link.answers[0](StoreUnavailable("late"))
    for one in (first, second):
        with pytest.raises(StoreUnavailable, match="late"):
            await one
    found = link.answer(1)
    assert await third is found
    link.down = True
    fourth = views.read(GEN, TAGS)
    await turn()
    with pytest.raises(StoreUnavailable, match="down"):
        await fourth
    await link.close()
    with pytest.raises(StoreUnavailable):
        views.read(GEN, TAGS)
    link.down = False
    await link.connect()
    last = views.read(GEN, TAGS)
    await turn()
    found = link.answer(2)
    assert await last is found


async def test_a_view_asks_for_the_tags_of_all_who_need_it(link: Link, views: ViewReader) -> None:
    """A reading that left without a tag is no view for whom it counts."""
    views.read(GEN, TAGS)
    await turn()
    more = frozenset({"*", "T:others"})
    late = views.read(GEN, more)
    link.answer(0)
    assert views.recent(GEN, more, since=0) is None
    assert link.asked[1] == (GEN, ("*", "T:others", "T:things"))
    found = link.answer(1)
    assert await late is found
    assert views.recent(GEN, TAGS, since=0) is found
    assert views.recent(GEN, frozenset({"T:never"}), since=0) is None


async def test_a_views_age_counts_from_before_it_was_asked_for(
    link: Link, views: ViewReader, now: list[float]
) -> None:
    """However long the answer took."""
    reading = views.read(GEN, TAGS)
    await turn()
    now[0] = 105.0
    found = link.answer(0)
    assert await reading is found
    assert views.recent(GEN, TAGS, since=100.0) is found
    assert views.recent(GEN, TAGS, since=100.1) is None


@pytest.mark.parametrize("everything", [False, True])
async def test_a_view_is_dropped_when_something_is_heard(
    link: Link, views: ViewReader, *, everything: bool
) -> None:
    """Also the one that is under way: it may have been answered before. Who waits for it is served,
    who comes later is not."""
    expire = views.expire_all if everything else lambda: views.expire(GEN)
    reading = views.read(GEN, TAGS)
    await turn()
    expire()
    found = link.answer(0)
    assert await reading is found
    assert views.recent(GEN, TAGS, since=0) is None
    again = views.read(GEN, TAGS)
    await turn()
    kept = link.answer(1)
    assert await again is kept
    assert views.recent(GEN, TAGS, since=0) is kept
    expire()
    assert views.recent(GEN, TAGS, since=0) is None
    views.expire("tenant:unknown:~gen")


async def test_the_number_of_tenants_is_bounded(
    link: Link, views: ViewReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that nobody waits for go, the oldest first."""
    monkeypatch.setattr(views_module, "MAX_BATCHES", 16)
    readings = [views.read(f"tenant:{number}:~gen", TAGS) for number in range(16)]
    await turn()
    for number in range(1, 16):
        link.answer(number)
    for number in range(16, 100):
        views.read(f"tenant:{number}:~gen", TAGS)
        await turn()
        link.answer(number)
        assert len(views) <= 16
    link.answer(0)
    await asyncio.gather(*readings)


async def test_who_holds_on_to_a_group_that_goes_learns_of_it(
    link: Link, views: ViewReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tells it any more of a bump: its view is not to be used again, and a new batch begins
    without one."""
    monkeypatch.setattr(views_module, "MAX_BATCHES", 8)
    reading = views.read(GEN, TAGS)
    await turn()
    found = link.answer(0)
    assert await reading is found
    batch = views.batch(GEN)
    assert batch.view is found
    for number in range(8):
        views.batch(f"tenant:{number}:~gen")
    assert views.batch(GEN) is not batch
    assert (batch.view, batch.requested_at, views.batch(GEN).view) == (None, float("-inf"), None)
