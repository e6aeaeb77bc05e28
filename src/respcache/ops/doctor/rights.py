"""The dry check of an ACL: every right that a role needs is tried, by calls that change nothing
(``ops/acl.py``)."""

from typing import Any

import redis
from redis.exceptions import NoPermissionError

from respcache.ops.acl import AclRole, Probe
from respcache.ops.doctor.findings import DoctorReport


def check(report: DoctorReport, client: redis.Redis, role: AclRole, *, user: str) -> None:
    """Say what this user lacks of the role's rights. A round trip for each."""
    lacking = [right for probe in role.probes() if (right := _lacking(client, probe)) is not None]
    if not lacking:
        report.ok("rights", f"all {len(role.commands)} commands that the library needs")
        return
    rights = list(dict.fromkeys(lacking))
    quoted = " ".join(f"'{right}'" if right[0] in "~&" else right for right in rights)
    why = (
        "what a process may not do fails: the cache is bypassed, or invalidations are not confirmed"
    )
    if all(right[0] == "&" or right in ("+publish", "+subscribe") for right in rights):
        why = (
            "what other processes write is noticed later: in memory by the next look at the server"
        )
    report.fault(
        "rights",
        f"user {user} lacks {' '.join(rights)}",
        why,
        f"valkey-cli -u ADMINISTRATOR_URL ACL SETUSER {user} {quoted}",
    )


def _lacking(client: redis.Redis, probe: Probe) -> str | None:
    """Try one right; return it, or the key pattern or channel, as it stands in a rule, where the
    server refuses."""
    asked: Any = client
    try:
        if probe.words[0] == "subscribe":
            with asked.pubsub() as listener:
                listener.subscribe(*probe.words[1:])
                listener.parse_response()
        else:
            asked.execute_command(*probe.words)
    except NoPermissionError as error:
        said = str(error)
        if "channel" in said:
            return f"&{probe.channel}"
        return f"~{probe.keys}" if "key" in said and "command" not in said else f"+{probe.command}"
    except redis.ResponseError:
        pass  # refused for its arguments: after the ACL let it through
    return None
