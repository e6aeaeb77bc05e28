"""The whole API under generated requests: nothing that anybody may send is a server error, and the
schema says what comes."""

import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from .conftest import MODULES
from .system import Start, System

SEED = "7"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


def configure(system: System, token: str) -> str:
    """Name records that exist, each operation its own: generated ids would only ever meet a 404."""
    lines = ["[parameters]", 'tenant_id = "acme"', 'x-tenant-id = "acme"']
    for module in MODULES:
        found = httpx2.get(
            f"{system.base}/api/{module}?limit=9", headers={"authorization": f"Bearer {token}"}
        )
        ids = [record["id"] for record in found.json()["data"][module]]
        for operation in ("GET", "PUT", "DELETE"):
            lines += operation_lines(operation, f"/api/{module}/{{id}}", ids.pop())
        extra = {"leads": "convert", "bizdevsources": "promote"}.get(module)
        if extra:
            lines += operation_lines("POST", f"/api/{module}/{{id}}/{extra}", ids.pop())
    return "\n".join(lines)


def operation_lines(method: str, path: str, key: str) -> list[str]:
    return [
        "[[operations]]",
        f'include-method = "{method}"',
        f'include-path = "{path}"',
        f'parameters = {{ "path.id" = "{key}" }}',
    ]


@pytest.mark.parametrize(
    ("phases", "examples"),
    [
        ("examples,fuzzing", 1),
        pytest.param("examples,coverage,fuzzing", 25, marks=pytest.mark.long),
    ],
)
def test_no_generated_request_is_a_server_error(
    start: Start, tmp_path: Path, phases: str, examples: int
) -> None:
    """Each operation gets a generated request; in the long run, thousands in all."""
    system = start().ready()
    token = system.command("token", "--tenant", "acme", "--role", "admin").stdout.strip()
    (tmp_path / "schemathesis.toml").write_text(configure(system, token))
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--no-color"),
        *("run", f"{system.base}/openapi.json", "--header", f"Authorization: Bearer {token}"),
        *("--checks", ",".join(CHECKS), "--phases", phases, "--max-examples", str(examples)),
        *("--workers", "1", "--seed", SEED, "--continue-on-failure", "--warnings", "off"),
        "--no-shrink",
    ]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    schema = httpx2.get(f"{system.base}/openapi.json").json()
    operations = sum(len(methods) for methods in schema["paths"].values())
    assert operations > 50
    assert re.findall(r"Tested: (\d+)", ran.stdout) == [str(operations)]
