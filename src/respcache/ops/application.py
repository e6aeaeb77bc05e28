"""Loads an application by ``module:app``, as uvicorn does."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from respcache.core.errors import ConfigurationError
from respcache.middleware import CacheMiddleware

MAX_LAYERS = 100


@dataclass(frozen=True, slots=True)
class LoadedApp:
    """An ASGI application and its cache middleware."""

    name: str
    app: Any
    middleware: CacheMiddleware

    def declared_tables(self) -> set[str]:
        """Return the tables that its cached reads and its resolver declare. Does not connect.

        Raises ``ConfigurationError``.
        """
        self.middleware.prepare()
        cache = self.middleware.cache
        return {*cache.registry.tables, *cache.resolver.tables}


def load(name: str, folder: Path) -> LoadedApp:
    """Import ``module:app``, or call ``module:make()``. Modules are searched in ``folder`` first.

    Raises ``ConfigurationError``.
    """
    module, separator, attribute = name.partition(":")
    if not separator or not module or not attribute:
        raise ConfigurationError(
            f"{name!r} must be MODULE:APP, such as main:app, or MODULE:FUNCTION() for a factory"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.removesuffix("()").split("."):
            found = getattr(found, part)
        app = found() if attribute.endswith("()") else found
    except Exception as error:
        raise ConfigurationError(
            f"{name} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    middleware = find_middleware(app)
    if middleware is None:
        raise ConfigurationError(
            f"{name} has no cache: name the application that cache.wrap(app) returned, or one "
            f"that wraps it"
        )
    return LoadedApp(name, app, middleware)


def find_middleware(app: Any) -> CacheMiddleware | None:
    """Return the cache middleware: the application itself, or one that it wraps (``.app``)."""
    for _ in range(MAX_LAYERS):
        if isinstance(app, CacheMiddleware):
            return app
        app = getattr(app, "app", None)
        if app is None:
            break
    return None
