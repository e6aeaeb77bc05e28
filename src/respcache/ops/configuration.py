"""The values that are in force, and where each comes from. Secrets are only said to be set."""

import inspect
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from respcache.cache import Cache

NONE = "none"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One value of the configuration and where it comes from."""

    name: str
    value: str
    """``set`` or ``not set`` of secrets."""
    source: str
    """``default``, ``argument``, or what the application says: the name of an environment variable,
    a file."""


def settings_of(cache: "Cache") -> list[Setting]:
    """Return the options of a cache as they are."""
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
        "audit_share": cache.options.verify_share,
        "near_bytes": cache.options.near_bytes,
        "board": cache.publisher,
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
