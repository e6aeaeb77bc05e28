"""What a check says: a verdict, what was found, and, unless all is well, why it matters and how to
mend it."""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. ``about`` is what was looked at: cache, memory, database,
    application, environment."""

    about: str
    check: str
    level: Severity
    found: str
    why: str = ""
    mend: str = ""
    """The exact command, or what to change where."""


class DoctorReport:
    """Collects the findings about one thing."""

    def __init__(self, about: str) -> None:
        self.about = about
        self.findings: list[Finding] = []

    def ok(self, check: str, found: str) -> None:
        """Say that all is well."""
        self.findings.append(Finding(self.about, check, Severity.OK, found))

    def warn(self, check: str, found: str, why: str, mend: str) -> None:
        """Say what works, but not as it should."""
        self.findings.append(Finding(self.about, check, Severity.WARNING, found, why, mend))

    def fault(self, check: str, found: str, why: str, mend: str) -> None:
        """Say what is broken or unsafe."""
        self.findings.append(Finding(self.about, check, Severity.FAULT, found, why, mend))
