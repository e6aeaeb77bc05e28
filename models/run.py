"""Checks the models with spin: the invariants hold in every state, and each mutant fails. See
README.md."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
HOLDS, FAILS = "holds", "fails"
CUT_OFF = (
    r"^pan:\d+:|took too long|max search depth too small|out of memory|reached -DMEMLIM|Search "
    r"not completed|^could not"
)
SMALL_MIB, FULL_MIB = 3900, 16000
SMALL_S, FULL_S = 300, 7200


@dataclass(frozen=True, slots=True)
class Configuration:
    """A model, its flags, and the expected verdict."""

    name: str
    model: str
    flags: str
    expected: str = HOLDS
    full: bool = False
    options: str = "-m100000"

    @property
    def defines(self) -> list[str]:
        """The flags as arguments of spin."""
        return [f"-D{flag}" for flag in self.flags.split()]


def mutants(model: str, flags: str, *names: str) -> list[Configuration]:
    """Return a configuration for each omitted rule."""
    return [Configuration(f"{model}-{name}", model, f"{flags} {name}", FAILS) for name in names]


CORE = "EVICT COMPACT FAILOVERS=1 CRASH CYCLES JOIN"
CONFIGURATIONS = [
    Configuration("core-accidents", "core", f"{CORE} READS=1 ONEKEY"),
    Configuration("core-two-tags", "core", "EVICT COMPACT JOIN READS=1 WRITERS=2"),
    *mutants("core", "ONEKEY", "CAPLATE", "BUMPFIRST"),
    *mutants("core", "ONEKEY JOIN", "JOINANY"),
    *mutants("core", "ONEKEY EVICT", "NONONCE"),
    *mutants("core", "ONEKEY COMPACT", "NOFLOOR"),
    *mutants("core", "ONEKEY FAILOVERS=1", "NORCHECK"),
    Configuration("serving_lease-partition", "serving_lease", "T=4"),
    Configuration("serving_lease-split", "serving_lease", "T=4 SPLIT CYCLES0=2"),
    *mutants("serving_lease", "T=4", "NOWAIT", "LATEM0", "LATELEASE", "NOLEASE", "NORECORD"),
    *mutants("serving_lease", "T=4 SPLIT CYCLES0=2", "ACKALWAYS", "NOEFF", "EARLYRECORD"),
    Configuration("composed-rows", "composed", "TWOROWS UNKNOWN"),
    Configuration("composed-losses", "composed", "T=2 LOSSES=1"),
    Configuration(
        "composed-saves", "composed", "T=2 LOSSES=2 SAVE CYCLES0=2 CYCLES1=0 FILLS1=0 FILLS0=1"
    ),
    Configuration("composed-failover", "composed", "T=2 FAILOVER"),
    *mutants("composed", "PSQL CYCLES0=0 CYCLES1=2", "IDCURSOR"),
    *mutants("composed", "TWOROWS", "DEDUPEXID"),
    *mutants("composed", "UNKNOWN", "EARLYID"),
    *mutants("composed", "T=2 LOSSES=1", "EPOCHFIRST", "ACKADOPTED"),
    *mutants("composed", "T=2 FAILOVER", "NOIDENTITY"),
    Configuration("rivals-atomic", "rivals", "ATOMIC"),
    Configuration("rivals-counter", "rivals", "COUNTER"),
    *mutants("rivals", "", "DELETE", "MARKER"),
    *mutants("rivals", "ATOMIC", "EXPIRE"),
    *mutants("rivals", "COUNTER", "EVICT"),
    Configuration("core-accidents-full", "core", f"{CORE} READS=2 ONEKEY", full=True),
    Configuration("core-two-tags-full", "core", "EVICT COMPACT JOIN READS=2 WRITERS=2", full=True),
    Configuration(
        "core-failovers-full", "core", "FAILOVERS=2 CRASH CYCLES READS=2 ONEKEY", full=True
    ),
    Configuration(
        "serving_lease-partition-full", "serving_lease", "T=5 READS1=2 CYCLES0=2", full=True
    ),
    Configuration(
        "serving_lease-split-full", "serving_lease", "T=5 SPLIT CYCLES0=2 CLAIMS=2", full=True
    ),
    Configuration(
        "serving_lease-reader-moves-full",
        "serving_lease",
        "T=4 SPLIT CYCLES1=0 CYCLES2=2 READS1=0 READS2=1",
        full=True,
    ),
    Configuration("composed-psql-full", "composed", "T=3 PSQL TWOROWS UNKNOWN", full=True),
    Configuration("composed-losses-full", "composed", "T=3 LOSSES=1 SAVE", full=True),
    Configuration("composed-two-losses-full", "composed", "T=2 LOSSES=2 SAVE CYCLES0=2", full=True),
    Configuration("composed-failover-full", "composed", "T=3 FAILOVER CLAIMS=2", full=True),
]


@dataclass(frozen=True, slots=True)
class Result:
    """The verdict on a configuration: ``HOLDS``, ``FAILS``, or what cut off the search."""

    name: str
    verdict: str
    expected: str
    states: int
    seconds: float
    mib: float

    @property
    def right(self) -> bool:
        """Whether the verdict is the expected one."""
        return self.verdict == self.expected


def main() -> int:
    """Check the configurations named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit status: 0 as expected, 1 not, 2 usage, 3 no spin or compiler",
    )
    parser.add_argument(
        "--full", action="store_true", help="also the full sizes: much longer, up to 16 GiB"
    )
    parser.add_argument(
        "--only", metavar="NAME", action="append", help="only this configuration (may be repeated)"
    )
    parser.add_argument(
        "--trace", metavar="NAME", help="print the shortest counterexample of a mutant"
    )
    parser.add_argument("--list", action="store_true", help="print the names of all configurations")
    arguments = parser.parse_args()
    known = {one.name: one for one in CONFIGURATIONS}
    for name in (arguments.only or []) + ([arguments.trace] if arguments.trace else []):
        if name not in known:
            parser.error(f"there is no configuration {name!r}; --list prints their names")
    if arguments.list:
        print("\n".join(known))
        return 0
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if shutil.which("spin") is None or compiler is None:
        print("spin and a C compiler are needed: apt-get install spin gcc", file=sys.stderr)
        return 3
    if arguments.trace:
        return trace(known[arguments.trace], compiler)
    chosen = (
        [known[name] for name in arguments.only]
        if arguments.only
        else [one for one in known.values() if arguments.full or not one.full]
    )
    began, results = time.monotonic(), []
    for number, one in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {one.name} ...", end=" ", flush=True)
        results.append(check(one, compiler))
        print(results[-1].verdict, flush=True)
    print_table(results)
    wrong = [result.name for result in results if not result.right]
    summary = {
        "checked": len(results),
        "wrong": wrong,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps({**summary, "results": [asdict(result) for result in results]}))
    return 1 if wrong else 0


