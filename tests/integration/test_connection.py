"""One connection: replies reach those who asked, whatever is cancelled, late, split, cut or
garbled. On both event loops.

Most tests talk to a real Valkey; where one cannot be made to misbehave, the test plays the server
on a real socket.
"""

import asyncio
import contextvars
import fcntl
import os
import pty
import random
import socket
import ssl
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import hiredis
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import needs

from respcache.core.errors import StoreUnavailable
from respcache.resp import connection as connection_module
from respcache.resp.connection import Connection, HandshakeRefused
from respcache.resp.url import ServerURL
from respcache.testing.servers import EmbeddedServer, EmbeddedValkey

pytestmark = pytest.mark.anyio

REPLICATION = b"role:master\r\nmaster_replid:aaaabbbbccccdddd\r\n"
PERSISTENCE = b"loading:0\r\n"
LONG_S = 60.0
"""A deadline that no busy machine misses."""

hypothetically = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """uvloop orders timers and sockets differently."""
    return "asyncio", {"use_uvloop": request.param}


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


class Peer:
    """The other end of a socket, played by the test: it shakes hands as told, and then says exactly
    what the test says."""

    def __init__(self, *, greeting: bytes | None) -> None:
        self.greeting = greeting
        self.connections: list[asyncio.StreamWriter] = []
        self.arrivals: list[float] = []
        self.heard = bytearray()
        self.reading = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.arrivals.append(time.monotonic())
        self.connections.append(writer)
        if self.greeting is None:
            return
        try:
            await reader.readuntil(b"persistence\r\n")
            writer.write(self.greeting)
            while self.reading and (data := await reader.read(65536)):
                self.heard += data
        except (ConnectionError, asyncio.IncompleteReadError):
            pass

    def say(self, data: bytes) -> None:
        self.connections[-1].write(data)

    async def heard_commands(self, number: int) -> None:
        await until(lambda: self.heard.count(b"*") >= number)


def greeting(replication: bytes = REPLICATION, persistence: bytes = PERSISTENCE) -> bytes:
    return b"%1\r\n+proto\r\n:3\r\n+OK\r\n" + bulk(replication) + bulk(persistence)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.002)


class Seen:
    """Stands between a connection and its transport or its event loop, and notes calls of one
    name."""

    def __init__(self, inner: Any, name: str) -> None:
        self._inner = inner
        self._name = name
        self.calls: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        return (
            attribute
            if name != self._name
            else lambda *args, **options: self.calls.append(args) or attribute(*args, **options)
        )


class Watched(Connection):
    """A connection that notes what it writes and how much it has received."""

    transport: Seen
    received = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = Seen(transport, "write")
        super().connection_made(self.transport)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.received += len(data)


def writes_of(connection: Watched) -> list[Any]:
    """Return a list that notes what the connection writes from now on."""
    connection.transport.calls = []
    return connection.transport.calls


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.TimerHandle]:
    """Return a list that notes the timers that connections set."""
    noted: list[asyncio.TimerHandle] = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def note(delay: float, callback: Callable[..., object], *args: Any, **options: Any) -> Any:
        timer = call_later(delay, callback, *args, **options)
        if isinstance(getattr(callback, "__self__", None), Connection):
            noted.append(timer)
        return timer

    monkeypatch.setattr(loop, "call_later", note)
    return noted


def over(timer: asyncio.TimerHandle) -> bool:
    """Whether a timer will not fire any more."""
    return timer.cancelled() or timer.when() < asyncio.get_running_loop().time()


Meet = Callable[..., Awaitable[tuple[Peer, Watched]]]


@pytest.fixture
async def listen() -> AsyncIterator[Callable[..., Awaitable[tuple[Peer, ServerURL]]]]:
    """Start peers; all their sockets are closed afterwards."""
    servers: list[tuple[asyncio.Server, Peer]] = []

    async def start(greeting_bytes: bytes | None) -> tuple[Peer, ServerURL]:
        peer = Peer(greeting=greeting_bytes)
        server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
        servers.append((server, peer))
        return peer, ServerURL("127.0.0.1", server.sockets[0].getsockname()[1])

    yield start
    for server, peer in servers:
        server.close()
        for writer in peer.connections:
            writer.transport.abort()


@pytest.fixture
async def meet(listen: Callable[..., Awaitable[tuple[Peer, ServerURL]]]) -> AsyncIterator[Meet]:
    """Connect to a new peer; ``lost`` collects why connections ended."""
    opened: list[Watched] = []

    async def connect(lost: list[StoreUnavailable] | None = None) -> tuple[Peer, Watched]:
        peer, url = await listen(greeting())
        ends = [] if lost is None else lost
        connection = await Watched.open(
            url, deadline_s=LONG_S, on_lost=lambda _, cause: ends.append(cause)
        )
        opened.append(connection)
        return peer, connection

    yield connect
    for connection in opened:
        connection.abort(StoreUnavailable("end of the test"))
        await connection.wait_closed()


@pytest.fixture
async def real(valkey_url: str) -> AsyncIterator[Watched]:
    """A connection to a real server."""
    connection = await Watched.open(
        ServerURL.parse(valkey_url), deadline_s=LONG_S, on_lost=lambda _, __: None
    )
    yield connection
    connection.abort(StoreUnavailable("end of the test"))
    await connection.wait_closed()


def asking(
    connection: Connection, *commands: tuple[Any, ...], deadline_s: float = LONG_S
) -> "asyncio.Task[list[Any]]":
    return asyncio.create_task(connection.execute(commands, deadline_s=deadline_s))


@asynccontextmanager
async def connected(url: ServerURL) -> AsyncIterator[Watched]:
    connection = await Watched.open(url, deadline_s=LONG_S, on_lost=lambda _, __: None)
    try:
        yield connection
    finally:
        connection.abort(StoreUnavailable("end of the test"))
        await connection.wait_closed()


# -- handshake -------------------------------------------------------------------------------------


async def test_the_handshake_learns_the_identity_and_names_the_connection(real: Watched) -> None:
    """RESP3, the client's name, and the server's own replication id."""
    info, client = await real.execute(
        [("INFO", "replication"), ("CLIENT", "INFO")], deadline_s=LONG_S
    )
    assert f"master_replid:{real.identity}\r\n" in connection_module.as_text(info)
    assert "name=respcache " in connection_module.as_text(client)
    assert "resp=3" in connection_module.as_text(client)


async def test_the_database_of_the_url_is_selected(valkey_url: str) -> None:
    """A key written over a connection to database 3 is not in database 0."""
    url = ServerURL.parse(valkey_url.removesuffix("/0") + "/3")
    connection = await Watched.open(url, deadline_s=LONG_S, on_lost=lambda _, __: None)
    try:
        replies = await connection.execute(
            [("SET", "k", "v"), ("SELECT", 0), ("EXISTS", "k")], deadline_s=LONG_S
        )
        assert replies == [b"OK", b"OK", 0]
    finally:
        connection.abort(StoreUnavailable("end of the test"))
        await connection.wait_closed()


