"""What the benchmarks measure on: our own servers, one worker with the cache and one without, and a
plain HTTP client."""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crm.auth import development_token
from crm.demo.seed import seed_if_empty
from crm.migrations import upgrade
from respcache.testing.servers import EmbeddedPostgres, EmbeddedValkey, free_port

SECRET = "a secret of the benchmark alone, 40 chars"  # noqa: S105
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Worker:
    """A process that serves the CRM."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    def cpu(self) -> float:
        """CPU seconds so far (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


@dataclass
class Stand:
    """Everything that runs during a benchmark. ``token`` is of an admin of the tenant acme."""

    uncached: Worker
    cached: Worker
    valkey: EmbeddedValkey
    token: str

    def get(self, path: str) -> bytes:
        """Build a GET request."""
        return f"GET {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {self.token}\r\n\r\n".encode()

    def put(self, path: str, body: bytes) -> bytes:
        """Build a PUT request with a JSON body."""
        head = self.get(path).replace(b"GET", b"PUT", 1).removesuffix(b"\r\n")
        return head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
            len(body),
            body,
        )


class Client:
    """A kept connection that sends one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> "Client":
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", self._port, limit=2**20
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.close()

    async def send(self, request: bytes) -> tuple[float, bytes, bytes]:
        """Send a request; return how long the whole answer took (ms), its head and its body."""
        started = time.perf_counter()
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r", 1)[0])
        body = await self._reader.readexactly(length)
        return (time.perf_counter() - started) * 1000, head, body


@contextlib.contextmanager
def stand() -> Iterator[Stand]:
    """Start Valkey, PostgreSQL with demo data, and the two workers; stop them whatever happens."""
    with (
        tempfile.TemporaryDirectory(prefix="respcache-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        valkey = EmbeddedValkey(Path(folder) / "valkey").start()
        stack.callback(valkey.stop)
        postgres = EmbeddedPostgres(
            Path(folder) / "postgres", password="bench", durable=False
        ).start()
        stack.callback(postgres.remove)
        url = postgres.url("postgres")
        upgrade(url)
        asyncio.run(seed_if_empty(url))
        token = asyncio.run(development_token(url, SECRET, tenant="acme", role="admin"))
        given = {
            "DATABASE_URL": url,
            "REDIS_CACHE_URL": valkey.url,
            "JWT_SECRET": SECRET,
            "RESPCACHE_KEY": SECRET,
        }
        workers = []
        for name, enabled in (("uncached", "0"), ("cached", "1")):
            port = free_port()
            environment = {
                **os.environ,
                **given,
                "PORT": str(port),
                "RESPCACHE_ENABLED": enabled,
                "LOG_LEVEL": "error",
            }
            process = subprocess.Popen([sys.executable, "-m", "crm", "serve"], env=environment)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
            workers.append(Worker(name, port, process))
        for worker in workers:
            asyncio.run(_answering(worker.port))
        yield Stand(workers[0], workers[1], valkey, token)


async def _answering(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.05)
    raise SystemExit("a worker did not start")
