"""How a route is cached: policies, declared parameters, and the canonical form of a request.

A policy is data attached to an endpoint; it has no effect by itself. The canonical form of a
request contains only the declared parameters, each in one spelling, in the order of their names.
The handler of a fill is called with exactly that form, so nothing outside the key can affect its
response.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import parse_qsl, urlencode

from respcache.core import keys
from respcache.core.errors import ConfigurationError
from respcache.core.generations import FLOOR, module_tag, table_tag
from respcache.core.identity import Dependency, RequestHead

DEFAULT_TTL_S = {"list": 180.0, "detail": 300.0, "count": 600.0, "settings": 1800.0}
MAX_TTL_S = 24 * 3600.0
MAX_BODY_BYTES = 1024 * 1024

DEFAULT_BOUND_S = 1.0
MAX_BOUND_S = 60.0
FOREVER = float("inf")


class Level(StrEnum):
    """How fresh a hit from memory must be. Misses and hits from the cache server are always
    strict."""

    STRICT = "strict"
    """No write that was acknowledged before the request began is missing. One small round trip,
    shared by a tenant's requests."""
    BOUNDED = "bounded"
    """No write that was acknowledged more than ``bound_s`` ago is missing; later ones rarely are.
    Mostly no round trip."""
    TTL = "ttl"
    """Valid until an invalidation arrives, at most for the time to live. The caller's permissions
    are as fresh as at ``bounded``."""

    @classmethod
    def of(cls, name: str, module: str) -> "Level":
        """Return a level by its name. Raises ``ConfigurationError``."""
        if name not in tuple(cls):
            raise ConfigurationError(
                f"level {name!r} of module {module!r} must be one of {', '.join(cls)}"
            )
        return cls(name)


VariesBy = Callable[[Any], str]
"""A function of the caller's ``Scope``: what a response depends on besides its parameters and the
scope's fingerprint."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A declared parameter of a route. ``default`` is the spelling that means the same as omitting
    it."""

    name: str
    place: str = "query"
    repeated: bool = False
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """How the responses of one endpoint are cached. Validated on creation."""

    module: str
    kind: str
    ttl_s: float
    tables: tuple[str, ...] = ()
    rule: Dependency | None = None
    parameters: tuple[Parameter, ...] | None = None
    varies_by: VariesBy | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    level: Level = Level.STRICT
    bound_s: float = DEFAULT_BOUND_S

    def __post_init__(self) -> None:
        keys.check_module(self.module)
        if not 0 < self.bound_s <= MAX_BOUND_S:
            raise ConfigurationError(
                f"bound_s {self.bound_s!r} of module {self.module!r} must be above 0 and at most "
                f"{MAX_BOUND_S:.0f} seconds"
            )
        if self.kind not in keys.KINDS:
            raise ConfigurationError(
                f"kind {self.kind!r} of module {self.module!r} must be one of "
                f"{', '.join(keys.KINDS)}"
            )
        if not 0 < self.ttl_s <= MAX_TTL_S:
            raise ConfigurationError(
                f"ttl {self.ttl_s!r} of module {self.module!r} must be above 0 and at most "
                f"{MAX_TTL_S:.0f} seconds"
            )

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags on which an entry of this policy depends."""
        return (FLOOR, module_tag(self.module), *map(table_tag, self.tables))

    def max_view_age_s(self, *, anonymous: bool) -> float:
        """Return the maximum age of the view by which a hit from memory is judged; 0: the view must
        be younger than the request.

        ``anonymous``: all callers see the same, so no scope can be out of date.
        """
        if self.level is Level.STRICT:
            return 0.0
        return FOREVER if self.level is Level.TTL and anonymous else self.bound_s


@dataclass(frozen=True, slots=True)
class Invalidation:
    """The modules that a handler without a database hook invalidates when it responds."""

    modules: tuple[str, ...]

    def __post_init__(self) -> None:
        for module in self.modules:
            keys.check_module(module)


@dataclass(frozen=True, slots=True)
class Canonical:
    """The canonical form of a request: the parameters in the key, and the query string that the
    handler of a fill receives."""

    parameters: tuple[tuple[str, str, str], ...]
    query_string: bytes


def canonical(
    head: RequestHead,
    path_params: Mapping[str, str],
    *,
    declared: Sequence[Parameter],
    passed: Sequence[str] = (),
) -> Canonical:
    """Return the canonical form of a request.

    ``declared`` parameters are sorted by (place, name). ``passed`` are names of query parameters
    that the resolver consumes: they reach the handler, whose identity dependency may declare them,
    but are not part of the key.
    """
    given: dict[str, list[str]] = {}
    for name, value in parse_qsl(
        head.scope["query_string"].decode("latin-1"), keep_blank_values=True
    ):
        given.setdefault(name, []).append(value)
    triples = [("path", name, path_params[name]) for name in sorted(path_params)]
    query: list[tuple[str, str]] = []
    for parameter in declared:
        for value in _values(parameter, given, head):
            triples.append((parameter.place, parameter.name, value))
            if parameter.place == "query":
                query.append((parameter.name, value))
    query += [(name, value) for name in passed for value in given.get(name, ())]
    return Canonical(tuple(triples), urlencode(query).encode("ascii"))


def in_order(parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """Return the declared parameters in the order of the canonical form, each once."""
    return tuple(
        sorted(dict.fromkeys(parameters), key=lambda parameter: (parameter.place, parameter.name))
    )


def _values(parameter: Parameter, given: Mapping[str, list[str]], head: RequestHead) -> list[str]:
    """Return the values of a parameter that are part of the key.

    Of a query parameter: all if it is repeated, else the last, and none if that equals the default.
    The handler receives exactly these. Headers and cookies reach the handler unchanged, so all
    their values count.
    """
    if parameter.place == "cookie":
        return head.cookies(parameter.name)
    if parameter.place == "header":
        return head.headers(parameter.name)
    values = given.get(parameter.name, [])
    return (
        values
        if parameter.repeated
        else [value for value in values[-1:] if value != parameter.default]
    )
