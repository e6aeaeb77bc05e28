"""How a command ends: its exit status, and what it says when it cannot do what it was asked."""

from enum import IntEnum


class Status(IntEnum):
    """Exit statuses, the same for all commands."""

    OK = 0
    FAILED = 1
    """A check found a fault, or what was asked for is not there."""
    USAGE = 2
    UNREACHABLE = 3
    """No answer from the application."""
    REFUSED = 4
    """The application does not let this token do that, or nobody confirmed it."""


class Failure(Exception):
    """A command cannot go on; the message says why and what to do. Caught by
    ``output.Output.running``."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
