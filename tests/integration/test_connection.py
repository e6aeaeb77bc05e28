"""One connection: replies reach those who asked, whatever is cancelled, late, split, cut or garbled. On both event loops."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import hiredis
import pytest

from respcache.core.errors import StoreUnavailable
from respcache.resp import connection as connection_module
from respcache.resp.connection import Connection, Refused
from respcache.resp.url import ServerURL

pytestmark = pytest.mark.anyio

REPLICATION = b"role:master\r\nmaster_replid:aaaabbbbccccdddd\r\n"
PERSISTENCE = b"loading:0\r\n"
LONG_S = 5.0


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """uvloop orders timers and sockets differently."""
    return "asyncio", {"use_uvloop": request.param}


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


class Peer:
    """The other end of a socket, played by the test: it shakes hands as told, and then says exactly what the test says."""

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


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.002)


Meet = Callable[..., Awaitable[tuple[Peer, Connection]]]


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
    opened: list[Connection] = []

    async def connect(lost: list[StoreUnavailable] | None = None) -> tuple[Peer, Connection]:
        peer, url = await listen(greeting())
        ends = [] if lost is None else lost
        connection = await Connection.open(url, deadline_s=LONG_S, lost=lambda _, cause: ends.append(cause))
        opened.append(connection)
        return peer, connection

    yield connect
    for connection in opened:
        connection.abort(StoreUnavailable("end of the test"))
        await connection.wait_closed()


@pytest.fixture
async def real(valkey_url: str) -> AsyncIterator[Connection]:
    """A connection to a real server."""
    connection = await Connection.open(ServerURL.parse(valkey_url), deadline_s=LONG_S, lost=lambda _, __: None)
    yield connection
    connection.abort(StoreUnavailable("end of the test"))
    await connection.wait_closed()


def asking(connection: Connection, *commands: tuple[Any, ...], deadline_s: float = LONG_S) -> "asyncio.Task[list[Any]]":
    return asyncio.create_task(connection.execute(commands, deadline_s=deadline_s))


# -- handshake -------------------------------------------------------------------------------------------------------------


async def test_the_handshake_learns_the_identity_and_names_the_connection(real: Connection) -> None:
    """RESP3, the client's name, and the server's own replication id."""
    info, client = await real.execute([("INFO", "replication"), ("CLIENT", "INFO")], deadline_s=LONG_S)
    assert f"master_replid:{real.identity}\r\n" in connection_module.as_text(info)
    assert "name=respcache " in connection_module.as_text(client)
    assert "resp=3" in connection_module.as_text(client)


async def test_the_database_of_the_url_is_selected(valkey_url: str) -> None:
    """A key written over a connection to database 3 is not in database 0."""
    url = ServerURL.parse(valkey_url.removesuffix("/0") + "/3")
    connection = await Connection.open(url, deadline_s=LONG_S, lost=lambda _, __: None)
    try:
        replies = await connection.execute([("SET", "k", "v"), ("SELECT", 0), ("EXISTS", "k")], deadline_s=LONG_S)
        assert replies == [b"OK", b"OK", 0]
    finally:
        connection.abort(StoreUnavailable("end of the test"))
        await connection.wait_closed()


async def test_a_wrong_password_is_a_refusal_that_does_not_repeat_it(valkey_url: str) -> None:
    """The caller learns WRONGPASS, nobody learns what was tried."""
    good = ServerURL.parse(valkey_url)
    url = ServerURL(good.host, good.port, 0, None, "not-the-password")
    with pytest.raises(Refused, match="WRONGPASS") as error:
        await Connection.open(url, deadline_s=LONG_S, lost=lambda _, __: None)
    assert "not-the-password" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (greeting(b"role:slave\r\nmaster_replid:abc\r\n"), "role is slave"),
        (greeting(b"role:master\r\n"), "not master"),
        (greeting(b"nonsense"), "role is None"),
        (greeting(persistence=b"loading:1\r\n"), "loading"),
        (
            b"-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `default`, `pw`\r\n" * 4,
            "unknown command `HELLO`$",
        ),
        (b"-ERR max number of clients reached\r\n", "max number of clients"),
        (b"-LOADING the dataset\r\n" * 4, "LOADING"),
        (b"-NOAUTH HELLO must be called\r\n" * 4, "NOAUTH"),
    ],
)
async def test_servers_that_cannot_serve_us_are_refused(listen: Any, answer: bytes, message: str) -> None:
    """A replica, a server that loads its data, one without RESP3, one without room: no connection, and a reason."""
    _, url = await listen(answer)
    with pytest.raises(Refused, match=message) as error:
        await Connection.open(url, deadline_s=LONG_S, lost=lambda _, __: None)
    assert "`pw`" not in str(error.value)


async def test_a_server_that_accepts_and_says_nothing_costs_one_connect_deadline(listen: Any) -> None:
    """The handshake has a deadline of its own."""
    _, url = await listen(None)
    with pytest.raises(StoreUnavailable, match=r"no answer within 0\.05 s|silent|no reply"):
        await Connection.open(url, deadline_s=0.05, lost=lambda _, __: None)


@pytest.mark.parametrize("host", ["127.0.0.1", "a" * 70 + ".invalid"])
async def test_an_address_without_a_server_is_unavailable(host: str, unused_port: int) -> None:
    """Nobody listens, or the name cannot exist: the same error as for a dead server."""
    with pytest.raises(StoreUnavailable):
        await Connection.open(ServerURL(host, unused_port), deadline_s=LONG_S, lost=lambda _, __: None)


@pytest.fixture
async def unused_port() -> int:
    """A port where somebody listened a moment ago."""
    server = await asyncio.start_server(lambda _, __: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    return port


# -- whose reply it is -----------------------------------------------------------------------------------------------------


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
    late = asking(connection, ("GET", "a"), ("GET", "late"), deadline_s=0.03)
    patient = asking(connection, ("GET", "patient"))
    await peer.heard_commands(3)
    peer.say(bulk(b"a"))  # the link is alive, only one reply is missing
    with pytest.raises(StoreUnavailable, match="no reply within 30 ms"):
        await late
    peer.say(bulk(b"late") + bulk(b"patient"))
    assert await patient == [b"patient"]
    assert connection.timeouts == 1


async def test_a_storm_of_cancelled_commands_mixes_nothing_up(real: Connection) -> None:
    """Seeded: 600 batches on a real server, a third of them cancelled at any stage; each survivor has its own replies."""
    rng = random.Random(7)
    for _ in range(6):
        batches = [[f"{rng.random()}".encode() * rng.randint(1, 500) for _ in range(rng.randint(1, 4))] for _ in range(100)]
        tasks = [asking(real, *[("ECHO", text) for text in batch]) for batch in batches]
        for task in rng.sample(tasks, 33):
            asyncio.get_running_loop().call_later(rng.random() * 0.01, task.cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for batch, result in zip(batches, results, strict=True):
            assert isinstance(result, asyncio.CancelledError) or result == batch
        assert sum(isinstance(result, list) for result in results) >= 67
    assert await real.execute([("ECHO", "last")], deadline_s=LONG_S) == [b"last"]


async def test_commands_that_cannot_be_written_take_no_place_in_the_queue(real: Connection) -> None:
    """A command that fails to be packed raises, and the next caller still gets its own reply."""
    with pytest.raises(TypeError):
        await real.execute([("ECHO", "a"), ("ECHO", object())], deadline_s=LONG_S)  # type: ignore[list-item]
    with pytest.raises(UnicodeEncodeError):
        await real.execute([("ECHO", "\ud800")], deadline_s=LONG_S)
    assert await real.execute([("ECHO", "b")], deadline_s=LONG_S) == [b"b"]


async def test_an_empty_batch_asks_nothing_and_takes_no_place(real: Connection) -> None:
    """It is answered at once."""
    assert await real.execute([], deadline_s=LONG_S) == []
    real.send([])
    assert await real.execute([("ECHO", "b")], deadline_s=LONG_S) == [b"b"]


async def test_nobody_waits_for_what_is_sent_and_its_errors_are_counted(real: Connection) -> None:
    """The replies are consumed by the batch that nobody waits for."""
    real.send([("SET", "k", "v"), ("HGET", "k", "field")])
    assert await real.execute([("GET", "k")], deadline_s=LONG_S) == [b"v"]
    assert real.errors == 1


async def test_an_error_stands_in_its_place_among_the_replies(real: Connection) -> None:
    """It is returned, not raised: the other replies of the batch are good."""
    replies = await real.execute([("ECHO", "a"), ("NOSUCH",), ("ECHO", "c")], deadline_s=LONG_S)
    assert (replies[0], replies[2]) == (b"a", b"c")
    assert isinstance(replies[1], hiredis.ReplyError)


# -- bytes -----------------------------------------------------------------------------------------------------------------

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
    (one,), (two,), (error,), (nothing,), (false,), (mapping,), (verbatim,) = [await task for task in waiting]
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
        received = connection._received
        peer.say(bytes([byte]))
        await until(lambda received=received: connection._received > received)
    await check_stream(waiting)


async def test_all_replies_may_come_in_one_packet(meet: Meet) -> None:
    """And they still go to those who asked."""
    peer, connection = await meet()
    waiting = [asking(connection, ("CMD", number)) for number in range(len(STREAM))]
    await peer.heard_commands(len(STREAM))
    peer.say(PUSH.join(STREAM))
    await check_stream(waiting)


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


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$abc\r\n", b"+OK\r\n+nobody asked\r\n"])
async def test_garbage_ends_the_connection(meet: Meet, garbage: bytes) -> None:
    """After something that is not understood, or that nobody asked for, no reply can be trusted to be the right one."""
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    waiting = asking(connection, ("GET", "k"))
    await peer.heard_commands(1)
    peer.say(garbage)
    await until(lambda: bool(lost))
    assert "not understood" in str(lost[0])
    await asyncio.gather(waiting, return_exceptions=True)


# -- deadlines and bounds --------------------------------------------------------------------------------------------------


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
    """The deadline passed while our own loop was busy, and the reply lies in the socket: it is read before judging."""
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    waiting = asking(connection, ("GET", "k"), deadline_s=0.05)
    await peer.heard_commands(1)
    peer.say(bulk(b"v"))  # written to the socket at once: it is in our kernel before we block
    time.sleep(0.15)  # noqa: ASYNC251 - the stimulus: a handler that blocks the loop
    assert await waiting == [b"v"]
    assert (lost, connection.timeouts) == ([], 0)


class Blocking(asyncio.Protocol):
    """A peer in our own loop that answers a command and then blocks the loop past the deadline, in the phase of reading."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"persistence\r\n"):
            self.transport.write(greeting())
        else:
            self.transport.write(bulk(b"v"))
            time.sleep(0.15)


