"""The effective configuration: each value and its source. Secrets are shown as set or not set."""

import inspect
from typing import Any

import msgspec

from respcache.cache import Cache

NONE = "none"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One value of the configuration, and its source."""

    name: str
    value: str
    """``set`` or ``not set`` for secrets."""
    source: str
    """``default``, ``argument``, or a source that the application names: an environment variable or
    a file."""


def settings_of(cache: Cache) -> list[Setting]:
    """Return the effective options of a cache."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(cache)).parameters.items()
    }
    relay = None if cache.runtime is None else cache.runtime.relay
    outbox = None if relay is None else relay.outbox
    given: dict[str, Any] = {
        "store": cache.store,
        "resolver": type(cache.resolver).__name__,
        "outbox": None if outbox is None else f"{type(outbox).__name__}, lease {outbox.lease_s} s",
        "schema_version": cache.options.schema_version,
        "enabled": cache.options.enabled,
        "strict_reads": cache.options.strict_reads,
        "verify_share": cache.options.verify_share,
        "near_bytes": cache.options.near_bytes,
        "publisher": cache.publisher,
    }
    secret = Setting(name="Cache.secret", value="set", source="argument")
    return [
        *(
            Setting(
                name=f"Cache.{name}",
                value=NONE if value is None else str(value),
                source="default" if value == defaults[name] else "argument",
            )
            for name, value in given.items()
        ),
        secret,
    ]
