"""How a command ends: its exit status, and the exception that ends it with a message."""

from enum import IntEnum


class Status(IntEnum):
    """Exit statuses, the same for all commands."""

    OK = 0
    FAILED = 1
    """A check found a fault, or the requested item does not exist."""
    USAGE = 2
    UNREACHABLE = 3
    """The application cannot be reached."""
    REFUSED = 4
    """The token does not permit the command, or it was not confirmed."""


class Failure(Exception):
    """Ends a command with a message that says why and what to do.

    ``output.Output.running`` catches it.
    """

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
