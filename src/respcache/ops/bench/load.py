"""The load generator: persistent connections, each of which sends its next request when it has
compared the response to the last one.

Why not wrk: it counts responses but does not compare them (with a Lua callback that does, it is
slower than this module), and it measures neither fills nor hits nor CPU time. Here every response
must have status 200, the declared length, exactly the bytes of its page and, if the lane requires
it, the mark of a hit. That costs one epoll, one or two recv calls into a preallocated buffer, one
memcmp and one send: 20 to 28 us for 40 KB at 16 and 64 connections, against 26 to 30 us of wrk with
a Lua script for the pages, in turns on the same servers. Bare ASGI takes twice that, so the
generator is not the bottleneck. If it is after all (``busy`` near 1: nginx), throughput is a lower
bound; the CPU time of the server is not affected.
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


class WrongResponse(RuntimeError):
    """A lane sent a wrong response, so it is not measured."""


class WrongOutcome(WrongResponse):
    """A correct response, but a miss instead of the measured hit, or vice versa. A busy machine may
    cause it once."""


@dataclass(frozen=True)
class LoadRequest:
    """A request and the expected body: the complete body, or its beginning and its length.

    If not ``exact``, any body of about that length is accepted, for responses that vary.
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
    """The measurements of one period of load."""

    requests: int = 0
    hits: int = 0
    """Responses whose headers contain the mark of a hit."""
    seconds: float = 0.0
    busy: float = 0.0
    latencies_ns: "array[int]" = field(default_factory=lambda: array("q"))

    @property
    def rps(self) -> float:
        """Responses per second."""
        return self.requests / self.seconds

    def percentile_ms(self, percent: int) -> float:
        """Return a percentile of the time until a response was complete."""
        return percentile(self.latencies_ns, percent) / 1e6


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile; works for few values too."""
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

    def __init__(
        self, address: tuple[str, int], *, number: int, ask: LoadRequest, size: int
    ) -> None:
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
    asks: Sequence[LoadRequest],
    *,
    connections: int,
    seconds: float | None = None,
    requests: int | None = None,
    hit: bytes = b"",
    strict: bool = True,
    host: str = "127.0.0.1",
) -> LoadSample:
    """Send requests for some seconds, or a number of them, and compare every response.

    ``hit`` is the mark of a hit in the response headers, in lower case. If ``strict``, every
    response must contain it; else those that do are counted. Raises ``WrongResponse`` and
    ``WrongOutcome``.
    """
    with contextlib.ExitStack() as stack:
        size = HEAD_BYTES + max(
            ask.length if ask.exact else 2 * ask.length + SPARE_BYTES for ask in asks
        )
        poll = stack.enter_context(select.epoll())
        opened: dict[int, _Connection] = {}
        for number in range(connections):
            # spread evenly over the pages, so that connections do not request them in step
            first = number * len(asks) // connections
            connection = _Connection(
                (host, port), number=first, ask=asks[first % len(asks)], size=size
            )
            stack.callback(connection.socket.close)
            opened[connection.socket.fileno()] = connection
            poll.register(connection.socket, select.EPOLLIN)
        collecting = gc.isenabled()
        gc.disable()
        if collecting:
            stack.callback(gc.enable)
        load = _Load(asks=asks, seconds=seconds, requests=requests, hit=hit, strict=strict)
        return _drive(poll, opened, load)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    asks: Sequence[LoadRequest]
    seconds: float | None
    requests: int | None
    hit: bytes
    strict: bool


def _drive(poll: select.epoll, opened: dict[int, _Connection], load: _Load) -> LoadSample:
    """Send and compare. Uses local names and few calls, as it shares the machine with the
    server."""
    clock, asks, pages = time.perf_counter_ns, load.asks, len(load.asks)
    # response headers with content length and whether they are a hit: they change once a second
    heads: dict[bytes, tuple[int, bool]] = {}
    sample = LoadSample()
    note = sample.latencies_ns.append
    left = -1 if load.requests is None else load.requests
    cpu, started = time.thread_time(), clock()
    ends = started + int(1e9 * (3600 if load.seconds is None else load.seconds))
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
            raise WrongResponse(f"no data for {STALL_S:.0f} s")
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
                    known = heads[head] = _read_head(head, load.hit, load.strict)
                connection.needed, connection.body_at = end + known[0], end
                hits += known[1]
            needed, ask = connection.needed, connection.ask
            if filled < needed and got:
                connection.filled = filled
                continue
            at = connection.body_at
            right = needed - at == ask.length and buffer.startswith(ask.body, at, needed)
            if filled != needed or not (right or not ask.exact):
                raise WrongResponse(_difference(ask, bytes(buffer[:filled])))
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
    """Check response headers; return the content length and whether it is a hit.

    Raises ``WrongResponse`` and ``WrongOutcome``.
    """
    lower = head.lower()
    if not head.startswith(b"HTTP/1.1 200"):
        raise WrongResponse(f"status is not 200: {head[:200]!r}")
    if strict and hit not in lower:
        raise WrongOutcome(f"not a hit ({hit.decode()!r} is missing): {head!r}")
    _, found, after = lower.partition(b"\r\ncontent-length: ")
    if not found:
        raise WrongResponse(f"no content length: {head!r}")
    return int(after.partition(b"\r")[0]), bool(hit) and hit in lower


def _difference(ask: LoadRequest, response: bytes) -> str:
    """Describe what is wrong with a response."""
    line = ask.request.partition(b" HTTP")[0].decode()
    _, found, body = response.partition(b"\r\n\r\n")
    if not found:
        return f"{line}: the connection was closed"
    pairs = enumerate(zip(ask.body, body, strict=False))
    same = next((i for i, (mine, theirs) in pairs if mine != theirs), min(len(ask.body), len(body)))
    return (
        f"{line}: {len(body)} bytes instead of {ask.length}; they differ from byte {same} on: "
        f"{body[same : same + 40]!r}"
    )