async def test_timers_that_run_before_sockets_are_read_condemn_nobody() -> None:
    """uvloop then runs the deadline before it reads the reply that has arrived; one more tick reads it."""
    lost: list[StoreUnavailable] = []
    server = await asyncio.get_running_loop().create_server(Blocking, "127.0.0.1", 0)
    url = ServerURL("127.0.0.1", server.sockets[0].getsockname()[1])
    connection = await Connection.open(url, deadline_s=LONG_S, lost=lambda _, cause: lost.append(cause))
    try:
        assert await connection.execute([("GET", "k")], deadline_s=0.05) == [b"v"]
        assert (lost, connection.timeouts) == ([], 0)
    finally:
        connection.abort(StoreUnavailable("end of the test"))
        await connection.wait_closed()
        server.close()


async def test_a_server_that_answers_always_too_late_is_dropped(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never silent, but each caller would pay the deadline."""
    monkeypatch.setattr(connection_module, "MAX_LATE_IN_A_ROW", 3)
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    for number in range(3):
        waiting = asking(connection, ("GET", number), deadline_s=0.03)
        await peer.heard_commands(number + 1)
        peer.say(PUSH)
        with pytest.raises(StoreUnavailable, match="no reply within"):
            await waiting
    assert "3 replies in a row" in str(lost[0])


async def test_a_timely_reply_ends_the_row_of_late_ones(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some slow commands among good ones do not cost the connection."""
    monkeypatch.setattr(connection_module, "MAX_LATE_IN_A_ROW", 2)
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    for number in range(4):
        late = asking(connection, ("GET", number), deadline_s=0.03)
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


async def test_a_server_that_does_not_read_cannot_fill_our_memory(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound of unsent bytes callers are refused at once."""
    monkeypatch.setattr(connection_module, "MAX_UNSENT_BYTES", 1_000_000)
    peer, connection = await meet()
    peer.connections[-1].transport.pause_reading()  # type: ignore[attr-defined]
    accepted = 0
    with pytest.raises(StoreUnavailable, match="too many"):  # noqa: PT012 - how much the kernel takes is not ours to say
        while accepted < 100:
            connection.send([("SET", "k", b"x" * 1_000_000)])
            accepted += 1
    assert 0 < accepted < 100


# -- replies that end a connection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", [b"-LOADING wait\r\n", b"-READONLY no\r\n", b"-MASTERDOWN no\r\n", b"-NOAUTH no\r\n"])
async def test_a_reply_that_says_the_server_cannot_serve_ends_the_connection(meet: Meet, reply: bytes) -> None:
    """Its caller gets the reply; then the connection is over."""
    lost: list[StoreUnavailable] = []
    peer, connection = await meet(lost)
    waiting = asking(connection, ("GET", "k"))
    await peer.heard_commands(1)
    peer.say(reply)
    assert isinstance((await waiting)[0], hiredis.ReplyError)
    await until(lambda: bool(lost))
    assert isinstance(lost[0], Refused)


@pytest.mark.parametrize("reply", [b"-OOM command not allowed\r\n", b"-NOPERM no\r\n", b"-ERR what\r\n", b"-BUSY script\r\n"])
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