def check(one: Configuration, compiler: str) -> Result:
    """Search the states of one configuration."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            output = search(one, compiler, Path(folder))
        except subprocess.TimeoutExpired:
            output = "took too long"
        except subprocess.CalledProcessError as error:
            output = f"could not be compiled: {(error.stdout or '').strip().splitlines()[-1:]}"
    states = re.search(r"^\s*(\d+) states, stored", output, re.MULTILINE)
    mib = re.search(r"([\d.]+)\s+total actual memory usage", output)
    return Result(
        one.name,
        judge(output),
        one.expected,
        int(states[1]) if states else 0,
        round(time.monotonic() - began, 1),
        float(mib[1]) if mib else 0.0,
    )


def search(one: Configuration, compiler: str, folder: Path, *, shortest: bool = False) -> str:
    """Generate, compile and run the search; return its output. A counterexample is left in the
    folder."""
    model = shutil.copy(HERE / f"{one.model}.pml", folder)
    run = ["spin", "-a", *one.defines, Path(model).name]
    subprocess.run(
        run, cwd=folder, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    # a mutant takes most of its time to compile, the others to search
    choices = ["-O0"] if one.expected == FAILS else ["-O2", "-DCOLLAPSE"] if one.full else ["-O1"]
    limit = f"-DMEMLIM={FULL_MIB if one.full else SMALL_MIB}"
    run = [
        compiler,
        "-w",
        *choices,
        "-DSAFETY",
        limit,
        *(["-DBFS"] if shortest else []),
        "-o",
        "pan",
        "pan.c",
    ]
    subprocess.run(
        run, cwd=folder, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    size = "-w20" if one.expected == FAILS else "-w28" if one.full else "-w24"
    # -E: a process that waits for ever is no error
    run = ["./pan", "-E", size, *one.options.split()]
    timeout = FULL_S if one.full else SMALL_S
    return subprocess.run(
        run,
        cwd=folder,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ).stdout


def judge(output: str) -> str:
    """Return the verdict from a search's output. Only a complete search proves ``HOLDS``."""
    if re.search(r"^pan:\d+: assertion violated", output, re.MULTILINE):
        return FAILS
    cut = re.search(rf"^.*(?:{CUT_OFF}).*$", output, re.MULTILINE)
    if cut:
        return f"cut off: {cut[0].strip()}"
    return HOLDS if re.search(r"errors: 0$", output, re.MULTILINE) else "no result"


def trace(one: Configuration, compiler: str) -> int:
    """Print the shortest counterexample of a mutant, one event per line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        verdict = judge(search(one, compiler, folder, shortest=True))
        if verdict != FAILS:
            print(f"{one.name}: {verdict}, so there is no trace", file=sys.stderr)
            return 1
        run = ["spin", "-t", *one.defines, f"{one.model}.pml"]
        replay = subprocess.run(run, cwd=folder, check=False, text=True, capture_output=True).stdout
    for line in replay.splitlines():
        _, found, event = line.partition("MSC: ")
        if found:
            print(event)
    return 0


def print_table(results: list[Result]) -> None:
    """Print one line per configuration."""
    width = max(len(result.name) for result in results)
    print(f"\n{'configuration':{width}}  {'verdict':10} {'states':>12} {'seconds':>8} {'MiB':>7}")
    for result in results:
        remark = "" if result.right else f"   EXPECTED: {result.expected}"
        print(
            f"{result.name:{width}}  {result.verdict:10} {result.states:12,} "
            f"{result.seconds:8.1f} {result.mib:7.0f}{remark}"
        )


if __name__ == "__main__":
    sys.exit(main())
