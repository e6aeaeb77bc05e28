"""What tests may do: reach into private attributes in few places, each with a reason, and skip only
with a reason that names the command that enables the test."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
MOST_PRIVATE = 20
"""Places in all tests together that reach into private attributes of another module."""
REASON = re.compile(r"# private: \w")
PUBLIC = {"_exit"}
"""Names that begin with an underscore and are public: ``os._exit``."""
SABOTAGE = {"faults/sabotage.py", "simulation/sabotage.py"}
"""Files that are not counted: their only purpose is to break the code inside."""
SKIPS = {"skip", "skipif", "importorskip"}


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return name.strip("_") != "" and name[0] == "_" and name[:2] != "__" and name not in PUBLIC


def private_names(node: ast.AST) -> list[str]:
    """Return the private names of other modules that a node uses."""
    if isinstance(node, ast.Attribute):
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        return [node.attr] if not own and is_private(node.attr) else []
    if isinstance(node, ast.ImportFrom):
        return [alias.name for alias in node.names if is_private(alias.name)]
    if isinstance(node, ast.Call) and len(node.args) > 1:  # getattr, setattr, replaced, ...
        name = node.args[1]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            return [name.value] if is_private(name.value) and name.value.isidentifier() else []
    return []


def places(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield each line of a file that uses a private name of another module, and whether it says
    why: on the line, or on the one above it."""
    lines = path.read_text().splitlines()
    found = {
        node.lineno
        for node in ast.walk(ast.parse("\n".join(lines)))
        if isinstance(node, (ast.Attribute, ast.ImportFrom, ast.Call)) and private_names(node)
    }
    for number in sorted(found):
        near = lines[max(number - 2, 0) : number]
        yield f"{path.relative_to(TESTS)}:{number}", any(map(REASON.search, near))


def test_few_places_reach_into_private_attributes_and_each_says_why() -> None:
    """A ``# private: reason`` stands beside each of them; better is a test of public behavior."""
    files = [
        path for path in sorted(TESTS.rglob("*.py")) if str(path.relative_to(TESTS)) not in SABOTAGE
    ]
    found = [place for path in files for place in places(path)]
    assert [where for where, reason in found if not reason] == []
    assert len(found) <= MOST_PRIVATE, [where for where, _ in found]


def test_every_skip_names_what_enables_the_test() -> None:
    """``tests/needs.py`` makes all of them, so that the end of a run can list them."""
    for path in TESTS.rglob("*.py"):
        if path.name == "needs.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = called.attr if isinstance(called, ast.Attribute) else ""
            assert name not in SKIPS, f"{path}:{node.lineno}: use tests/needs.py"