async def test_a_wrong_password_is_a_refusal_that_does_not_repeat_it(valkey_url: str) -> None:
    """The caller learns WRONGPASS, nobody learns what was tried."""
    good = ServerURL.parse(valkey_url)
    url = ServerURL(good.host, good.port, 0, None, "not-the-password")
    with pytest.raises(HandshakeRefused, match="WRONGPASS") as error:
        await Watched.open(url, deadline_s=LONG_S, on_lost=lambda _, __: None)
    assert "not-the-password" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (greeting(b"role:slave\r\nmaster_replid:abc\r\n"), "role is slave"),
        (greeting(b"role:master\r\n"), "not master"),
        (greeting(b"nonsense"), "role is None"),
        (greeting(persistence=b"loading:1\r\n"), "loading"),
        (
            b"-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `default`, "
            b"`pw`\r\n" * 4,
            "unknown command `HELLO`$",
        ),
        (b"-ERR max number of clients reached\r\n", "max number of clients"),
        (b"-LOADING the dataset\r\n" * 4, "LOADING"),
        (b"-NOAUTH HELLO must be called\r\n" * 4, "NOAUTH"),
    ],
)
async def test_servers_that_cannot_serve_us_are_refused(
    listen: Any, answer: bytes, message: str
) -> None:
    """A replica, a server that loads its data, one without RESP3, one without room: no connection,
    and a reason."""
    _, url = await listen(answer)
    with pytest.raises(HandshakeRefused, match=message) as error:
        await Watched.open(url, deadline_s=LONG_S, on_lost=lambda _, __: None)
    assert "`pw`" not in str(error.value)


async def test_a_server_that_accepts_and_says_nothing_costs_one_connect_deadline(
    listen: Any,
) -> None:
    """The handshake has a deadline of its own."""
    _, url = await listen(None)
    with pytest.raises(StoreUnavailable, match=r"no answer within 0\.05 s|silent|no reply"):
        await Watched.open(url, deadline_s=0.05, on_lost=lambda _, __: None)


@pytest.mark.parametrize("host", ["127.0.0.1", "a" * 70 + ".invalid"])
async def test_an_address_without_a_server_is_unavailable(host: str, unused_port: int) -> None:
    """Nobody listens, or the name cannot exist: the same error as for a dead server."""
    with pytest.raises(StoreUnavailable):
        await Watched.open(
            ServerURL(host, unused_port), deadline_s=LONG_S, on_lost=lambda _, __: None
        )


@pytest.fixture
async def unused_port() -> int:
    """A port where somebody listened a moment ago."""
    server = await asyncio.start_server(lambda _, __: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    return port


# -- whose reply it is -----------------------------------------------------------------------------


async def test_a_cancelled_callers_reply_never_reaches_another_caller(meet: Meet) -> None:
    """CVE-2023-28859 of redis-py: there, the next caller got the reply of the cancelled one."""
    peer, connection = await meet()
    first, second = asking(connection, ("GET", "mine")), asking(connection, ("GET", "yours"))
    await peer.heard_commands(2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    third = asking(connection, ("GET", "third"))
    await peer.heard_commands(3)
    peer.say(bulk(b"mine") + bulk(b"yours") + bulk(b"third"))
    assert await second == [b"yours"]
    assert await third == [b"third"]


async def test_a_reply_that_comes_too_late_never_reaches_another_caller(meet: Meet) -> None:
    """A caller that ran out of time leaves its place in the queue."""
    peer, connection = await meet()
    late = asking(connection, ("GET", "a"), ("GET", "late"), deadline_s=0.3)
    patient = asking(connection, ("GET", "patient"))
    await peer.heard_commands(3)
    peer.say(bulk(b"a"))  # the link is alive, only one reply is missing
    with pytest.raises(StoreUnavailable, match="no reply within 300 ms"):
        await late
    peer.say(bulk(b"late") + bulk(b"patient"))
    assert await patient == [b"patient"]
    assert connection.timeouts == 1


async def test_a_storm_of_cancelled_commands_mixes_nothing_up(real: Watched) -> None:
    """Seeded: 600 batches on a real server, a third of them cancelled at any stage; each survivor
    has its own replies."""
    rng = random.Random(7)
    for _ in range(6):
        batches = [
            [f"{rng.random()}".encode() * rng.randint(1, 500) for _ in range(rng.randint(1, 4))]
            for _ in range(100)
        ]
        tasks = [asking(real, *[("ECHO", text) for text in batch]) for batch in batches]
        for task in rng.sample(tasks, 33):
            asyncio.get_running_loop().call_later(rng.random() * 0.01, task.cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for batch, result in zip(batches, results, strict=True):
            assert isinstance(result, asyncio.CancelledError) or result == batch
        assert sum(isinstance(result, list) for result in results) >= 67
    assert await real.execute([("ECHO", "last")], deadline_s=LONG_S) == [b"last"]


@hypothetically
@given(seed=st.integers(0, 2**32), callers=st.integers(1, 300), cancelled=st.floats(0, 1))
async def test_in_any_storm_of_cancellations_every_survivor_gets_its_own_value(
    real: Watched, seed: int, callers: int, cancelled: float
) -> None:
    """Futures and tasks, cancelled before their commands leave, while they are under way, and from
    each other's callbacks."""
    rng = random.Random(seed)
    batches = [
        [f"{seed}.{number}.{part}".encode() for part in range(rng.randint(1, 3))]
        for number in range(callers)
    ]
    asked: list[asyncio.Future[list[Any]]] = []
    for batch in batches:
        commands = [("ECHO", text) for text in batch]
        plain = rng.random() < 0.5
        asked.append(
            real.request(commands, deadline_s=LONG_S) if plain else asking(real, *commands)
        )
        if rng.random() < 0.1:
            await asyncio.sleep(0)
    for victim in rng.sample(asked, int(cancelled * callers)):
        when = rng.random()
        if when < 0.3:
            victim.cancel()
        elif when < 0.6:
            asyncio.get_running_loop().call_later(rng.random() * 0.002, victim.cancel)
        else:
            rng.choice(asked).add_done_callback(lambda _, victim=victim: victim.cancel())
    results = await asyncio.gather(*asked, return_exceptions=True)
    for batch, result in zip(batches, results, strict=True):
        assert isinstance(result, asyncio.CancelledError) or result == batch
    assert sum(isinstance(result, list) for result in results) >= callers - int(cancelled * callers)
    assert await real.execute([("ECHO", "last")], deadline_s=LONG_S) == [b"last"]


async def test_a_future_needs_no_task(real: Watched) -> None:
    """A plain function sends, and a done-callback takes the replies."""
    taken: list[Any] = []
    before = asyncio.all_tasks()
    real.request([("ECHO", "a"), ("ECHO", "b")], deadline_s=LONG_S).add_done_callback(
        lambda done: taken.append(done.result())
    )
    assert asyncio.all_tasks() == before
    await until(lambda: bool(taken))
    assert taken == [[b"a", b"b"]]
    assert real.request([], deadline_s=LONG_S).result() == []


async def test_a_request_that_cannot_be_sent_raises_at_once(real: Watched) -> None:
    """There is no future to be looked at later."""
    real.abort(StoreUnavailable("the end"))
    for send in (
        real.send,
        lambda commands: real.request(commands, deadline_s=LONG_S),
        lambda _: real.soon(lambda: None),
    ):
        with pytest.raises(StoreUnavailable, match="the end"):
            send([("ECHO", "a")])


async def test_commands_that_cannot_be_written_take_no_place_in_the_queue(real: Watched) -> None:
    """A command that fails to be packed raises, and the next caller still gets its own reply."""
    with pytest.raises(TypeError):
        await real.execute(
            [("ECHO", "a"), ("ECHO", object())],  # type: ignore[list-item]
            deadline_s=LONG_S,
        )
    with pytest.raises(UnicodeEncodeError):
        await real.execute([("ECHO", "\ud800")], deadline_s=LONG_S)
    assert await real.execute([("ECHO", "b")], deadline_s=LONG_S) == [b"b"]


async def test_an_empty_batch_asks_nothing_and_takes_no_place(real: Watched) -> None:
    """It is answered at once."""
    assert await real.execute([], deadline_s=LONG_S) == []
    real.send([])
    assert await real.execute([("ECHO", "b")], deadline_s=LONG_S) == [b"b"]


async def test_nobody_waits_for_what_is_sent_and_its_errors_are_counted(real: Watched) -> None:
    """The replies are consumed by the batch that nobody waits for."""
    real.send([("SET", "k", "v"), ("HGET", "k", "field")])
    assert await real.execute([("GET", "k")], deadline_s=LONG_S) == [b"v"]
    assert real.errors == 1


async def test_an_error_stands_in_its_place_among_the_replies(real: Watched) -> None:
    """It is returned, not raised: the other replies of the batch are good."""
    replies = await real.execute([("ECHO", "a"), ("NOSUCH",), ("ECHO", "c")], deadline_s=LONG_S)
    assert (replies[0], replies[2]) == (b"a", b"c")
    assert isinstance(replies[1], hiredis.ReplyError)


# -- one write per tick ----------------------------------------------------------------------------


async def test_the_commands_of_one_tick_leave_in_one_write_in_their_order(real: Watched) -> None:
    """Those of all callers, waited for or not; the next tick's leave in the next."""
    writes = writes_of(real)
    waiting = []
    for number in range(50):
        real.send([("RPUSH", "list", f"{number}a")])
        waiting.append(real.request([("RPUSH", "list", f"{number}b")], deadline_s=LONG_S))
    assert writes == []
    assert await asyncio.gather(*waiting) == [[2 * number + 2] for number in range(50)]
    assert len(writes) == 1
    (items,) = await real.execute([("LRANGE", "list", 0, -1)], deadline_s=LONG_S)
    assert items == [f"{number}{letter}".encode() for number in range(50) for letter in "ab"]
    assert len(writes) == 2


async def test_a_server_reads_the_commands_of_a_tick_at_once(real: Watched) -> None:
    """As the server counts: one read for a hundred callers."""

    async def reads() -> int:
        (info,) = await real.execute([("INFO", "stats")], deadline_s=LONG_S)
        return int(connection_module.fields_of(info)["total_reads_processed"])

    before = await reads()
    await asyncio.gather(*(asking(real, ("ECHO", number)) for number in range(100)))
    assert await reads() - before == 2  # and the one that asks


# uvloop drops what it has not written yet
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})])
async def test_what_was_sent_in_the_tick_of_the_end_still_leaves(meet: Meet) -> None:
    """A lease that is given back by a process that stops, for example."""
    peer, connection = await meet()
    connection.send([("DEL", "lease")])
    connection.abort(StoreUnavailable("stopping"))
    await peer.heard_commands(1)


