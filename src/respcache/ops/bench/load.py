"""The load generator: kept connections that each send the next request when their answer is
complete and was compared.

Why not wrk: it counts answers, it does not look at them (with a Lua callback for that it is slower
than this), and it knows no fills, no hits and no CPU time. Here every answer must have status 200,
the declared length, the very bytes of its page and, where the lane says so, the mark of a hit. That
costs one epoll, one or two recv into a buffer that exists, one memcmp and one send, which the
kernel's share outweighs: 20 to 28 us for 40 KB at 16 and 64 connections, beside 26 to 30 us of wrk
with a Lua script for the pages, in turns on the same servers. Bare ASGI takes twice that, so this
is not what limits it. Where it is the slower side after all (``busy`` near 1: nginx), throughput is
a lower bound; the CPU time of the server, which counts, is not touched by that.
"""

import contextlib
import gc
import select
import socket
import statistics
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

HEAD_BYTES = 4096
SPARE_BYTES = 65536
STALL_S = 30.0


class WrongAnswer(RuntimeError):
    """A lane answered something else than it must; it is not measured."""


class WrongWay(WrongAnswer):
    """A right answer, but not the hit or the miss that is measured: once, that may be an accident
    of a busy machine."""


@dataclass(frozen=True)
class Ask:
    """A request and the body that must come back: all of it, or its length and what it begins with.

    Not ``exact``: any body will do (of about that length), for answers that differ from one time to
    the next.
    """

    request: bytes
    body: bytes
    length: int = 0
    exact: bool = True

    def __post_init__(self) -> None:
        if not self.length:
            object.__setattr__(self, "length", len(self.body))


