"""The link: up and down, how fast it fails when down, how it comes back, what it logs, and that
nothing of it stays behind."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis

from respcache.core.errors import StoreUnavailable
from respcache.resp.link import Link
from respcache.resp.url import ServerURL
from respcache.testing.servers import EmbeddedValkey

pytestmark = pytest.mark.anyio

DEADLINE_S = 0.05
HOUR_S = 3600.0

MakeLink = Callable[..., Link]


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """uvloop orders timers and sockets differently."""
    return "asyncio", {"use_uvloop": request.param}


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.002)


@pytest.fixture
async def link_to() -> AsyncIterator[MakeLink]:
    """Make links that are closed afterwards, and check that they leave no task behind."""
    links: list[Link] = []

    def make(url: str, **settings: Any) -> Link:
        links.append(Link(ServerURL.parse(url), **settings))
        return links[-1]

    yield make
    for link in links:
        await link.close()
    assert tasks_of_links() == []


def tasks_of_links() -> list[str]:
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith("Link.")]


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "respcache.resp"
    ]


async def connect(link: Link) -> None:
    # it returns after the first attempt, whatever came of it
    await asyncio.wait_for(link.connect(), 60)


async def ask(link: Link) -> bytes:
    (reply,), _ = await link.execute(("ECHO", "x"))
    assert isinstance(reply, bytes)
    return reply


async def test_replies_come_with_the_identity_of_the_server_that_gave_them(
    link_to: MakeLink, valkey_url: str
) -> None:
    """It is the server's replication id."""
    link = link_to(valkey_url)
    await connect(link)
    with redis.Redis.from_url(valkey_url) as client:
        assert await link.execute(("ECHO", "a"), ("ECHO", "b")) == (
            [b"a", b"b"],
            client.info("replication")["master_replid"],
        )


async def test_without_a_server_connect_returns_and_calls_fail_at_once(
    link_to: MakeLink, make_valkey: Any
) -> None:
    """An application starts without its cache, and the link comes up when the server does."""
    server: EmbeddedValkey = make_valkey()
    server.stop()
    link = link_to(server.url)
    await connect(link)
    assert not link.up
    with pytest.raises(StoreUnavailable):
        await ask(link)
    server.start()
    await until(lambda: link.up)
    assert await ask(link) == b"x"