async def test_a_callback_runs_before_the_bytes_leave_and_what_it_sends_leaves_with_them(
    real: Watched,
) -> None:
    """It can group the requests of a tick; it runs once."""
    writes, wanted, answers = writes_of(real), [], []

    def ask_for_all() -> None:
        assert writes == []
        real.request([("MGET", *wanted)], deadline_s=LONG_S).add_done_callback(
            lambda done: answers.append(done.result())
        )

    first = real.request([("MSET", "a", 1, "b", 2)], deadline_s=LONG_S)
    real.soon(ask_for_all)
    wanted += ["a", "b"]  # asked for later in the tick
    await first
    await until(lambda: bool(answers))
    assert answers == [[[b"1", b"2"]]]
    assert len(writes) == 1


async def test_a_callback_without_commands_is_called_in_this_tick_too(real: Watched) -> None:
    """It schedules the flush when nobody else has, and writes nothing."""
    writes, calls = writes_of(real), []
    real.soon(lambda: calls.append(len(calls)))
    assert calls == []
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (calls, writes) == ([0], [])


async def test_a_callback_that_asks_to_be_called_again_waits_for_the_next_tick(
    real: Watched,
) -> None:
    """It cannot keep the loop in one flush for ever, and what it sends each time leaves."""
    calls: list[int] = []

    def again() -> None:
        calls.append(len(calls))
        real.send([("INCR", "calls")])
        real.soon(again)

    real.soon(again)
    await until(lambda: len(calls) >= 5)
    (count,) = await real.execute([("GET", "calls")], deadline_s=LONG_S)
    assert int(count) >= 5


