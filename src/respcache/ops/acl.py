"""The permissions that a user of the cache server needs: as an ACL rule, and as probes that test
each of them.

A *probe* is a call that the server rejects because of its arguments, or that only reads, so that it
changes nothing. The server checks the ACL first: ``NOPERM`` means that the permission is missing,
every other reply that it is granted. Commands that scripts call are probed like those that are
sent.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from respcache.core.keys import BUMPS_CHANNEL, EPOCH_KEY, SWITCHES_KEY, generation_key

PROBED = "respcache-doctor"
"""The tenant in the keys of probes, which create none."""

NO_SCRIPT = "0" * 40

KEYS = ("tenant:*", "respcache:~*")

DRY: dict[str, tuple[str, ...]] = {
    "del": (),
    "get": (),
    "hdel": ("n",),
    "hincrby": ("field", "none"),
    "hkeys": (),
    "hlen": (),
    "hmget": ("n",),
    "hset": ("n", "0", "odd"),
    "pexpire": ("none",),
    "pttl": (),
    "set": ("0", "none"),
}
"""Arguments after the key, for a call that changes nothing."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A call that tests the permission for a command (spelled as in a rule), and for a key pattern
    or a channel."""

    command: str
    words: tuple[str, ...]
    keys: str = ""
    channel: str = ""


@dataclass(frozen=True, slots=True)
class AclRole:
    """A user and its permissions.

    ``on_keys`` are commands whose first argument is a key, ``plain`` all others.
    """

    name: str
    purpose: str
    on_keys: tuple[str, ...]
    plain: dict[str, tuple[str, ...]]
    """Maps a command as in a rule (``config|get``) to a call that changes nothing."""
    keys: tuple[str, ...] = KEYS
    channels: tuple[str, ...] = ()

    @property
    def commands(self) -> tuple[str, ...]:
        """All commands, sorted."""
        return tuple(sorted({*self.on_keys, *self.plain}))

    def rule(self, *, password: str = "PASSWORD", user: str | None = None) -> str:
        """Return the command that creates this user with these permissions only.

        It works with Redis 6.2, Valkey 7.2 and newer versions.
        """
        parts = ["ACL SETUSER", user or self.name, "reset", "resetchannels", "on", f">{password}"]
        parts += [f"~{pattern}" for pattern in self.keys] + [
            f"&{channel}" for channel in self.channels
        ]
        return " ".join([*parts, *(f"+{command}" for command in self.commands)])

    def probes(self) -> Iterator[Probe]:
        """Yield a probe for each command, and for each key outside of the tenants' keys."""
        for command in self.on_keys:
            yield Probe(command, (command, generation_key(PROBED), *DRY[command]), keys=KEYS[0])
        for command, words in self.plain.items():
            yield Probe(command, words, channel=BUMPS_CHANNEL)
        for key in (EPOCH_KEY, SWITCHES_KEY):
            yield Probe("set", ("set", key, *DRY["set"]), keys=KEYS[1])


DATA_PLANE = AclRole(
    "respcache",
    "the application: REDIS_CACHE_URL",
    on_keys=tuple(DRY),
    plain={
        "eval": ("eval", "return 1", "0"),
        "evalsha": ("evalsha", NO_SCRIPT, "0"),
        "info": ("info", "replication"),
        "ping": ("ping",),
        "publish": ("publish", BUMPS_CHANNEL, ""),
        "select": ("select", "none"),
        "subscribe": ("subscribe", BUMPS_CHANNEL),
    },
    channels=(BUMPS_CHANNEL,),
)

ADMINISTRATION = AclRole(
    "respcache-admin",
    "administration: statistics, key search and feed (StatsPublisher(url)), and respcache doctor",
    on_keys=(
        *("del", "exists", "expire", "get", "getrange", "hget", "hgetall", "hincrby", "hlen"),
        *("hset", "pttl", "sadd", "set", "srandmember", "srem", "strlen", "xadd", "xrange"),
        *("xrevrange", "zadd", "zremrangebyscore"),
    ),
    plain=dict.fromkeys(
        ("config|get", "dbsize", "exec", "info", "multi", "publish", "scan", "select", "time"), ()
    ),
    channels=(BUMPS_CHANNEL,),
)
"""Its permissions are not probed: ``plain`` only names commands."""

ROLES = {"application": DATA_PLANE, "administration": ADMINISTRATION}