@dataclass
class LoadSample:
    """What one stretch of load showed."""

    requests: int = 0
    hits: int = 0
    """Answers whose head held what was said to mark a hit."""
    seconds: float = 0.0
    busy: float = 0.0
    latencies_ns: "array[int]" = field(default_factory=lambda: array("q"))

    @property
    def rps(self) -> float:
        """Answers per second."""
        return self.requests / self.seconds

    def percentile_ms(self, percent: int) -> float:
        """Return a percentile of how long a whole answer took."""
        return percentile(self.latencies_ns, percent) / 1e6


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile, of few values too."""
    if len(values) < 2:
        return float(values[0])
    return float(statistics.quantiles(values, n=100, method="inclusive")[percent - 1])


class _Connection:
    __slots__ = (
        "ask",
        "body_at",
        "buffer",
        "filled",
        "needed",
        "number",
        "sent_at",
        "socket",
        "view",
    )

    def __init__(self, address: tuple[str, int], number: int, ask: Ask, size: int) -> None:
        self.socket = socket.create_connection(address, 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.number = number
        self.ask = ask
        self.sent_at = 0
        self.buffer = bytearray(size)
        self.view = memoryview(self.buffer)
        self.filled = self.needed = self.body_at = 0


def drive(
    port: int,
    asks: Sequence[Ask],
    *,
    connections: int,
    seconds: float | None = None,
    requests: int | None = None,
    hit: bytes = b"",
    strict: bool = True,
    host: str = "127.0.0.1",
) -> LoadSample:
    """Send for so many seconds, or so many requests, and compare every answer. Raises
    ``WrongAnswer`` and ``WrongWay``.

    ``hit`` is what the head of a hit holds, in lower case: that of every answer; or, not
    ``strict``, of those that are counted.
    """
    with contextlib.ExitStack() as stack:
        size = HEAD_BYTES + max(
            ask.length if ask.exact else 2 * ask.length + SPARE_BYTES for ask in asks
        )
        poll = stack.enter_context(select.epoll())
        opened: dict[int, _Connection] = {}
        for number in range(connections):
            # evenly over the pages, so that no two connections walk over them in step
            first = number * len(asks) // connections
            connection = _Connection((host, port), first, asks[first % len(asks)], size)
            stack.callback(connection.socket.close)
            opened[connection.socket.fileno()] = connection
            poll.register(connection.socket, select.EPOLLIN)
        collecting = gc.isenabled()
        gc.disable()
        if collecting:
            stack.callback(gc.enable)
        return _drive(poll, opened, asks, seconds, requests, hit, strict)


def _drive(
    poll: select.epoll,
    opened: dict[int, _Connection],
    asks: Sequence[Ask],
    seconds: float | None,
    requests: int | None,
    hit: bytes,
    strict: bool,
) -> LoadSample:
    """Loop. Local names and one level of calls: this shares the machine with what it measures."""
    clock, pages = time.perf_counter_ns, len(asks)
    # those seen, with length and whether it is a hit: a new one comes once a second
    heads: dict[bytes, tuple[int, bool]] = {}
    sample = LoadSample()
    note = sample.latencies_ns.append
    left = -1 if requests is None else requests
    cpu, started = time.thread_time(), clock()
    ends = started + int(1e9 * (3600 if seconds is None else seconds))
    waiting = hits = 0
    for connection in opened.values():
        if left == 0:
            break
        left -= 1
        connection.sent_at = clock()
        connection.socket.send(connection.ask.request)
        waiting += 1
    while waiting:
        ready = poll.poll(STALL_S)
        if not ready:
            raise WrongAnswer(f"nothing came for {STALL_S:.0f} s")
        for descriptor, _ in ready:
            connection = opened[descriptor]
            buffer, filled = connection.buffer, connection.filled
            got = connection.socket.recv_into(connection.view[filled:])
            filled += got
            if connection.needed == 0 and got:
                end = buffer.find(b"\r\n\r\n", 0, filled) + 4
                if end < 4:
                    connection.filled = filled
                    continue
                head = bytes(buffer[:end])
                known = heads.get(head)
                if known is None:
                    known = heads[head] = _read_head(head, hit, strict)
                connection.needed, connection.body_at = end + known[0], end
                hits += known[1]
            needed, ask = connection.needed, connection.ask
            if filled < needed and got:
                connection.filled = filled
                continue
            at = connection.body_at
            right = needed - at == ask.length and buffer.startswith(ask.body, at, needed)
            if filled != needed or not (right or not ask.exact):
                raise WrongAnswer(_difference(ask, bytes(buffer[:filled])))
            now = clock()
            note(now - connection.sent_at)
            connection.filled = connection.needed = 0
            if left == 0 or now >= ends:
                waiting -= 1
                continue
            left -= 1
            connection.number = number = connection.number + 1
            connection.ask = ask = asks[number % pages]
            connection.sent_at = now
            connection.socket.send(ask.request)
    sample.seconds = (clock() - started) / 1e9
    sample.busy = min(1.0, (time.thread_time() - cpu) / sample.seconds)
    sample.requests, sample.hits = len(sample.latencies_ns), hits
    return sample


def _read_head(head: bytes, hit: bytes, strict: bool) -> tuple[int, bool]:
    """Check the head of an answer; return its content length and whether it is a hit. Raises
    ``WrongAnswer`` and ``WrongWay``."""
    lower = head.lower()
    if not head.startswith(b"HTTP/1.1 200"):
        raise WrongAnswer(f"not answered with 200: {head[:200]!r}")
    if strict and hit not in lower:
        raise WrongWay(f"no hit ({hit.decode()!r} is missing): {head!r}")
    _, found, after = lower.partition(b"\r\ncontent-length: ")
    if not found:
        raise WrongAnswer(f"no content length: {head!r}")
    return int(after.partition(b"\r")[0]), bool(hit) and hit in lower


def _difference(ask: Ask, answer: bytes) -> str:
    """Say what is wrong with an answer."""
    line = ask.request.partition(b" HTTP")[0].decode()
    _, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return f"{line}: the connection was closed"
    pairs = enumerate(zip(ask.body, body, strict=False))
    same = next((i for i, (mine, theirs) in pairs if mine != theirs), min(len(ask.body), len(body)))
    return (
        f"{line}: {len(body)} bytes instead of {ask.length}, different from byte {same} on: "
        f"{body[same : same + 40]!r}"
    )
