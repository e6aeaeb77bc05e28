"""``respcache doctor``: prints the findings, with fixes for problems."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from respcache.core.errors import ConfigurationError
from respcache.ops.application import load
from respcache.ops.cli.outcome import Failure, Status
from respcache.ops.cli.output import Output
from respcache.ops.doctor import Finding, Severity, diagnose

MARKS = {
    Severity.OK: ("ok", "green"),
    Severity.WARNING: ("warning", "yellow"),
    Severity.FAULT: ("FAULT", "bold red"),
}


def run(out: Output, *, app: str | None, tables: str | None, schema: str) -> Status:
    """Run all checks and print the findings. Return FAILED if there is a fault."""
    if app is not None and tables is not None:
        raise Failure(
            Status.USAGE, "--app and --tables both name the declared tables: use one of them"
        )
    declared = _declared(app) if app is not None else _listed(tables)
    findings = diagnose(os.environ, schema=schema, tables=declared)
    faults = sum(finding.level is Severity.FAULT for finding in findings)
    warnings = sum(finding.level is Severity.WARNING for finding in findings)
    document = {"faults": faults, "warnings": warnings, "findings": findings}
    out.emit(document, lambda: _render(out, findings, faults=faults, warnings=warnings))
    return Status.FAILED if faults else Status.OK


def _declared(target: str) -> set[str]:
    """Return the tables that the application's cached reads and its resolver declare."""
    application = load(target, Path.cwd())
    try:
        return application.declared_tables()
    except ConfigurationError as error:
        raise Failure(Status.FAILED, f"{target} does not start: {error}") from None


def _listed(tables: str | None) -> set[str] | None:
    if tables is None:
        return None
    named = {table.strip() for table in tables.split(",") if table.strip()}
    if not named:
        raise Failure(
            Status.USAGE, "--tables is empty: separate names by commas, such as accounts,leads"
        )
    return named


def _render(out: Output, findings: Sequence[Finding], *, faults: int, warnings: int) -> None:
    about = ""
    for finding in findings:
        if finding.about != about:
            if about and out.terminal:
                out.print()
            about = finding.about
            out.print(about, "bold")
        mark, style = MARKS[finding.level]
        out.print(
            Text.assemble("  ", (f"{mark:<8}", style), f" {finding.check:<15} ", finding.found)
        )
        if finding.level is not Severity.OK:
            out.print(Text.assemble(" " * 11, ("why   ", "dim"), finding.why))
            out.print(Text.assemble(" " * 11, ("fix   ", "dim"), (finding.fix, "cyan")))
    out.print()
    style = "bold red" if faults else "yellow" if warnings else "green"
    out.print(f"{len(findings)} checks: {faults} faults, {warnings} warnings", style)
