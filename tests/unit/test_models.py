"""The models speak of the code: their names exist on both sides."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests import needs

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
NAMES = re.findall(
    r"^\| (\w+\.pml) \| (\w+) \| (src/\S+) \| (\w+) \|$",
    (MODELS / "README.md").read_text(),
    re.MULTILINE,
)


def test_there_are_names() -> None:
    """The table is found, and it speaks of all models of the protocol."""
    assert {model for model, _, _, _ in NAMES} == {"core.pml", "serving_lease.pml", "composed.pml"}


@pytest.mark.parametrize(("model", "there", "file", "here"), NAMES, ids=lambda name: name)
def test_a_name_exists_in_the_model_and_in_the_code(
    model: str, there: str, file: str, here: str
) -> None:
    """Whoever renames one side is told of the other."""
    for path, name in ((MODELS / model, there), (ROOT / file, here)):
        assert re.search(rf"(?<!\w){name}(?!\w)", path.read_text()), f"{path.name} has no {name}"


def test_every_mutant_is_run() -> None:
    """What a model lists as its mutants is among the configurations."""
    run = (MODELS / "run.py").read_text()
    for path in MODELS.glob("*.pml"):
        listed = re.search(r"Mutants: ([A-Z0-9 ]+)", path.read_text())
        for name in listed[1].split() if listed else []:
            assert f'"{name}"' in run, f"{path.name}: {name}"


@pytest.mark.long
@needs.SPIN
def test_the_models_hold_and_every_mutant_fails() -> None:
    """All states of the small configurations are checked: ``make model``."""
    done = subprocess.run(
        [sys.executable, str(MODELS / "run.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
