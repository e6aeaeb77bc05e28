"""Counters of this process, as plain integers: a hit costs one addition. Exporters read them, nobody resets them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MAX_TENANTS = 10_000
"""Beyond this many tenants, figures are added up under ``OTHER``."""

OTHER = "other"


@dataclass(slots=True)
class Figures:
    """What happened to the requests and writes of one module of one tenant."""

    hits: int = 0
    misses: int = 0
    collapsed: int = 0
    stores: int = 0
    invalidations: int = 0
    bytes_served: int = 0
    bytes_stored: int = 0
    bypasses: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Figures") -> None:
        """Add another's figures to these."""
        for name in ("hits", "misses", "collapsed", "stores", "invalidations", "bytes_served", "bytes_stored"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bypasses.update(other.bypasses)
        self.refusals.update(other.refusals)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures under the names that the stats endpoint uses; ``hit_ratio`` is None before the first look-up."""
        looked = self.hits + self.misses
        return {
            "hits": self.hits,
            "misses": self.misses,
            "hit_ratio": round(self.hits / looked, 4) if looked else None,
            "collapsed": self.collapsed,
            "bypasses": dict(self.bypasses),
            "stores": self.stores,
            "stores_refused": dict(self.refusals),
            "invalidations": self.invalidations,
            "bytes_served": self.bytes_served,
            "bytes_stored": self.bytes_stored,
        }


class Stats:
    """Figures per tenant and module. The number of tenants is bounded; the number of modules is the application's."""

    __slots__ = ("_tenants", "acknowledgements_delayed", "errors", "stale_served", "unconfirmed_invalidations")

    def __init__(self) -> None:
        self._tenants: dict[str, dict[str, Figures]] = {}
        self.errors = 0
        self.unconfirmed_invalidations = 0
        self.acknowledgements_delayed = 0
        self.stale_served = 0

    def of(self, tenant: str | None, module: str) -> Figures:
        """Return the figures to add to. ``tenant`` is None where the request had none or it was not resolved."""
        name = tenant or OTHER
        modules = self._tenants.get(name)
        if modules is None:
            if len(self._tenants) >= MAX_TENANTS:
                name = OTHER
            modules = self._tenants.setdefault(name, {})
        figures = modules.get(module)
        if figures is None:
            figures = modules[module] = Figures()
        return figures

    def tenants(self) -> Iterable[str]:
        """Name the tenants that have figures."""
        return self._tenants.keys()

    def modules(self, tenant: str | None = None) -> dict[str, Figures]:
        """Return figures per module: of one tenant, or added up over all."""
        chosen = self._tenants.values() if tenant is None else [self._tenants.get(tenant, {})]
        total: dict[str, Figures] = {}
        for modules in chosen:
            for module, figures in modules.items():
                total.setdefault(module, Figures()).add(figures)
        return total
