"""What the map in ARCHITECTURE.md promises of imports, and what the package offers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import respcache

SOURCE = Path(respcache.__file__).parent
ALLOWED_IN_CORE = {
    "__future__",
    "backports",
    "collections",
    "compression",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "re",
    "respcache",
    "struct",
    "sys",
    "typing",
    "urllib",
    "zlib",
}


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, at any depth of it."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", sorted((SOURCE / "core").glob("*.py")), ids=lambda path: path.name)
def test_core_is_pure(path: Path) -> None:
    """No I/O, no clock, no randomness."""
    for module in imports(path):
        assert module.split(".")[0] in ALLOWED_IN_CORE, module


def library_imports() -> dict[str, set[str]]:
    """Return, for each module of the library, the modules of the library that it imports.

    Imports inside functions and under ``TYPE_CHECKING`` count.
    """
    paths = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in SOURCE.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & set(paths)
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found[name] |= {full if full in paths else node.module} & set(paths)
        found[name].discard(name)
    return found


def test_no_module_is_part_of_an_import_cycle() -> None:
    """Not even of one that exists for type checking only."""
    graph = library_imports()
    cycles = [module for module in graph if module in _reachable(graph, graph[module])]
    assert cycles == []


def _reachable(graph: dict[str, set[str]], start: set[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += graph[module]
    return found


def test_imports_are_those_of_the_list_in_the_architecture() -> None:
    """The complete list: every part imports what it says there, and everything there is needed."""
    needed: dict[str, set[str]] = {}
    for module, imported in library_imports().items():
        part = _part(module)
        needed.setdefault(part, set()).update(_part(one) for one in imported)
        needed[part].discard(part)
    page = (SOURCE.parent.parent / "ARCHITECTURE.md").read_text()
    items = re.findall(
        r"^\* `(\w+)` imports (.*?)(?=\n\*|\n\n)", page.split("## Allowed imports")[1], re.M | re.S
    )
    assert {part: set(re.findall(r"`(\w+)`", parts)) for part, parts in items} == needed


def _part(module: str) -> str:
    """Return the name of the folder or file below the package, or ``respcache`` for itself."""
    parts = module.split(".")
    return parts[min(1, len(parts) - 1)]


def test_the_architecture_is_short() -> None:
    """At most 1,500 words."""
    page = (SOURCE.parent.parent / "ARCHITECTURE.md").read_text()
    assert len(page.split()) <= 1500


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE))
)
def test_the_library_knows_nothing_of_the_application(path: Path) -> None:
    """Nothing of the CRM; web frameworks and the ORM only in the files named after them."""
    names = {module.split(".")[0] for module in imports(path)}
    assert "crm" not in names
    if path.name not in (
        "fastapi.py",
        "sqlalchemy.py",
        "statements.py",
        "postgres.py",
        "postgres_audit_log.py",
        "alembic.py",
        "database.py",
    ):
        assert not names & {"alembic", "fastapi", "sqlalchemy", "pydantic"}
        assert "starlette" not in names or "dashboard" in path.parts
    if path.name != "publisher.py" and "doctor" not in path.parts:
        assert "redis" not in names
    if "cli" not in path.parts:
        assert not names & {"typer", "rich", "httpx2"}


def test_importing_the_library_imports_no_framework() -> None:
    """They are paid for only by who uses them."""
    names = ("alembic", "fastapi", "starlette", "sqlalchemy", "redis", "pydantic")
    code = (
        f"import sys; from respcache import *; print([name for name in {names} if name in "
        f"sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    "module",
    [
        *respcache._HOMES,  # private: the table of lazy imports is what is tested here
        "middleware",
        "integrations.uvicorn",
        "writes.postgres",
        "writes.sqlalchemy",
        "ops.admin",
    ],
)
def test_modules_can_be_imported_first(module: str) -> None:
    """The package itself imports nothing until it is asked for a name, so no module can count on
    another one being there."""
    subprocess.run([sys.executable, "-c", f"import respcache.{module}"], check=True)


def test_public_names_are_sorted_and_exist() -> None:
    """The surface is small and says what it is."""
    assert respcache.__all__ == sorted(respcache.__all__)
    assert all(hasattr(respcache, name) for name in respcache.__all__)


def test_the_store_scans_no_keyspace() -> None:
    """Invalidation is O(1): no command that walks the keys stands anywhere in the library."""
    walking = {"KEYS", "SCAN", "FLUSHDB", "FLUSHALL"}
    for path in SOURCE.rglob("*.py"):
        if {"dashboard", "cli"} & set(path.parts) or path.name == "acl.py":
            continue  # speak to no server; their pages, commands and rights are named so
        constants = (
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant)
        )
        found = walking & {value.upper() for value in constants if isinstance(value, str)}
        # there it is a word in the reply of INFO
        assert found <= ({"KEYS"} if path.name in ("shapes.py", "metrics.py") else set()), path
        named = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        }
        if path.name != "keyspace.py":  # for operators, with a bound
            assert not named & {"scan", "scan_iter", "flushdb", "flushall"}, path
    for path in SOURCE.rglob("*.lua"):
        called = re.findall(r"redis\.call\('(\w+)'", path.read_text())
        assert called
        assert not walking & set(called), path


def test_every_script_touches_one_key() -> None:
    """So that it runs on a cluster."""
    for path in SOURCE.rglob("*.lua"):
        assert "KEYS[2]" not in path.read_text()
