"""What a user of the server must be allowed: as a rule for its ACL, and call by call, so that it
can be tried.

Each right has a *probe*: a call that the server refuses for its arguments, or that only reads, so
that nothing changes. The server looks at the ACL first: ``NOPERM`` means that the right is missing,
every other answer that it is there. Commands that our scripts call are checked like those that are
sent.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from respcache.core.keys import BUMPS_CHANNEL, EPOCH_KEY, SWITCHES_KEY, generation_key

PROBED = "respcache-doctor"
"""The tenant under whose keys probes are made. They make none."""

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
"""What follows the key in a call that changes nothing."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A call that tries a command, as it stands in a rule, and with it a key pattern or a
    channel."""

    command: str
    words: tuple[str, ...]
    keys: str = ""
    channel: str = ""


@dataclass(frozen=True, slots=True)
class AclRole:
    """Who logs in with which rights. ``on_keys`` are commands that take a key first, ``plain``
    those that take none."""

    name: str
    about: str
    on_keys: tuple[str, ...]
    plain: dict[str, tuple[str, ...]]
    """Command as in a rule (``config|get``) to the words of a call that changes nothing."""
    keys: tuple[str, ...] = KEYS
    channels: tuple[str, ...] = ()

    @property
    def commands(self) -> tuple[str, ...]:
        """Name all commands, sorted."""
        return tuple(sorted({*self.on_keys, *self.plain}))

    def rule(self, *, password: str = "PASSWORD", user: str | None = None) -> str:
        """Return the command that makes this user and nothing more, for Redis 6.2, Valkey 7.2 or
        newer."""
        parts = ["ACL SETUSER", user or self.name, "reset", "resetchannels", "on", f">{password}"]
        parts += [f"~{pattern}" for pattern in self.keys] + [
            f"&{channel}" for channel in self.channels
        ]
        return " ".join([*parts, *(f"+{command}" for command in self.commands)])

    def probes(self) -> Iterator[Probe]:
        """Yield a call for each command, and for each key of its own."""
        for command in self.on_keys:
            yield Probe(command, (command, generation_key(PROBED), *DRY[command]), keys=KEYS[0])
        for command, words in self.plain.items():
            yield Probe(command, words, channel=BUMPS_CHANNEL)
        for key in (EPOCH_KEY, SWITCHES_KEY):
            yield Probe("set", ("set", key, *DRY["set"]), keys=KEYS[1])


DATA_PLANE = AclRole(
    "respcache",
    "the application: REDIS_CACHE_URL",
    on_keys=(
        "del",
        "get",
        "hdel",
        "hincrby",
        "hkeys",
        "hlen",
        "hmget",
        "hset",
        "pexpire",
        "pttl",
        "set",
    ),
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
    "administration: the board of figures, the search of keys, the feed (Board(url)), and "
    "respcache doctor",
    on_keys=(
        "del", "exists", "expire", "get", "getrange", "hget", "hgetall", "hincrby", "hlen", "hset", "pttl", "sadd", "set",
        "srandmember", "srem", "strlen", "xadd", "xrange", "xrevrange", "zadd", "zremrangebyscore",
    ),
    plain=dict.fromkeys(
        ("config|get", "dbsize", "exec", "info", "multi", "publish", "scan", "select", "time"), ()
    ),
    channels=(BUMPS_CHANNEL,),
)  # fmt: skip
"""Nobody tries it call by call: ``plain`` only names what it may."""

ROLES = {"application": DATA_PLANE, "administration": ADMINISTRATION}
