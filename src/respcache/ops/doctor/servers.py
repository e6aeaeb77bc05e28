"""Checks of the two servers: the cache server, which must evict and may lose data, and the server
for agent memory, which must do neither.

The checks only read. What the user of a server may not read is reported as unchecked.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from respcache.core.epochs import Epoch, decode_epoch
from respcache.core.errors import ConfigurationError
from respcache.core.keys import EPOCH_KEY
from respcache.ops.acl import AclRole
from respcache.ops.doctor import rights
from respcache.ops.doctor.findings import DoctorReport
from respcache.ops.doctor.secrets import is_default, is_local
from respcache.resp.url import ServerURL

DEADLINE_S = 3.0
OLDEST_VERSION = (6, 2)
SKEW_S = 5.0
LEAST_PUBSUB_BYTES = 1024 * 1024
EVICTS = ("allkeys-", "volatile-")


@dataclass
class CheckedServer:
    """What a server reports about itself. ``config`` is None if this user may not read it."""

    variable: str
    """The environment variable that contains its address."""
    url: ServerURL
    info: Mapping[str, Any]
    config: Mapping[str, str] | None
    skew_s: float
    epoch: Epoch | None = None
    cli: str = field(init=False)
    """The shell command that connects to it, with the password from the environment."""

    def __post_init__(self) -> None:
        user = f" --user {self.url.user}" if self.url.user else ""
        self.cli = (
            f"valkey-cli -s {self.url.path}{user}"
            if self.url.path
            else f'valkey-cli -u "${self.variable}"'
        )

    @property
    def identity(self) -> str:
        """The id of this life of the server, as in the serving lease."""
        return str(self.info.get("master_replid", ""))

    @property
    def version(self) -> str:
        """The version number; for Valkey its own, not the Redis version that it also reports."""
        return str(self.info.get("valkey_version") or self.info.get("redis_version", "0"))

    def sets(self, name: str, value: str) -> str:
        """Return the command that sets an option, in the running server and in its file."""
        return f"{self.cli} CONFIG SET {name} {value}; {self.cli} CONFIG REWRITE"


def examine(
    report: DoctorReport,
    url: str | None,
    *,
    variable: str,
    memory: bool,
    role: AclRole | None = None,
) -> CheckedServer | None:
    """Check one server. Return what it reports, or None if it cannot be reached.

    Takes a few round trips, and one for each permission of ``role``.
    """
    if url is None:
        _unset(report, variable, memory=memory)
        return None
    try:
        parsed = ServerURL.parse(url)
    except ConfigurationError as error:
        report.fault(
            "address", str(error), why="nothing can connect to it", fix=f"correct {variable}"
        )
        return None
    with _connected(report, url, parsed, variable=variable) as client:
        if client is None:
            return None
        server = _ask(variable, parsed, client)
        report.ok("reachable", f"{parsed}, {_kind(server.info)} {server.version}")
        _check_version(report, server)
        _check_role(report, server)
        _check_eviction(report, server, memory=memory)
        _check_persistence(report, server, memory=memory)
        _check_encryption(report, server, variable)
        _check_password(report, server, variable)
        _check_connections(report, server)
        _check_clock(report, server)
        if role is not None:
            rights.check(report, client, role, user=parsed.user or "default")
            server.epoch = _epoch(client)
        return server


def compare(
    report: DoctorReport, cache: CheckedServer | None, memory: CheckedServer | None
) -> bool:
    """Check that the two servers differ; return whether they are the same server."""
    if cache is None or memory is None or cache.info.get("run_id") is None:
        return False
    if cache.info.get("run_id") != memory.info.get("run_id"):
        report.ok("two servers", f"{cache.url} and {memory.url} are different processes")
        return False
    where = (
        "and one database"
        if cache.url.database == memory.url.database
        else "with two database numbers"
    )
    report.fault(
        "two servers",
        f"REDIS_CACHE_URL and REDIS_URL are one server {where}",
        why="memory limit, eviction and persistence apply to a server, not to a database: either "
        "data that must not be lost is evicted with the cache, or the cache fills up and rejects "
        "writes",
        fix="start a second server for agent memory (maxmemory-policy noeviction, appendonly yes) "
        "and set REDIS_URL to it",
    )
    return True


def _unset(report: DoctorReport, variable: str, *, memory: bool) -> None:
    if memory:
        report.ok("reachable", f"{variable} is not set: no agent memory to check")
    else:
        report.fault(
            "reachable",
            f"{variable} is not set",
            why="without a server nothing is cached across processes",
            fix=f"export {variable}=redis://:PASSWORD@HOST:6379/0",
        )


@contextmanager
def _connected(
    report: DoctorReport, url: str, parsed: ServerURL, *, variable: str
) -> "Iterator[redis.Redis | None]":
    """Connect and log in; yield None and report it if that fails."""
    why = (
        "the application works without it, but slower"
        if report.about == "cache"
        else "agent memory cannot be reached"
    )
    client = _client(url)
    try:
        client.ping()
    except redis.AuthenticationError as error:
        client.close()
        report.fault(
            "reachable",
            f"{parsed} refuses the login: {error}",
            why=why,
            fix=f"set the right user and password in {variable}",
        )
        yield None
        return
    except NoPermissionError:
        pass  # it is reachable; the permissions are checked one by one
    except redis.RedisError as error:
        client.close()
        message = str(error).rstrip(".") or type(error).__name__
        report.fault(
            "reachable",
            f"{parsed} cannot be reached: {message}",
            why=why,
            fix=f"start the server, or correct host, port and scheme in {variable}; test it with "
            f'valkey-cli -u "${variable}" PING',
        )
        yield None
        return
    try:
        yield client
    finally:
        client.close()


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(
        url,
        socket_timeout=DEADLINE_S,
        socket_connect_timeout=DEADLINE_S,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )


def _ask(variable: str, url: ServerURL, client: redis.Redis) -> CheckedServer:
    info: Any = {}
    config: Any = None
    with suppress(redis.ResponseError):
        info = client.info()
    with suppress(redis.ResponseError):
        config = client.config_get("*")
    return CheckedServer(variable, url, info, config, _skew_s(client))


def _skew_s(client: redis.Redis) -> float:
    """Return how far the server's clock is ahead of ours, assuming that the reply takes half of the
    round trip; 0 if this user may not read it."""
    before = time.time()
    try:
        seconds, microseconds = client.time()
    except redis.ResponseError:
        return 0.0
    return float(seconds) + float(microseconds) / 1e6 - (before + time.time()) / 2


def _epoch(client: redis.Redis) -> Epoch | None:
    try:
        record = client.get(EPOCH_KEY)
    except redis.ResponseError:
        return None
    return decode_epoch(record) if isinstance(record, str) else None


def _kind(info: Mapping[str, Any]) -> str:
    return "Valkey" if info.get("server_name") == "valkey" or "valkey_version" in info else "Redis"


def _check_version(report: DoctorReport, server: CheckedServer) -> None:
    number = tuple(int(part) for part in server.version.split(".")[:2] if part.isdigit())
    if number >= OLDEST_VERSION:
        report.ok("version", server.version)
    elif server.info:
        report.fault(
            "version",
            server.version,
            why="RESP3 and the scripts need Redis 6.2, or any Valkey",
            fix="upgrade the server",
        )


def _check_role(report: DoctorReport, server: CheckedServer) -> None:
    role = server.info.get("role")
    if role == "slave":
        master = f"{server.info.get('master_host')}:{server.info.get('master_port')}"
        report.fault(
            "role",
            f"a replica of {master}",
            why="it rejects writes",
            fix=f"use the address of the primary, {master}",
        )
    elif server.info.get("cluster_enabled"):
        report.fault(
            "role",
            "a cluster",
            why="the keys of one tenant would be on several servers",
            fix="use a single server, with replicas if you like",
        )
    elif role is not None:
        report.ok("role", f"primary with {server.info.get('connected_slaves', 0)} replicas")


def _check_eviction(report: DoctorReport, server: CheckedServer, *, memory: bool) -> None:
    policy, limit = (
        str(server.info.get("maxmemory_policy", "")),
        int(server.info.get("maxmemory", 0)),
    )
    if not policy:
        return
    if memory and policy != "noeviction":
        report.fault(
            "eviction",
            policy,
            why="a full server drops agent memory without notice",
            fix=server.sets("maxmemory-policy", "noeviction"),
        )
    elif not memory and not policy.startswith(EVICTS):
        report.fault(
            "eviction",
            policy,
            why="a full cache server rejects writes, including invalidations, and the cache is "
            "bypassed until there is room",
            fix=server.sets("maxmemory-policy", "allkeys-lru"),
        )
    else:
        report.ok("eviction", policy)
    if limit:
        used = server.info.get("used_memory", 0)
        report.ok("maxmemory", f"{limit / 2**20:,.0f} MiB, {used / 2**20:,.1f} MiB in use")
    else:
        report.warn(
            "maxmemory",
            "no limit",
            why="the server grows until the machine has no memory left, and is then killed",
            fix=server.sets("maxmemory", "512mb"),
        )


def _check_persistence(report: DoctorReport, server: CheckedServer, *, memory: bool) -> None:
    aof = bool(server.info.get("aof_enabled"))
    points = (server.config or {}).get("save")
    on = [*(["append-only file"] if aof else []), *([f"snapshots ({points})"] if points else [])]
    if memory and not on and server.config is not None:
        report.warn(
            "persistence",
            "off",
            why="a restart loses agent memory",
            fix=server.sets("appendonly", "yes"),
        )
    elif not memory and on:
        fix = "; ".join(
            [
                *([server.sets("appendonly", "no")] if aof else []),
                *([server.sets("save", '""')] if points else []),
            ]
        )
        report.warn(
            "persistence",
            " and ".join(on),
            why="writing the cache to disk costs forks and time, and its entries are not used "
            "after a restart",
            fix=fix,
        )
    elif server.config is not None or on:
        report.ok("persistence", " and ".join(on) or "off")


def _check_encryption(report: DoctorReport, server: CheckedServer, variable: str) -> None:
    if server.url.tls is not None or is_local(server.url.path or server.url.host):
        report.ok("encryption", "TLS" if server.url.tls else "on this machine only")
    else:
        report.warn(
            "encryption",
            "none",
            why="responses of all tenants and the password cross the network unencrypted",
            fix=f"configure tls-port and a certificate on the server, and use rediss:// in "
            f"{variable}",
        )


def _check_password(report: DoctorReport, server: CheckedServer, variable: str) -> None:
    """Check that a password is required.

    A missing one is a fault if other machines can reach the server, else a warning.
    """
    add = report.warn if is_local(server.url.path or server.url.host) else report.fault
    if _is_open(server.url):
        add(
            "password",
            "none: the server replies without one",
            why="anyone who can connect can read the responses of all tenants",
            fix=server.sets("requirepass", "PASSWORD"),
        )
    elif is_default(server.url.password):
        add(
            "password",
            "a well-known one",
            why="attackers try it first",
            fix=f"choose another one, and set {variable} to it",
        )
    else:
        report.ok("password", "required, and not a well-known one")


def _is_open(url: ServerURL) -> bool:
    """Return whether the server replies without a password."""
    place: dict[str, Any] = (
        {"unix_socket_path": url.path} if url.path else {"host": url.host, "port": url.port}
    )
    if url.tls is not None:
        place |= {"ssl": True, "ssl_cert_reqs": "none", "ssl_check_hostname": False}
    try:
        with redis.Redis(
            **place,
            socket_timeout=DEADLINE_S,
            socket_connect_timeout=DEADLINE_S,
            retry=Retry(NoBackoff(), 0),
        ) as one:
            one.ping()
    except (redis.RedisError, OSError):
        return False
    return True


def _check_connections(report: DoctorReport, server: CheckedServer) -> None:
    config = server.config
    if config is None:
        report.warn(
            "configuration",
            "this user may not read it (CONFIG GET)",
            why="persistence, time-outs and output buffers are not checked",
            fix="run doctor again as the administration user: respcache acl --role administration",
        )
        return
    buffers = _buffers(config.get("client-output-buffer-limit", ""))
    hard = buffers.get("pubsub", LEAST_PUBSUB_BYTES)
    if hard == 0 or hard < LEAST_PUBSUB_BYTES:
        found = "pubsub without a limit" if hard == 0 else f"pubsub {hard} bytes"
        why = (
            "a process that reads slowly fills the server's memory"
            if hard == 0
            else "every burst of writes drops connections"
        )
        report.warn(
            "output buffers",
            found,
            why=why,
            fix=server.sets("client-output-buffer-limit", '"pubsub 32mb 8mb 60"'),
        )
    else:
        report.ok("output buffers", f"pubsub {hard / 2**20:,.0f} MiB")
    idle, alive = int(config.get("timeout", 0)), int(config.get("tcp-keepalive", 0))
    if idle:
        report.warn(
            "timeout",
            f"{idle} s",
            why="the server closes idle connections, and the cache is bypassed until it reconnects",
            fix=server.sets("timeout", "0"),
        )
    elif not alive:
        report.warn(
            "timeout",
            "tcp-keepalive is off",
            why="connections that a firewall dropped are detected late",
            fix=server.sets("tcp-keepalive", "300"),
        )
    else:
        report.ok("timeout", f"none; tcp-keepalive {alive} s")


def _buffers(text: str) -> dict[str, int]:
    """Return the hard limits in bytes of ``normal 0 0 0 slave ... pubsub hard soft seconds``."""
    words = text.split()
    return {words[at]: int(words[at + 1]) for at in range(0, len(words) - 3, 4)}


def _check_clock(report: DoctorReport, server: CheckedServer) -> None:
    if abs(server.skew_s) <= SKEW_S:
        report.ok("clock", f"{server.skew_s:+.1f} s from here")
    else:
        report.warn(
            "clock",
            f"{server.skew_s:+.0f} s from here",
            why="responses stay correct, but ages, logs and expiry times do not agree",
            fix="run an NTP client on both machines: timedatectl set-ntp true",
        )
