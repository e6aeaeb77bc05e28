"""Findings of checks: a verdict, what was found, and for problems why they matter and the fix."""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """The severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check.

    ``about`` is what was checked: cache, memory, servers, database or environment.
    """

    about: str
    check: str
    level: Severity
    found: str
    why: str = ""
    fix: str = ""
    """The exact command, or what to change and where."""


class DoctorReport:
    """Collects the findings about one thing."""

    def __init__(self, about: str) -> None:
        self.about = about
        self.findings: list[Finding] = []

    def ok(self, check: str, found: str) -> None:
        """Report that a check passed."""
        self._add(Severity.OK, check, found)

    def warn(self, check: str, found: str, *, why: str, fix: str) -> None:
        """Report something that works, but not as it should."""
        self._add(Severity.WARNING, check, found, why=why, fix=fix)

    def fault(self, check: str, found: str, *, why: str, fix: str) -> None:
        """Report something that is broken or insecure."""
        self._add(Severity.FAULT, check, found, why=why, fix=fix)

    def _add(
        self, level: Severity, check: str, found: str, *, why: str = "", fix: str = ""
    ) -> None:
        self.findings.append(
            Finding(about=self.about, check=check, level=level, found=found, why=why, fix=fix)
        )