@pytest.mark.parametrize(
    "error", [ValueError("mine"), IndexError("mine"), asyncio.CancelledError("mine")]
)
async def test_a_callback_that_fails_is_logged_and_costs_the_others_nothing(
    real: Watched, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """Their commands leave, and the callbacks after it are called; so it is in the next tick."""

    def fail() -> None:
        raise error

    for _ in range(2):
        waiting, calls = real.request([("ECHO", "a")], deadline_s=LONG_S), []
        real.soon(fail)
        real.soon(lambda calls=calls: calls.append(None))
        assert await waiting == [b"a"]
        assert calls == [None]
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [error, error]


async def test_when_the_connection_ends_first_callbacks_still_run_and_learn_of_it(
    meet: Meet,
) -> None:
    """What they send raises, theirs to handle."""
    _, connection = await meet()
    raised: list[StoreUnavailable] = []

    def ask() -> None:
        try:
            connection.request([("GET", "k")], deadline_s=LONG_S)
        except StoreUnavailable as error:
            raised.append(error)

    connection.soon(ask)
    connection.abort(StoreUnavailable("the end"))
    await until(lambda: bool(raised))
    assert str(raised[0]) == "the end"


async def test_callbacks_and_timers_run_in_nobodys_context(real: Watched) -> None:
    """They serve many callers; what one of them has set, its tenant for example, must not be seen
    by what serves another."""
    tenant, seen = contextvars.ContextVar("tenant", default="nobody"), []
    tenant.set("acme")
    real.soon(lambda: seen.append(tenant.get()))
    await real.execute([("ECHO", "a")], deadline_s=LONG_S)
    assert seen == ["nobody"]


# -- bytes -----------------------------------------------------------------------------------------

STREAM = (
    bulk(b"one\r\ntwo"),
    b"*3\r\n" + bulk(b"x") + b"_\r\n:7\r\n",
    b"-ERR no\r\n",
    b"_\r\n",
    b"#f\r\n",
    b"%1\r\n+k\r\n+v\r\n",
    b"=7\r\ntxt:abc\r\n",
)
PUSH = b">2\r\n+invalidate\r\n*1\r\n+key\r\n"


async def check_stream(waiting: "list[asyncio.Task[list[Any]]]") -> None:
    (one,), (two,), (error,), (nothing,), (false,), (mapping,), (verbatim,) = [
        await task for task in waiting
    ]
    assert (one, two, nothing, false) == (b"one\r\ntwo", [b"x", None, 7], None, False)
    assert isinstance(error, hiredis.ReplyError)
    assert mapping == {b"k": b"v"}
    assert connection_module.as_text(verbatim) == "abc"


async def test_replies_may_come_byte_by_byte(meet: Meet) -> None:
    """With a push message between any two of them, which belongs to nobody."""
    peer, connection = await meet()
    waiting = [asking(connection, ("CMD", number)) for number in range(len(STREAM))]
    await peer.heard_commands(len(STREAM))
    for byte in PUSH + PUSH.join(STREAM):
        received = connection.received
        peer.say(bytes([byte]))
        await until(lambda received=received: connection.received > received)
    await check_stream(waiting)


async def test_all_replies_may_come_in_one_packet(meet: Meet) -> None:
    """And they still go to those who asked."""
    peer, connection = await meet()
    waiting = [asking(connection, ("CMD", number)) for number in range(len(STREAM))]
    await peer.heard_commands(len(STREAM))
    peer.say(PUSH.join(STREAM))
    await check_stream(waiting)


async def test_replies_may_be_cut_at_any_byte(meet: Meet) -> None:
    """Two packets, for every place in which they can be cut."""
    peer, connection = await meet()
    stream = PUSH.join(STREAM)
    for place in range(1, len(stream)):
        waiting = [asking(connection, ("CMD", number)) for number in range(len(STREAM))]
        await peer.heard_commands(len(STREAM))
        await say_in_parts(peer, connection, [stream[:place], stream[place:]])
        await check_stream(waiting)
        peer.heard.clear()


@hypothetically
@given(copies=st.integers(1, 4), places=st.lists(st.floats(0, 1), max_size=8))
async def test_replies_may_be_split_and_merged_in_any_way(
    meet: Meet, copies: int, places: list[float]
) -> None:
    """Packets begin and end where they like."""
    peer, connection = await meet()
    waiting = [asking(connection, ("CMD", number)) for number in range(copies * len(STREAM))]
    await peer.heard_commands(len(waiting))
    stream = PUSH.join(STREAM * copies)
    cuts = [0, *sorted(int(place * len(stream)) for place in places), len(stream)]
    await say_in_parts(peer, connection, [stream[a:b] for a, b in pairwise(cuts)])
    for first in range(0, len(waiting), len(STREAM)):
        await check_stream(waiting[first : first + len(STREAM)])


async def say_in_parts(peer: Peer, connection: Watched, parts: list[bytes]) -> None:
    """Say each part when the one before has been received: they are packets of their own."""
    for part in parts:
        if part:
            received = connection.received
            peer.say(part)
            while connection.received == received:
                await asyncio.sleep(0)


async def test_wherever_a_server_hangs_up_whole_replies_are_delivered_and_the_others_fail(
    listen: Any,
) -> None:
    """For every byte of the stream: nobody gets half a reply, and nobody that of another."""
    replies = [bulk(b"one"), b"*2\r\n:1\r\n" + bulk(b"two"), b"-ERR three\r\n", b"_\r\n"]
    stream, ends = b"".join(replies), [sum(map(len, replies[:number])) for number in range(1, 5)]
    peer, url = await listen(greeting())
    for place in range(len(stream)):
        async with connected(url) as connection:
            peer.heard.clear()
            waiting = [asking(connection, ("CMD", number)) for number in range(4)]
            await peer.heard_commands(4)
            peer.say(stream[:place])
            peer.connections[-1].close()
            results = await asyncio.gather(*waiting, return_exceptions=True)
        whole = sum(end <= place for end in ends)
        good = [[b"one"], [[1, b"two"]], "ERR three", [None]][:whole]
        assert [
            str(result[0]) if number == 2 else result
            for number, result in enumerate(results[:whole])
        ] == good
        assert all(isinstance(result, StoreUnavailable) for result in results[whole:])


async def test_a_connection_that_ends_in_mid_reply_fails_everybody_at_once(meet: Meet) -> None:
    """Half a reply is no reply; those behind it do not wait for their deadlines."""
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    waiting = [asking(connection, ("GET", number)) for number in range(3)]
    await peer.heard_commands(3)
    peer.say(b"$100\r\nhalf of it")
    peer.connections[-1].close()
    started = time.monotonic()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert time.monotonic() - started < LONG_S / 2
    assert all(isinstance(result, StoreUnavailable) for result in results)
    assert len(lost) == 1
    with pytest.raises(StoreUnavailable, match="closed by the server"):
        await connection.execute([("GET", "k")], deadline_s=LONG_S)


@pytest.mark.parametrize(
    "garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$abc\r\n", b"+OK\r\n+nobody asked\r\n"]
)
async def test_garbage_ends_the_connection(meet: Meet, garbage: bytes) -> None:
    """After something that is not understood, or that nobody asked for, no reply can be trusted to
    be the right one."""
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    waiting = asking(connection, ("GET", "k"))
    await peer.heard_commands(1)
    peer.say(garbage)
    await until(lambda: bool(lost))
    assert "not understood" in str(lost[0])
    await asyncio.gather(waiting, return_exceptions=True)


# -- deadlines and bounds --------------------------------------------------------------------------


async def test_silence_past_a_deadline_ends_the_connection_for_all(meet: Meet) -> None:
    """One caller pays its deadline; the others fail with it, not after theirs."""
    lost: list[StoreUnavailable] = []
    _, connection = await meet(lost)
    patient = asking(connection, ("GET", "patient"))
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await connection.execute([("GET", "k")], deadline_s=0.05)
    with pytest.raises(StoreUnavailable, match="silent for 50 ms"):
        await patient
    assert 0.04 < time.monotonic() - started < LONG_S / 2
    assert len(lost) == 1


async def test_a_busy_event_loop_does_not_condemn_a_live_server(meet: Meet) -> None:
    """The deadline passed while our own loop was busy, and the reply lies in the socket: it is read
    before judging."""
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    waiting = asking(connection, ("GET", "k"), deadline_s=0.5)
    await peer.heard_commands(1)
    peer.say(bulk(b"v"))  # written to the socket at once: it is in our kernel before we block
    time.sleep(0.6)  # noqa: ASYNC251
    assert await waiting == [b"v"]
    assert (lost, connection.timeouts) == ([], 0)


