"""Whatever happens, in whatever order: no read is stale. Random schedules of the real code in a
simulated world.

``SIMULATION_SECONDS`` is how long schedules run in the long test (60), ``SIMULATION_FIRST`` the
first seed (0).
"""

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.simulation.schedule import FAULTS, Mix, Result, run

SECONDS = float(os.environ.get("SIMULATION_SECONDS", "60"))
FIRST = int(os.environ.get("SIMULATION_FIRST", "0"))
ROOT = Path(__file__).parents[2]
LEAST_SCHEDULES = 200
"""How many run in any case: what must have happened has happened in these."""

HAPPENED = (
    *(
        "reads",
        "hits",
        "misses",
        "stores",
        "joined fills",
        "bounded is served by token",
        "bypass: no-lease",
        "bypass: store",
        "bypass: no-trigger",
    ),
    *(
        "writes",
        "writes of others",
        "writers died",
        "commits unknown",
        "commits lost",
        "invalidations by hand",
    ),
    *(
        "acknowledged: confirmed",
        "acknowledged: pending; safe",
        "acknowledgements delayed",
        "rounds",
        "rounds failed",
        "epochs",
    ),
    *(
        "rows pruned",
        "message lost",
        "message late",
        "store timeout",
        *(f"fault: {kind}" for kind in FAULTS),
    ),
)


def test_no_read_is_stale_in_a_few_hundred_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    """I1, I3, I5 and no invention, in every schedule; and the schedules were worth it."""
    check_schedules(capsys, seconds=0.0)


@pytest.mark.long
def test_no_read_is_stale_in_any_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    """The same, for ``SIMULATION_SECONDS``."""
    check_schedules(capsys, seconds=SECONDS)


def check_schedules(capsys: pytest.CaptureFixture[str], *, seconds: float) -> None:
    """Run schedules for some seconds, at least ``LEAST_SCHEDULES``; none violates an invariant."""
    end = time.monotonic() + seconds
    counts: Counter[str] = Counter()
    schedules = 0
    while schedules < LEAST_SCHEDULES or time.monotonic() < end:
        result = run(FIRST + schedules)
        assert not result.violations, report(result)
        counts += result.counts
        schedules += 1
    with capsys.disabled():
        print(
            f"\n{schedules} schedules: "
            + ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
        )
    assert not [name for name in HAPPENED if not counts[name]]
    assert counts["hits"] > counts["reads"] / 4


def test_the_same_seed_gives_the_same_trace() -> None:
    """Nothing depends on the clock, on the order of sets, or on what ran before."""
    script = "from tests.simulation.test_schedules import digests; print(digests())"
    for hash_seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", script],
            env={
                **os.environ,
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == digests()


def test_calm_weather_is_served_from_the_cache() -> None:
    """Without faults nothing is bypassed once the first round is over, and no acknowledgement
    waits."""
    calm = Mix(
        writers={"acknowledged": 3, "outsider": 1},
        most_faults=0,
        small_limits=0.0,
        deferred=0.0,
        trouble=(0.0,),
    )
    counts: Counter[str] = Counter()
    for seed in range(20):
        result = run(seed, calm)
        assert not result.violations, report(result)
        counts += result.counts
    assert counts["hits"] > counts["reads"] / 3  # requests and values are different entries
    assert (
        counts["bypasses"] == counts["rounds failed"] == counts["acknowledged: pending; safe"] == 0
    )


def digests() -> str:
    """Sum up the traces of a few schedules."""
    traces = "\n".join(run(seed).text(lines=100_000) for seed in range(6))
    return hashlib.blake2b(traces.encode()).hexdigest()


def report(result: Result) -> str:
    """Show a violation, what came before it, and how to see it again."""
    command = f".venv/bin/python -m tests.simulation.schedule {result.seed}"
    return f"{result.violations[0]}\n\n{result.text()}\n\nall of it: {command}"
