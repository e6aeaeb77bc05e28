"""``respcache acl``: commands that create the users of the cache server."""

from respcache.ops.acl import ROLES
from respcache.ops.cli.outcome import Failure, Status
from respcache.ops.cli.output import Output


def run(out: Output, *, role: str | None) -> Status:
    """Print the rule of each role, or of one."""
    if role is not None and role not in ROLES:
        raise Failure(Status.USAGE, f"--role {role!r} is unknown: use one of {', '.join(ROLES)}")
    chosen = {name: known for name, known in ROLES.items() if role in (None, name)}
    document = {
        name: {
            "user": known.name,
            "for": known.purpose,
            "rule": known.rule(),
            "keys": known.keys,
            "channels": known.channels,
            "commands": known.commands,
        }
        for name, known in chosen.items()
    }

    def render() -> None:
        for known in chosen.values():
            out.print(f"# {known.purpose}", "dim")
            out.print(known.rule())
        out.print(
            "# replace PASSWORD; ACL SAVE makes the user permanent if the server has an aclfile",
            "dim",
        )

    out.emit(document, render)
    return Status.OK