class Blocking(asyncio.Protocol):
    """A peer in our own loop that answers a command and then blocks the loop past the deadline, in
    the phase of reading."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"persistence\r\n"):
            self.transport.write(greeting())
        else:
            self.transport.write(bulk(b"v"))
            time.sleep(0.6)


async def test_timers_that_run_before_sockets_are_read_condemn_nobody() -> None:
    """uvloop then runs the deadline before it reads the reply that has arrived; one more tick reads
    it."""
    lost: list[StoreUnavailable] = []
    server = await asyncio.get_running_loop().create_server(Blocking, "127.0.0.1", 0)
    url = ServerURL("127.0.0.1", server.sockets[0].getsockname()[1])
    connection = await Watched.open(
        url, deadline_s=LONG_S, on_lost=lambda _, cause: lost.append(cause)
    )
    try:
        assert await connection.execute([("GET", "k")], deadline_s=0.5) == [b"v"]
        assert (lost, connection.timeouts) == ([], 0)
    finally:
        connection.abort(StoreUnavailable("end of the test"))
        await connection.wait_closed()
        server.close()


async def test_a_tick_that_is_kept_busy_does_not_use_up_the_deadline(listen: Any) -> None:
    """The deadline begins when the command leaves: a server that answers in less has all of it."""
    peer, url = await listen(greeting())
    async with connected(url) as connection:
        waiting = connection.request([("GET", "k")], deadline_s=0.5)
        # the stimulus: the rest of the tick takes longer than the deadline
        time.sleep(0.6)  # noqa: ASYNC251
        await peer.heard_commands(1)
        peer.say(bulk(b"v"))
        assert await waiting == [b"v"]
        assert connection.timeouts == 0


async def failed_after(waiting: "asyncio.Future[list[Any]]") -> float:
    """Wait for a request to miss its deadline; return after how many seconds that was."""
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="no reply within"):
        await asyncio.wait_for(waiting, LONG_S)
    return time.monotonic() - started


@pytest.mark.parametrize("order", [(LONG_S, 0.2), (0.2, LONG_S), (0.2, LONG_S, 0.1, 0.4)])
async def test_each_deadline_is_kept_whatever_the_others_are(
    meet: Meet, order: tuple[float, ...]
) -> None:
    """A short one behind a long one, and the other way round; the patient get their replies."""
    peer, connection = await meet()
    waiting = [
        connection.request([("GET", deadline_s)], deadline_s=deadline_s) for deadline_s in order
    ]
    await peer.heard_commands(len(order))
    peer.say(PUSH)  # not silent
    short = [
        (deadline_s, future)
        for deadline_s, future in zip(order, waiting, strict=True)
        if deadline_s < LONG_S
    ]
    took = await asyncio.gather(*(failed_after(future) for _, future in short))
    for (deadline_s, _), after_s in zip(short, took, strict=True):
        assert deadline_s * 0.8 < after_s < LONG_S
    peer.say(b"".join(bulk(str(deadline_s).encode()) for deadline_s in order))
    assert await waiting[order.index(LONG_S)] == [str(LONG_S).encode()]
    assert connection.timeouts == len(short)


@hypothetically
@given(
    plan=st.lists(
        st.tuples(st.sampled_from([0.02, 0.05, LONG_S]), st.booleans()), min_size=1, max_size=12
    ),
    share=st.floats(0, 1),
)
async def test_some_run_out_of_time_while_others_go_on(
    listen: Any, plan: list[tuple[float, bool]], share: float
) -> None:
    """Any mixture of deadlines, in one tick or several: who is answered in time has the answer, and
    no one that of another."""
    peer, url = await listen(greeting())
    async with connected(url) as connection:
        waiting, replies, answered = (
            [],
            [bulk(b"%d" % number) for number in range(len(plan))],
            int(share * len(plan)),
        )
        for number, (deadline_s, pause) in enumerate(plan):
            waiting.append(
                connection.request(
                    [("GET", number)], deadline_s=deadline_s if number >= answered else LONG_S
                )
            )
            if pause:
                await asyncio.sleep(0)
        await peer.heard_commands(len(plan))
        peer.say(PUSH + b"".join(replies[:answered]))
        short = [
            future
            for (deadline_s, _), future in zip(plan[answered:], waiting[answered:], strict=True)
            if deadline_s < LONG_S
        ]
        if len(short) < connection_module.MAX_LATE_IN_A_ROW:
            for future in short:
                await failed_after(future)
            peer.say(b"".join(replies[answered:]))
        results = await asyncio.gather(*waiting, return_exceptions=True)
    for number, (future, result) in enumerate(zip(waiting, results, strict=True)):
        if len(short) < connection_module.MAX_LATE_IN_A_ROW or number < answered:
            assert (
                isinstance(result, StoreUnavailable)
                if future in short
                else result == [b"%d" % number]
            )


async def test_deadlines_cost_one_timer_an_interval_and_none_when_idle(
    real: Watched, timers: list[asyncio.TimerHandle]
) -> None:
    """However many commands there are."""
    before, started = len(timers), time.monotonic()
    for _ in range(100):
        await asyncio.gather(
            *(asking(real, ("ECHO", number), deadline_s=1.0) for number in range(10))
        )
    intervals = time.monotonic() - started
    assert 1 <= len(timers) - before <= intervals + 2
    await until(lambda: all(map(over, timers)))
    set_so_far = len(timers)
    await asyncio.sleep(0.15)
    assert len(timers) == set_so_far


async def test_deadlines_that_pass_one_after_another_are_looked_at_together(
    meet: Meet, monkeypatch: pytest.MonkeyPatch, timers: list[asyncio.TimerHandle]
) -> None:
    """A queue of thousands is not looked through once for each of them."""
    monkeypatch.setattr(connection_module, "MAX_LATE_IN_A_ROW", 1000)
    peer, connection = await meet()
    before = len(timers)
    waiting = [
        connection.request([("GET", number)], deadline_s=0.3 + number / 1000)
        for number in range(60)
    ]
    await peer.heard_commands(60)
    peer.say(PUSH)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, StoreUnavailable) for result in results)
    assert connection.timeouts == 60
    assert len(timers) - before < 45  # a hundred and twenty otherwise


async def test_a_write_that_fails_leaves_nobody_waiting_for_ever(meet: Meet) -> None:
    """An event loop's transport may raise, uvloop's does when it has been closed: the deadline
    still holds."""
    _, connection = await meet()
    loop, failures = asyncio.get_running_loop(), []
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
    connection.transport.calls = None  # type: ignore[assignment] # noting fails
    try:
        with pytest.raises(StoreUnavailable):
            await asyncio.wait_for(connection.execute([("GET", "k")], deadline_s=0.03), LONG_S)
    finally:
        loop.set_exception_handler(handler)
    assert [type(failure) for failure in failures] == [AttributeError]


async def test_a_connection_that_ended_leaves_no_timer(
    meet: Meet, timers: list[asyncio.TimerHandle]
) -> None:
    """It would keep the connection alive for no purpose."""
    _, connection = await meet()
    waiting = asking(connection, ("GET", "k"))
    await until(lambda: not all(map(over, timers)))
    connection.abort(StoreUnavailable("the end"))
    assert all(timer.cancelled() for timer in timers)
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_server_that_answers_always_too_late_is_dropped(
    meet: Meet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never silent, but each caller would pay the deadline."""
    monkeypatch.setattr(connection_module, "MAX_LATE_IN_A_ROW", 3)
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    for number in range(3):
        waiting = asking(connection, ("GET", number), deadline_s=0.2)
        await peer.heard_commands(number + 1)
        peer.say(PUSH)
        with pytest.raises(StoreUnavailable, match="no reply within"):
            await waiting
    assert "3 replies in a row" in str(lost[0])


