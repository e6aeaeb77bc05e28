"""How a route is cached: policies, declared parameters, and the one canonical form of a request.

A policy is data attached to an endpoint; it changes nothing by itself. The canonical form of a
request holds the declared parameters only, each in one spelling, in the order of their names; the
handler of a fill is called with exactly that form, so nothing that the key does not hold can decide
what the handler answers.
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
    """How fresh a hit from memory has to be. Misses, and hits from the store, are strict at every
    level."""

    STRICT = "strict"
    """No write that was acknowledged before the request began is missing. One small round trip,
    shared by a tenant's requests."""
    BOUNDED = "bounded"
    """Writes that were acknowledged more than ``bound_s`` ago are never missing; others rarely.
    Mostly no round trip."""
    TTL = "ttl"
    """Valid until an invalidation is heard of, at most for the time to live. Who may see it is as
    fresh as at ``bounded``."""

    @classmethod
    def of(cls, name: str, module: str) -> "Level":
        """Read a level by its name. Raises ``ConfigurationError``."""
        if name not in tuple(cls):
            raise ConfigurationError(
                f"level {name!r} of module {module!r} must be one of {', '.join(cls)}"
            )
        return cls(name)


VariesBy = Callable[[Any], str]
"""What else an answer depends on, besides its parameters and what the caller may see: a function of
the caller's ``Scope``."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A declared parameter of a route. ``default`` is the spelling that means the same as leaving
    it out."""

    name: str
    place: str = "query"
    repeated: bool = False
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """How the answers of one endpoint are cached. Validated when made."""

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
        """What an entry of this policy depends on."""
        return (FLOOR, module_tag(self.module), *map(table_tag, self.tables))

    def max_view_age_s(self, *, anonymous: bool) -> float:
        """How old a view may be by which a hit from memory is judged; 0: it must be younger than
        the request.

        ``anonymous``: everybody sees the same, so nothing but the answer itself can be out of date.
        """
        if self.level is Level.STRICT:
            return 0.0
        return FOREVER if self.level is Level.TTL and anonymous else self.bound_s


@dataclass(frozen=True, slots=True)
class Invalidation:
    """The modules that a handler without a database hook invalidates when it answers."""

    modules: tuple[str, ...]

    def __post_init__(self) -> None:
        for module in self.modules:
            keys.check_module(module)


@dataclass(frozen=True, slots=True)
class Canonical:
    """The one form of a request: what goes into the key, and the query string that the handler of a
    fill sees."""

    parameters: tuple[tuple[str, str, str], ...]
    query_string: bytes


def canonical(
    head: RequestHead,
    path_params: Mapping[str, str],
    *,
    declared: Sequence[Parameter],
    passed: Sequence[str] = (),
) -> Canonical:
    """Bring a request into its canonical form.

    ``declared`` parameters are sorted by (place, name). ``passed`` are names of query parameters
    that the resolver consumes:
    they reach the handler (whose own identity dependency may declare them) but are not part of the
    key.
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
    """Sort declared parameters into the order of the canonical form, each once."""
    return tuple(
        sorted(dict.fromkeys(parameters), key=lambda parameter: (parameter.place, parameter.name))
    )


def _values(parameter: Parameter, given: Mapping[str, list[str]], head: RequestHead) -> list[str]:
    """Return the values that count.

    Of a query parameter: all if it is repeated, else the last, and none where that equals the
    default; the handler gets just these. Headers and cookies reach the handler as they came, so all
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
