"""Processes that are measured, and the machine they are measured on: which core does what, CPU
time. Linux only."""

import contextlib
import ctypes
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

STOP_DEADLINE_S = 10.0
SETTLE_S = 0.03

READY = b"ready\n"
"""What a process of ours prints when it answers."""


class Prepared(msgspec.Struct):
    """An answer that is sent as it is, by path and query."""

    target: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Failed(RuntimeError):
    """A process did not start, or what it answered cannot be measured."""


@dataclass(frozen=True)
class Cores:
    """Who runs where: the servers of lanes on the first cores, the load generator, Valkey and
    PostgreSQL on the last."""

    available: tuple[int, ...]

    @classmethod
    def found(cls) -> "Cores":
        """Look at what this process may use."""
        return cls(tuple(sorted(os.sched_getaffinity(0))))

    def servers(self, workers: int = 1) -> tuple[int, ...]:
        """Return the cores of a lane's processes."""
        return self.available[: max(1, workers)]

    def generator(self) -> tuple[int, ...]:
        """Return the core of whoever asks. With one core there is nothing to part."""
        return self.available[-1:]

    def __str__(self) -> str:
        if len(self.available) == 1:
            return (
                "one core: servers, load generator and Valkey share it, so throughput is that of "
                "all of them together"
            )
        return (
            f"{len(self.available)} cores: a lane's server on core {self.servers()[0]}; "
            f"load generator, Valkey and PostgreSQL on core {self.generator()[0]}"
        )


def cpu_ns(pids: Iterable[int]) -> int:
    """Return the CPU time of all threads of processes, in nanoseconds: what the scheduler counted,
    not ticks of 10 ms."""
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += int((thread / "schedstat").read_text().split()[0])
    return total


def family(pid: int) -> tuple[int, ...]:
    """Return a process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(") ")[2].split()[1]
                )
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return tuple(found)


def pin(pid: int, cores: Iterable[int]) -> None:
    """Move all threads of a process."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def describe(cores: Cores) -> str:
    """Name the machine."""
    with open("/proc/cpuinfo") as lines:
        model = next(
            (line.partition(": ")[2].strip() for line in lines if line.startswith("model name")),
            platform.machine(),
        )
    return f"{model}, {len(cores.available)} cores, Linux {platform.release()}"


def settle() -> None:
    """Let what follows an answer (stores, logs) happen before CPU time is read."""
    time.sleep(SETTLE_S)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Stop a process, by force where it does not listen."""
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def tied_to_us(cores: Iterable[int]) -> Callable[[], None]:
    """Make the step, run in the child, that pins it and has the kernel end it when we die (prctl
    PR_SET_PDEATHSIG)."""
    prctl, chosen = ctypes.CDLL(None).prctl, set(cores)

    def step() -> None:
        os.sched_setaffinity(0, chosen)
        prctl(1, int(signal.SIGTERM), 0, 0, 0)

    return step