async def test_a_timely_reply_ends_the_row_of_late_ones(
    meet: Meet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some slow commands among good ones do not cost the connection."""
    monkeypatch.setattr(connection_module, "MAX_LATE_IN_A_ROW", 2)
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    for number in range(4):
        late = asking(connection, ("GET", number), deadline_s=0.2)
        await peer.heard_commands(2 * number + 1)
        peer.say(PUSH)
        await asyncio.gather(late, return_exceptions=True)
        good = asking(connection, ("GET", number))
        await peer.heard_commands(2 * number + 2)
        peer.say(bulk(b"late") + bulk(b"good"))
        assert await good == [b"good"]
    assert lost == []
    assert connection.timeouts == 4


async def test_callers_beyond_the_bound_of_waiting_commands_are_refused_at_once(
    meet: Meet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound counts commands, and those who wait keep their places."""
    monkeypatch.setattr(connection_module, "MAX_WAITING", 5)
    peer, connection = await meet()
    waiting = asking(connection, *[("GET", number) for number in range(4)])
    await peer.heard_commands(4)
    with pytest.raises(StoreUnavailable, match="too many"):
        connection.send([("GET", 4), ("GET", 5)])
    peer.say(bulk(b"v") * 4)
    assert await waiting == [b"v"] * 4
    connection.send([("GET", number) for number in range(5)])


async def test_the_bounds_hold_within_a_tick(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not been written yet counts, commands and bytes; when it has left there is room
    again."""
    monkeypatch.setattr(connection_module, "MAX_UNSENT_BYTES", 1000)
    peer, connection = await meet()
    for sent in (2, 4):
        connection.send([("SET", "k", b"x" * 600)])
        connection.send([("SET", "k", b"x" * 600)])
        with pytest.raises(StoreUnavailable, match="too many"):
            connection.request([("GET", "k")], deadline_s=LONG_S)
        await peer.heard_commands(sent)
    monkeypatch.setattr(connection_module, "MAX_WAITING", 5)
    connection.send([("GET", "k")])
    with pytest.raises(StoreUnavailable, match="too many"):
        connection.send([("GET", "k")])


async def test_a_server_that_does_not_read_cannot_fill_our_memory(
    meet: Meet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound of unsent bytes callers are refused at once."""
    monkeypatch.setattr(connection_module, "MAX_UNSENT_BYTES", 1_000_000)
    peer, connection = await meet()
    peer.connections[-1].transport.pause_reading()  # type: ignore[attr-defined]
    accepted = 0
    with pytest.raises(StoreUnavailable, match="too many"):  # noqa: PT012 - the kernel decides how much fits
        while accepted < 100:
            connection.send([("SET", "k", b"x" * 1_000_000)])
            accepted += 1
    assert 0 < accepted < 100


# -- replies that end a connection -----------------------------------------------------------------


@pytest.mark.parametrize(
    "reply", [b"-LOADING wait\r\n", b"-READONLY no\r\n", b"-MASTERDOWN no\r\n", b"-NOAUTH no\r\n"]
)
async def test_a_reply_that_says_the_server_cannot_serve_ends_the_connection(
    meet: Meet, reply: bytes
) -> None:
    """Its caller gets the reply; then the connection is over."""
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    waiting = asking(connection, ("GET", "k"))
    await peer.heard_commands(1)
    peer.say(reply)
    assert isinstance((await waiting)[0], hiredis.ReplyError)
    await until(lambda: bool(lost))
    assert isinstance(lost[0], HandshakeRefused)


@pytest.mark.parametrize(
    "reply",
    [b"-OOM command not allowed\r\n", b"-NOPERM no\r\n", b"-ERR what\r\n", b"-BUSY script\r\n"],
)
async def test_other_errors_are_just_replies(meet: Meet, reply: bytes) -> None:
    """A full or strict server still answers the next command."""
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    for number in range(2):
        waiting = asking(connection, ("GET", number))
        await peer.heard_commands(number + 1)
        peer.say(reply)
        assert isinstance((await waiting)[0], hiredis.ReplyError)
    assert (lost, connection.errors) == ([], 2)


async def test_a_full_server_refuses_writes_and_goes_on_answering(
    make_valkey: Callable[..., EmbeddedValkey],
) -> None:
    """OOM of a real Valkey: the writers get it, in their places, and the readers beside them what
    they asked for."""
    server = make_valkey(maxmemory="1mb", maxmemory_policy="noeviction")
    async with connected(ServerURL.parse(server.url)) as connection:
        await connection.execute([("SET", "fill", b"x" * 2_000_000)], deadline_s=LONG_S)
        waiting = [
            asking(connection, ("ECHO", n), ("SET", "k", b"x" * 10_000), ("ECHO", n))
            for n in range(20)
        ]
        for number, (before, error, after) in enumerate(await asyncio.gather(*waiting)):
            assert (before, str(error)[:3], after) == (b"%d" % number, "OOM", b"%d" % number)


# -- push messages ---------------------------------------------------------------------------------

CONFIRMED = b">3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n"
NOPERM = b"-NOPERM no\r\n"
PONG = b"+PONG\r\n"


def message(payload: bytes, channel: bytes = b"news") -> bytes:
    return b">3\r\n" + bulk(b"message") + bulk(channel) + bulk(payload)


def publish(url: str, *messages: str, channel: str = "news") -> None:
    with redis.Redis.from_url(url) as client:
        for text in messages:
            client.publish(channel, text)


async def test_messages_are_heard_between_the_replies_of_others(
    real: Watched, valkey_url: str
) -> None:
    """A real server: those of the channel, in their order, each once, and no reply is shifted."""
    heard: list[bytes] = []
    asked = real.subscribe("news", heard.append, deadline_s=LONG_S)
    assert not real.listening
    assert await asked == [b"PONG"]
    assert real.listening
    texts = [f"message {number}" for number in range(200)]
    publishing = asyncio.get_running_loop().run_in_executor(
        None, lambda: publish(valkey_url, *texts)
    )
    while not publishing.done():
        results = await asyncio.gather(*(asking(real, ("ECHO", number)) for number in range(20)))
        assert results == [[b"%d" % number] for number in range(20)]
    publish(valkey_url, "not ours", channel="other")
    await until(lambda: len(heard) >= 200)
    assert heard == [text.encode() for text in texts]


@hypothetically
@given(
    refused=st.booleans(),
    unable=st.booleans(),
    stream=st.lists(st.booleans(), max_size=20),
    place=st.floats(0, 1),
)
async def test_a_subscription_never_shifts_replies(
    listen: Any, refused: bool, unable: bool, stream: list[bool], place: float
) -> None:
    """Confirmed or refused, PING allowed or not, messages anywhere: everybody has his own, and
    messages come before what was said after them."""
    peer, url = await listen(greeting())
    async with connected(url) as connection:
        order: list[str] = []
        replies, first = stream.count(True), int(place * stream.count(True))
        waiting = []
        for number in range(replies + 1):
            if number == first:
                asked = connection.subscribe(
                    "news", lambda text: order.append(text.decode()), deadline_s=LONG_S
                )
            if number < replies:
                waiting.append(connection.request([("GET", number)], deadline_s=LONG_S))
                waiting[-1].add_done_callback(lambda done: order.append(done.result()[0].decode()))
        await peer.heard_commands(replies + 2)
        said, number = [], 0
        answer = (NOPERM if refused else CONFIRMED) + (NOPERM if unable else PONG)
        for position, is_reply in enumerate(stream):
            if is_reply and number == first:
                said.append(answer)
            said.append(bulk(b"%d" % number) if is_reply else message(b"m%d" % position))
            number += is_reply
        peer.say(b"".join(said if number > first else [*said, answer]))
        assert await asyncio.gather(*waiting) == [[b"%d" % number] for number in range(replies)]
        assert len(await asked) == 1 + refused
        assert connection.listening is not refused
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(connection_module, "MAX_WAITING", 1)
            connection.send([("GET", "nothing else waits")])
    positions = {text: place for place, text in enumerate(order)}
    number = 0
    for position, is_reply in enumerate(stream):
        if not is_reply:
            assert all(
                positions[f"m{position}"] < positions[str(later)]
                for later in range(number, replies)
            )
        number += is_reply


@pytest.mark.parametrize(
    "error", [ValueError("mine"), IndexError("mine"), asyncio.CancelledError("mine")]
)
async def test_a_listener_that_fails_is_logged_and_costs_nobody_a_reply(
    meet: Meet, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """The replies behind the message are still delivered, and the next message is heard."""
    peer, connection = await meet()
    heard: list[bytes] = []

    def hear(text: bytes) -> None:
        heard.append(text)
        raise error

    asked, waiting = (
        connection.subscribe("news", hear, deadline_s=LONG_S),
        asking(connection, ("GET", "k")),
    )
    await peer.heard_commands(3)
    peer.say(CONFIRMED + message(b"a") + PONG + message(b"b") + bulk(b"v"))
    assert await waiting == [b"v"]
    assert await asked == [b"PONG"]
    assert heard == [b"a", b"b"]
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [error, error]


async def test_nothing_is_heard_after_the_end(meet: Meet) -> None:
    """Not even what came in the same packet as the message that made the listener end it."""
    peer, connection = await meet()
    heard: list[bytes] = []

    def hear(text: bytes) -> None:
        heard.append(text)
        connection.abort(StoreUnavailable("enough"))

    asked = connection.subscribe("news", hear, deadline_s=LONG_S)
    await peer.heard_commands(2)
    peer.say(CONFIRMED + PONG + message(b"a") + message(b"b"))
    await connection.wait_closed()
    assert (await asked, heard) == ([b"PONG"], [b"a"])


@pytest.mark.parametrize(
    "said",
    [
        CONFIRMED,
        bulk(b"v") + PONG + CONFIRMED,
        bulk(b"v") + CONFIRMED * 2,
        bulk(b"v") + NOPERM + CONFIRMED,
    ],
)
async def test_a_confirmation_out_of_place_ends_the_connection(meet: Meet, said: bytes) -> None:
    """Early, late, twice, or after a refusal: after it, no reply could be trusted to be the right
    one."""
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    waiting = [asking(connection, ("GET", "k"))]
    await asyncio.sleep(0)
    waiting += [
        connection.subscribe("news", lambda _: None, deadline_s=LONG_S),
        asking(connection, ("GET", "l")),
    ]
    await peer.heard_commands(4)
    peer.say(said)
    await until(lambda: bool(lost))
    assert "not understood" in str(lost[0])
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[-1], StoreUnavailable)


async def test_a_late_confirmation_is_still_taken_in_its_place(meet: Meet) -> None:
    """Whoever asked has given up; the batch has not."""
    peer, connection = await meet()
    asked = connection.subscribe("news", lambda _: None, deadline_s=0.3)
    await peer.heard_commands(2)
    peer.say(PUSH)
    await failed_after(asked)
    waiting = asking(connection, ("GET", "k"))
    await peer.heard_commands(3)
    peer.say(CONFIRMED + PONG + bulk(b"v"))
    assert await waiting == [b"v"]
    assert connection.listening


# -- ways to a server ------------------------------------------------------------------------------


def allow(server: EmbeddedValkey, *rules: str) -> ServerURL:
    """Make a user, and return how to log in as that."""
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "ann", "reset", "on", ">p@:w", *rules)
    return ServerURL.parse(f"redis://ann:p%40%3Aw@127.0.0.1:{server.port}/0")


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """A Valkey whose users a test may change, with a Unix socket too."""
    # a path of a Unix socket has at most 107 bytes
    server = EmbeddedValkey(
        tmp_path_factory.mktemp("v"),
        settings={"unixsocket": "valkey.sock", "unixsocketperm": "700"},
    )
    try:
        yield server.start()
    finally:
        server.stop()


async def test_a_user_needs_no_more_than_the_handshake_and_what_it_asks(
    strict_server: EmbeddedValkey,
) -> None:
    """An ACL user logs in with its own password; what it may not do is an error in its place."""
    url = allow(strict_server, "~tenant:*", "+select", "+info", "+get", "+acl|whoami")
    async with connected(url) as connection:
        commands = [("ACL", "WHOAMI"), ("GET", "other"), ("FLUSHALL",), ("GET", "tenant:a")]
        who, foreign, forbidden, own = await connection.execute(commands, deadline_s=LONG_S)
    assert (who, own) == (b"ann", None)
    assert str(foreign).startswith("NOPERM")
    assert str(forbidden).startswith("NOPERM")


async def test_a_user_who_may_not_do_the_handshake_is_refused_with_the_reason(
    strict_server: EmbeddedValkey,
) -> None:
    """The message names the command."""
    url = allow(strict_server, "~*", "+@all", "-info")
    with pytest.raises(HandshakeRefused, match=r"NOPERM .*'info") as error:
        await Watched.open(url, deadline_s=LONG_S, on_lost=lambda _, __: None)
    assert "p@:w" not in str(error.value)


@pytest.mark.parametrize(
    ("rules", "listens", "count"),
    [
        (("+@all", "&news"), True, 1),
        (("+@all", "&other"), False, 2),
        (("+@all", "&*", "-subscribe"), False, 2),
        (("+@all", "&news", "-ping"), True, 1),
        (("+@all", "-ping"), False, 2),
    ],
)
async def test_what_a_real_server_answers_to_a_subscription_shifts_nothing(
    strict_server: EmbeddedValkey, rules: tuple[str, ...], listens: bool, count: int
) -> None:
    """A refusal is an ordinary error and takes a place, a confirmation is a push and takes none;
    PING may be refused too."""
    async with connected(allow(strict_server, "~*", *rules)) as connection:
        before = asking(connection, ("ECHO", "before"))
        await asyncio.sleep(0)
        asked = connection.subscribe("news", lambda _: None, deadline_s=LONG_S)
        after = [asking(connection, ("ECHO", number)) for number in range(3)]
        assert await before == [b"before"]
        assert [await task for task in after] == [[b"%d" % number] for number in range(3)]
        assert (connection.listening, len(await asked)) == (listens, count)


async def test_a_unix_socket_serves_as_well(strict_server: EmbeddedValkey) -> None:
    """With password and database; without a server behind the path it is unavailable."""
    path = strict_server.directory / "valkey.sock"
    url = ServerURL.parse(f"unix://:{strict_server.password}@{path}?db=3")
    async with connected(url) as connection:
        replies = await connection.execute(
            [("SET", "k", "v"), ("CLIENT", "INFO")], deadline_s=LONG_S
        )
    assert replies[0] == b"OK"
    assert " db=3 " in connection_module.as_text(replies[1])
    assert " flags=U " in connection_module.as_text(replies[1])
    for missing in ("no.sock", "x" * 200):
        with pytest.raises(StoreUnavailable):
            await Watched.open(
                ServerURL.parse(f"unix://{path.parent}/{missing}"),
                deadline_s=LONG_S,
                on_lost=lambda _, __: None,
            )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two self-signed certificates, of a server on 127.0.0.1 and of a client, and an encrypted
    key."""
    needs.require(needs.OPENSSL)
    folder = tmp_path_factory.mktemp("certificates")
    for name, extension in (
        ("server", "subjectAltName=IP:127.0.0.1"),
        ("client", "subjectAltName=DNS:client"),
    ):
        command = (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj "
            "/CN=respcache-test"
        )
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-addext", extension]
        subprocess.run([*command.split(), *files], cwd=folder, check=True, capture_output=True)
    encrypt = "openssl pkey -in client.key -aes256 -passout pass:secret -out encrypted.key"
    subprocess.run(encrypt.split(), cwd=folder, check=True, capture_output=True)
    return folder


class TLSRedis(EmbeddedServer):
    """A Redis that speaks TLS itself, and wants a client's certificate."""

    name = "redis"

    def start(self, certificates: Path) -> "TLSRedis":
        options = [
            "--port",
            "0",
            "--tls-port",
            str(self.port),
            "--save",
            "",
            "--requirepass",
            "secret",
        ]
        options += [
            "--tls-cert-file",
            str(certificates / "server.pem"),
            "--tls-key-file",
            str(certificates / "server.key"),
        ]
        options += ["--tls-ca-cert-file", str(certificates / "client.pem")]
        with self.log_path.open("ab") as log:
            self._spawn(["redis-server", *options], log=log)
        self._await(self._accepts)
        return self

    def _accepts(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
async def tls_proxy(strict_server: EmbeddedValkey, certificates: Path) -> AsyncIterator[str]:
    """A proxy that ends TLS in front of a real Valkey, as the wheel's is built without; it wants a
    client's certificate."""
    context = ssl.create_default_context(
        ssl.Purpose.CLIENT_AUTH, cafile=certificates / "client.pem"
    )
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    writers: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", strict_server.port)
        writers.extend((writer, inner_writer))
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield f"rediss://:{strict_server.password}@127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    server.close()
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0.01)


@pytest.fixture
def tls_redis(certificates: Path, tmp_path: Path) -> Iterator[str]:
    """A Redis with TLS, where one is installed."""
    needs.require(needs.REDIS_SERVER)
    server = TLSRedis(tmp_path, port=None)
    try:
        server.start(certificates)
        yield f"rediss://:secret@127.0.0.1:{server.port}/0"
    finally:
        server.stop()


@pytest.fixture(params=["tls_proxy", "tls_redis"])
def tls_url(request: pytest.FixtureRequest) -> str:
    """Where TLS is spoken. Whoever connects must show the client's certificate."""
    url: str = request.getfixturevalue(request.param)
    return url


def trusting(url: str, certificates: Path, more: str = "") -> ServerURL:
    client = f"ssl_certfile={certificates}/client.pem&ssl_keyfile={certificates}/client.key"
    return ServerURL.parse(f"{url}?ssl_ca_certs={certificates}/server.pem&{client}{more}")


async def test_over_tls_replies_come_as_they_do_without(tls_url: str, certificates: Path) -> None:
    """Small and large ones, from many callers; the certificate and the name are verified, and the
    client's shown."""
    async with connected(trusting(tls_url, certificates)) as connection:
        writes, texts = (
            writes_of(connection),
            [b"%d" % n * random.Random(n).randint(1, 50_000) for n in range(30)],
        )
        waiting = [asking(connection, ("ECHO", text)) for text in texts]
        assert await asyncio.gather(*waiting) == [[text] for text in texts]
        assert len(writes) == 1


async def test_a_certificate_that_nobody_vouches_for_is_refused(
    tls_url: str, certificates: Path
) -> None:
    """By default: only ``ssl_cert_reqs=none`` takes any."""
    with pytest.raises(HandshakeRefused, match="self-signed certificate"):
        await Watched.open(ServerURL.parse(tls_url), deadline_s=LONG_S, on_lost=lambda _, __: None)
    client = f"ssl_certfile={certificates}/client.pem&ssl_keyfile={certificates}/client.key"
    async with connected(ServerURL.parse(f"{tls_url}?ssl_cert_reqs=none&{client}")) as connection:
        assert await connection.execute([("ECHO", "a")], deadline_s=LONG_S) == [b"a"]


async def test_a_certificate_for_another_name_is_refused(tls_url: str, certificates: Path) -> None:
    """The server is trusted, and is not the one that the URL names."""
    url = trusting(tls_url.replace("127.0.0.1", "localhost"), certificates)
    with pytest.raises(HandshakeRefused, match="not valid for 'localhost'"):
        await Watched.open(url, deadline_s=LONG_S, on_lost=lambda _, __: None)


async def test_a_client_without_its_certificate_is_not_let_in(
    tls_url: str, certificates: Path
) -> None:
    """The server ends the connection; that is no reply, and no hang."""
    url = ServerURL.parse(f"{tls_url}?ssl_ca_certs={certificates}/server.pem")
    with pytest.raises(StoreUnavailable):
        await Watched.open(url, deadline_s=LONG_S, on_lost=lambda _, __: None)


async def test_tls_to_a_server_without_it_and_the_other_way_round_is_unavailable(
    tls_url: str, strict_server: EmbeddedValkey
) -> None:
    """Neither hangs past its deadline."""
    plain = ServerURL.parse(
        strict_server.url.replace("redis://", "rediss://") + "?ssl_cert_reqs=none"
    )
    for url in (plain, ServerURL.parse(tls_url.replace("rediss://", "redis://"))):
        with pytest.raises(StoreUnavailable):
            await Watched.open(url, deadline_s=0.5, on_lost=lambda _, __: None)


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(
    certificates: Path,
) -> None:
    """OpenSSL would ask on the terminal of the server process, and wait."""
    files = f"ssl_certfile={certificates}/client.pem&ssl_keyfile={certificates}/encrypted.key"
    url = f"rediss://h?{files}"
    program = f"import sys; from respcache.resp.url import ServerURL; ServerURL.parse({url!r})"
    ours, terminal = pty.openpty()
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # else it has no terminal to ask on
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            timeout=20,
        )
    finally:
        os.close(ours)
        os.close(terminal)
    assert b"ConfigurationError" in ended.stderr
    assert b"cannot be read (ssl_certfile=" in ended.stderr
