"""Tests every permission that a role needs, by calls that change nothing (``ops/acl.py``)."""

from typing import Any

import redis
from redis.exceptions import NoPermissionError

from respcache.ops.acl import AclRole, Probe
from respcache.ops.doctor.findings import DoctorReport


def check(report: DoctorReport, client: redis.Redis, role: AclRole, *, user: str) -> None:
    """Report which permissions of the role this user lacks. One round trip for each."""
    lacking = [right for probe in role.probes() if (right := _lacking(client, probe)) is not None]
    if not lacking:
        report.ok("rights", f"all {len(role.commands)} commands that the library needs")
        return
    rights = list(dict.fromkeys(lacking))
    quoted = " ".join(f"'{right}'" if right[0] in "~&" else right for right in rights)
    why = "commands fail: the cache is bypassed, or invalidations are not confirmed"
    if all(right[0] == "&" or right in ("+publish", "+subscribe") for right in rights):
        why = (
            "processes notice the writes of others later: entries in memory are revalidated only "
            "by the next read from the server"
        )
    report.fault(
        "rights",
        f"user {user} lacks {' '.join(rights)}",
        why=why,
        fix=f"valkey-cli -u ADMINISTRATOR_URL ACL SETUSER {user} {quoted}",
    )


def _lacking(client: redis.Redis, probe: Probe) -> str | None:
    """Test one permission; if the server denies it, return it as it appears in an ACL rule.

    It is a command, a key pattern or a channel.
    """
    connection: Any = client
    try:
        if probe.words[0] == "subscribe":
            with connection.pubsub() as listener:
                listener.subscribe(*probe.words[1:])
                listener.parse_response()
        else:
            connection.execute_command(*probe.words)
    except NoPermissionError as error:
        message = str(error)
        if "channel" in message:
            return f"&{probe.channel}"
        if "key" in message and "command" not in message:
            return f"~{probe.keys}"
        return f"+{probe.command}"
    except redis.ResponseError:
        pass  # rejected because of its arguments, after the ACL check
    return None
