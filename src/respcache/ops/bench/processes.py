"""Measured processes and their machine: assignment of cores, and CPU time. Linux only."""

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
"""The line that a lane's process prints when it accepts requests."""


class Prepared(msgspec.Struct):
    """A response that is sent as it is, for one path and query."""

    target: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Failed(RuntimeError):
    """A process did not start, or its responses cannot be measured."""


@dataclass(frozen=True)
class Cores:
    """Assigns cores: the first ones to the servers of lanes, the last one to the load generator,
    Valkey and PostgreSQL."""

    available: tuple[int, ...]

    @classmethod
    def found(cls) -> "Cores":
        """Return the cores that this process may use."""
        return cls(tuple(sorted(os.sched_getaffinity(0))))

    def servers(self, workers: int = 1) -> tuple[int, ...]:
        """Return the cores of a lane's processes."""
        return self.available[: max(1, workers)]

    def generator(self) -> tuple[int, ...]:
        """Return the core of the load generator; on a machine with one core, that one."""
        return self.available[-1:]

    def __str__(self) -> str:
        if len(self.available) == 1:
            return (
                "one core, shared by servers, load generator and Valkey: throughput is that of all "
                "of them together"
            )
        return (
            f"{len(self.available)} cores: a lane's server on core {self.servers()[0]}; "
            f"load generator, Valkey and PostgreSQL on core {self.generator()[0]}"
        )


def cpu_ns(pids: Iterable[int]) -> int:
    """Return the CPU time of all threads of these processes in nanoseconds.

    It is the scheduler's count, not a number of 10 ms ticks.
    """
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += int((thread / "schedstat").read_text().split()[0])
    return total


def family(pid: int) -> tuple[int, ...]:
    """Return the ids of a process and all its descendants."""
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
    """Bind all threads of a process to these cores."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def describe(cores: Cores) -> str:
    """Describe the machine."""
    with open("/proc/cpuinfo") as lines:
        model = next(
            (line.partition(": ")[2].strip() for line in lines if line.startswith("model name")),
            platform.machine(),
        )
    return f"{model}, {len(cores.available)} cores, Linux {platform.release()}"


def settle() -> None:
    """Wait until work that follows a response (stores, logs) is done, before CPU time is read."""
    time.sleep(SETTLE_S)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Terminate a process; kill it if it does not end in time."""
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def tied_to_us(cores: Iterable[int]) -> Callable[[], None]:
    """Return a function for the child process that binds it to these cores and makes the kernel end
    it when its parent dies (prctl PR_SET_PDEATHSIG)."""
    prctl, chosen = ctypes.CDLL(None).prctl, set(cores)

    def step() -> None:
        os.sched_setaffinity(0, chosen)
        prctl(1, int(signal.SIGTERM), 0, 0, 0)

    return step
