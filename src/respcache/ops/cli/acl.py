"""``respcache acl``: the users of the server, as commands that make them."""

from respcache.ops.acl import ROLES
from respcache.ops.cli.outcome import Failure, Status
from respcache.ops.cli.output import Output


def run(out: Output, *, role: str | None) -> Status:
    """Print the rule of each role, or of one."""
    if role is not None and role not in ROLES:
        raise Failure(Status.USAGE, f"--role {role!r} is none: known are {', '.join(ROLES)}")
    chosen = {name: known for name, known in ROLES.items() if role in (None, name)}
    document = {
        name: {"user": known.name, "for": known.about, "rule": known.rule(), "keys": known.keys, "channels": known.channels,
               "commands": known.commands}
        for name, known in chosen.items()
    }  # fmt: skip

    def render() -> None:
        for known in chosen.values():
            out.say(f"# {known.about}", "dim")
            out.say(known.rule())
        out.say(
            "# put a password of yours in place of PASSWORD; ACL SAVE keeps it where the server "
            "has an aclfile",
            "dim",
        )

    out.emit(document, render)
    return Status.OK