async def test_a_frozen_server_costs_one_deadline_and_then_nothing(
    link_to: MakeLink, make_valkey: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Callers at the moment of freezing wait for one deadline together, later ones do not wait at
    all; thawed, it is used again."""
    caplog.set_level(logging.INFO, "respcache.resp")
    server: EmbeddedValkey = make_valkey()
    link = link_to(server.url, deadline_s=DEADLINE_S)
    await connect(link)
    server.freeze()
    results = await asyncio.gather(*(ask(link) for _ in range(50)), return_exceptions=True)
    assert all(isinstance(result, StoreUnavailable) for result in results)
    for _ in range(100):
        with pytest.raises(StoreUnavailable):
            ask(link).send(None)  # it fails in its first step, before it could wait
    server.thaw()
    await until(lambda: link.up)
    assert await ask(link) == b"x"
    assert [level for level, _ in lines(caplog)] == ["INFO", "WARNING", "INFO"]
    assert link.counters()["timeouts"] == 1
    assert link.counters()["reconnects"] == 1


async def test_a_killed_server_is_noticed_at_once_and_used_again_when_it_is_back(
    link_to: MakeLink, make_valkey: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Each life of the server has its own identity; one line is logged per change of state, however
    long it is away."""
    caplog.set_level(logging.INFO, "respcache.resp")
    server: EmbeddedValkey = make_valkey()
    link = link_to(server.url, jitter=lambda: 0.2)
    await connect(link)
    identities = [(await link.execute(("ECHO", "x")))[1]]
    for _ in range(2):
        server.kill()
        await until(lambda: not link.up)
        with pytest.raises(StoreUnavailable):
            await ask(link)
        server.start()
        await until(lambda: link.up)
        identities.append((await link.execute(("ECHO", "x")))[1])
    assert len(set(identities)) == 3
    assert [level for level, _ in lines(caplog)] == ["INFO", "WARNING", "INFO", "WARNING", "INFO"]
    ups = [line for level, line in lines(caplog) if level == "INFO"]
    assert all(
        f"(identity {identity[:8]})" in line for identity, line in zip(identities, ups, strict=True)
    )
    assert server.password not in caplog.text


async def test_a_wrong_password_is_logged_once_and_retried(
    link_to: MakeLink, make_valkey: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The link comes up by itself when the server's password becomes the right one. Neither
    password is logged."""
    caplog.set_level(logging.INFO, "respcache.resp")
    server: EmbeddedValkey = make_valkey()
    relay: list[None] = []
    link = link_to(
        server.url.replace(server.password, "wanted-by-us"),
        jitter=lambda: relay.append(None) or 0.1,
    )
    await connect(link)
    await until(lambda: len(relay) > 3)
    assert [level for level, _ in lines(caplog)] == ["WARNING"]
    assert "WRONGPASS" in caplog.text
    with redis.Redis.from_url(server.url) as client:
        client.config_set("requirepass", "wanted-by-us")
    await until(lambda: link.up)
    assert server.password not in caplog.text
    assert "wanted-by-us" not in caplog.text


async def test_a_password_that_became_wrong_in_an_outage_is_said_too(
    link_to: MakeLink, make_valkey: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """'Down' was logged already, but somebody must mend this: it is logged once more, once."""
    server: EmbeddedValkey = make_valkey()
    relay: list[None] = []
    link = link_to(server.url, jitter=lambda: relay.append(None) or 0.1)
    await connect(link)
    server.kill()
    await until(lambda: not link.up)
    server.password = "changed"
    server.start()
    await until(lambda: "WRONGPASS" in caplog.text)
    seen = len(relay)
    await until(lambda: len(relay) > seen + 2)
    assert [level for level, _ in lines(caplog)] == ["WARNING", "WARNING"]


async def test_the_link_is_not_used_while_the_server_is_a_replica(
    link_to: MakeLink, make_valkey: Any
) -> None:
    """A replica is refused in the handshake; a master that becomes one is left at its first
    READONLY."""
    master, other = make_valkey(), make_valkey()
    link = link_to(master.url, jitter=lambda: 0.1)
    await connect(link)
    with redis.Redis.from_url(master.url) as client:
        client.config_set("masterauth", other.password)
        client.replicaof("127.0.0.1", other.port)
    (reply,), _ = await link.execute(("SET", "k", "v"))
    assert "READONLY" in str(reply)
    await until(lambda: not link.up)
    second = link_to(master.url)
    await connect(second)
    assert not second.up
    with redis.Redis.from_url(master.url) as client:
        client.replicaof("NO", "ONE")
    await until(lambda: link.up and second.up)


async def test_relearning_reconnects_only_what_still_claims_the_old_identity(
    link_to: MakeLink, valkey_url: str
) -> None:
    """Many callers that notice the same change drop one connection, not the new one too."""
    link = link_to(valkey_url)
    await connect(link)
    _, identity = await link.execute(("ECHO", "x"))
    link.relearn("another")
    assert link.up
    link.relearn(identity)
    assert not link.up
    await until(lambda: link.up)
    assert link.counters()["reconnects"] == 1


class Hanging:
    """A server that shakes hands, and hangs at the first command; it notes when it was called."""

    def __init__(self) -> None:
        self.calls: list[float] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.calls.append(time.monotonic())
        self.writers.append(writer)
        await reader.readuntil(b"persistence\r\n")
        info = b"role:master\r\nmaster_replid:aa\r\nloading:0\r\n"
        writer.write(b"+OK\r\n+OK\r\n" + b"$%d\r\n%s\r\n" % (len(info), info) * 2)
        await reader.read()


async def test_a_server_that_shakes_hands_and_hangs_is_not_tried_in_a_tight_loop(
    link_to: MakeLink,
) -> None:
    """Pauses grow until a connection has lasted: callers do not pay a deadline over and over."""
    hanging = Hanging()
    server = await asyncio.start_server(hanging.serve, "127.0.0.1", 0)
    link = link_to(
        f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}",
        deadline_s=0.02,
        jitter=lambda: 1.0,
    )
    await connect(link)
    try:
        while len(hanging.calls) < 4:
            await until(lambda: link.up)
            with pytest.raises(StoreUnavailable):
                await ask(link)
    finally:
        server.close()
        for writer in hanging.writers:
            writer.transport.abort()
    pauses = [
        later - earlier for earlier, later in zip(hanging.calls, hanging.calls[1:], strict=False)
    ]
    assert all(pause >= least for pause, least in zip(pauses, [0.05, 0.1, 0.2], strict=True))


async def test_pauses_are_jittered_and_capped(
    link_to: MakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random number is passed in; no pause exceeds the cap, and trying never ends."""
    from respcache.resp import link as link_module

    monkeypatch.setattr(link_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(link_module, "MOST_PAUSE_S", 0.004)
    relay: list[float] = []
    server = await asyncio.start_server(lambda _, __: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    link = link_to(
        f"redis://127.0.0.1:{port}", jitter=lambda: relay.append(time.monotonic()) or 1.0
    )
    await connect(link)
    await until(lambda: len(relay) > 30)  # doubled without a cap, thirty pauses would take days
    assert not link.up


async def test_closing_is_bounded_at_every_stage_and_leaves_nothing(
    link_to: MakeLink, valkey_url: str
) -> None:
    """Before connecting, while connecting to somebody who says nothing, when up, and twice."""
    silent = await asyncio.start_server(lambda _, __: asyncio.sleep(60), "127.0.0.1", 0)
    mute = f"redis://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    fresh, connecting, up = (
        link_to(valkey_url),
        link_to(mute, connect_deadline_s=HOUR_S),
        link_to(valkey_url),
    )
    waiting = asyncio.create_task(connecting.connect())
    await asyncio.sleep(0)
    await connect(up)
    late = asyncio.create_task(up.execute(("BLPOP", "nothing", 0)))
    await asyncio.sleep(0)
    for link in (fresh, connecting, up, up):
        await asyncio.wait_for(link.close(), 60)
        with pytest.raises(StoreUnavailable, match="closed"):
            await ask(link)
        link.send(("ECHO", "x"))
    with pytest.raises(StoreUnavailable, match="closed"):
        await late
    await asyncio.wait_for(waiting, 60)
    silent.close()
    assert tasks_of_links() == []
    assert up.counters()["commands"] > 0


async def test_closing_in_the_moment_of_connecting_hangs_nobody(
    link_to: MakeLink, valkey_url: str
) -> None:
    """The background task is cancelled before it ran at all; whoever waits in ``connect``
    returns."""
    link = link_to(valkey_url)
    waiting = asyncio.create_task(link.connect())
    await asyncio.sleep(0)  # connect() has made the task, which has not started
    await link.close()
    await asyncio.wait_for(waiting, 60)


async def test_a_cancelled_caller_stays_cancelled(link_to: MakeLink, make_valkey: Any) -> None:
    """``CancelledError`` is never turned into a fault of the store, whatever happens in the same
    moment."""
    server: EmbeddedValkey = make_valkey()
    link = link_to(server.url, deadline_s=5.0)
    await connect(link)
    server.freeze()
    waiting = asyncio.create_task(link.execute(("ECHO", "x")))
    await asyncio.sleep(0)
    waiting.cancel()
    server.kill()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: not link.up)


# -- futures and callbacks -------------------------------------------------------------------------


async def test_a_plain_function_asks_and_learns_whose_replies_will_come(
    link_to: MakeLink, valkey_url: str
) -> None:
    """Futures of one tick, some of them from a callback of that tick; no task takes part."""
    link = link_to(valkey_url)
    await connect(link)
    tasks, taken = asyncio.all_tasks(), []
    _, identity = await link.execute(("ECHO", "x"))

    def ask(text: str) -> None:
        future, promised = link.request(("ECHO", text))
        assert promised == identity
        future.add_done_callback(lambda done: taken.append(done.result()))

    ask("a")
    link.soon(lambda: ask("b"))
    assert asyncio.all_tasks() == tasks
    await until(lambda: len(taken) == 2)
    assert taken == [[b"a"], [b"b"]]


async def test_while_down_requests_and_callbacks_are_refused_at_once(
    link_to: MakeLink, valkey_url: str
) -> None:
    """They raise, before anybody could wait."""
    link = link_to(valkey_url)
    for ask in (lambda: link.request(("ECHO", "x")), lambda: link.soon(lambda: None)):
        with pytest.raises(StoreUnavailable, match="not connected"):
            ask()


async def test_callbacks_of_a_link_that_went_down_still_run_and_learn_of_it(
    link_to: MakeLink, valkey_url: str
) -> None:
    """In the same tick."""
    link = link_to(valkey_url)
    await connect(link)
    raised: list[StoreUnavailable] = []

    def ask() -> None:
        try:
            link.request(("ECHO", "x"))
        except StoreUnavailable as error:
            raised.append(error)

    _, identity = await link.execute(("ECHO", "x"))
    link.soon(ask)
    link.relearn(identity)
    await until(lambda: bool(raised))
    assert "identity" in str(raised[0])


# -- push messages ---------------------------------------------------------------------------------


class Ear:
    """Listens, and notes what it hears."""

    def __init__(self, link: Link, channel: str = "news") -> None:
        self.notes: list[bytes | str] = []
        self.link = link
        link.listen(channel, self.notes.append, self.lost)

    def lost(self) -> None:
        self.notes.append("lost")
        assert not self.link.listening


def publish(url: str, *texts: str) -> int:
    with redis.Redis.from_url(url) as client:
        return [client.publish("news", text) for text in texts][-1]


@pytest.mark.parametrize("first", ["listen", "connect"])
async def test_messages_are_heard_from_the_confirmation_on(
    link_to: MakeLink, valkey_url: str, first: str
) -> None:
    """Whether somebody listens before the link connects or after; one listener a link."""
    link = link_to(valkey_url)
    if first == "connect":
        await connect(link)
    ear = Ear(link)
    assert not link.listening
    await connect(link)
    await until(lambda: link.listening)
    assert publish(valkey_url, "a", "b") == 1
    assert await ask(link) == b"x"
    assert ear.notes == [b"a", b"b"]  # published before we asked: heard before the answer
    with pytest.raises(ValueError, match="already listens"):
        Ear(link)
    await link.close()
    await link.close()
    assert ear.notes == [b"a", b"b", "lost"]
    assert not link.listening


async def test_a_new_connection_listens_again_and_each_loss_is_told_once(
    link_to: MakeLink, make_valkey: Any
) -> None:
    """A crash, a new identity, a server that ends the connection: ``lost``, then listening again,
    all without anybody's help."""
    server: EmbeddedValkey = make_valkey()
    link = link_to(server.url, jitter=lambda: 0.1)
    ear = Ear(link)
    await connect(link)
    await until(lambda: link.listening)
    publish(server.url, "1")
    await until(lambda: ear.notes == [b"1"])
    server.kill()
    await until(lambda: not link.up)
    assert (ear.notes, link.listening) == ([b"1", "lost"], False)
    server.start()
    await until(lambda: link.listening)
    link.relearn((await link.execute(("ECHO", "x")))[1])
    assert ear.notes == [b"1", "lost", "lost"]
    await until(lambda: link.listening)
    with redis.Redis.from_url(server.url) as client:
        client.client_kill_filter(_type="pubsub")
    await until(lambda: ear.notes == [b"1", "lost", "lost", "lost"])
    await until(lambda: link.listening)
    publish(server.url, "2")
    await until(lambda: ear.notes[-1] == b"2")
    assert len(ear.notes) == 5


async def test_a_loss_is_told_before_those_who_wait_for_replies_hear_of_it(
    link_to: MakeLink, valkey_url: str
) -> None:
    """Whoever goes on after the failure sees already that messages may be missing."""
    link = link_to(valkey_url)
    ear = Ear(link)
    await connect(link)
    await until(lambda: link.listening)
    future, identity = link.request(("ECHO", "x"))
    future.add_done_callback(lambda done: ear.notes.append(type(done.exception()).__name__))
    link.relearn(identity)
    await until(lambda: len(ear.notes) == 2)
    assert ear.notes == ["lost", "StoreUnavailable"]


async def test_a_listener_that_fails_on_a_loss_does_not_keep_the_link_down(
    link_to: MakeLink, valkey_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the link reconnects."""

    def fail() -> None:
        raise ValueError("mine")

    link = link_to(valkey_url)
    link.listen("news", lambda _: None, fail)
    await connect(link)
    await until(lambda: link.listening)
    link.relearn((await link.execute(("ECHO", "x")))[1])
    await until(lambda: link.listening)
    await link.close()
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == [
        "mine",
        "mine",
    ]


async def test_a_refused_channel_is_logged_once_and_asked_for_again(
    link_to: MakeLink, make_valkey: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the permission the link serves commands and does not listen; with it, it does from
    the next connection on."""
    server: EmbeddedValkey = make_valkey()
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "ann", "on", ">pw", "~*", "+@all", "resetchannels")
        link = link_to(f"redis://ann:pw@127.0.0.1:{server.port}/0", jitter=lambda: 0.1)
        ear = Ear(link)
        await connect(link)
        for number in range(3):
            await until(lambda: link.up)
            for _ in range(3):
                assert await ask(link) == b"x"
            assert not link.listening
            if number == 2:
                client.execute_command("ACL", "SETUSER", "ann", "&news")
            link.relearn((await link.execute(("ECHO", "x")))[1])
        await until(lambda: link.listening)
    assert ear.notes == []
    warnings = [line for level, line in lines(caplog) if "channel" in line]
    assert len(warnings) == 1
    assert "refuses the channel 'news': NOPERM" in warnings[0]
    with redis.Redis.from_url(server.url) as client:
        # the server ends the connection then
        client.execute_command("ACL", "SETUSER", "ann", "resetchannels")
    await until(lambda: "lost" in ear.notes)
    await until(lambda: len([line for _, line in lines(caplog) if "channel" in line]) == 2)
    assert await ask(link) == b"x"


async def test_a_link_too_busy_to_subscribe_begins_anew(
    link_to: MakeLink, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would otherwise never listen; the next connection subscribes before anything else."""
    from respcache.resp import connection as connection_module

    link = link_to(valkey_url)
    await connect(link)
    monkeypatch.setattr(connection_module, "MAX_WAITING", 5)
    waiting, _ = link.request(*[("ECHO", "x")] * 5)
    ear = Ear(link)
    with pytest.raises(StoreUnavailable, match="too many"):
        await waiting
    await until(lambda: link.listening)
    publish(valkey_url, "a")
    await until(lambda: ear.notes == [b"a"])


async def test_replies_beyond_the_servers_limit_for_subscribers_cost_a_connection_and_no_more(
    link_to: MakeLink, make_valkey: Any
) -> None:
    """A listening connection falls under ``client-output-buffer-limit pubsub``: whoever has a reply
    has the right one."""
    server: EmbeddedValkey = make_valkey(client_output_buffer_limit="pubsub 8mb 0 0")
    link = link_to(server.url, deadline_s=5.0, jitter=lambda: 0.1)
    ear = Ear(link)
    await connect(link)
    await until(lambda: link.listening)
    await link.execute(("SET", "k", b"x" * 1_000_000))
    asking = [asyncio.create_task(link.execute(("GET", "k"))) for _ in range(30)]
    for _ in range(3):
        await asyncio.sleep(0)
    time.sleep(0.5)  # noqa: ASYNC251 - the loop must be blocked
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert any(isinstance(result, StoreUnavailable) for result in results)
    assert all(
        isinstance(result, StoreUnavailable) or result[0] == [b"x" * 1_000_000]
        for result in results
    )
    await until(lambda: link.listening)
    assert ear.notes == ["lost"]
