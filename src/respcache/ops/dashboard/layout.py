"""The layout of pages: templates, navigation, and the addresses of scripts and style sheets.

The navigation hides pages that a user may not open; ``ops/admin.py`` enforces permissions.
"""

import mimetypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from respcache.ops.access import Access, Role
from respcache.ops.dashboard import formatting
from respcache.ops.dashboard.auth import THEME_COOKIE, Viewer

THEMES = ("auto", "light", "dark")
ASSETS = {
    "app.css": "app.css",
    "app.js": "app.js",
    "htmx.js": "vendor/htmx-4.0.1.min.js",
    "uplot.js": "vendor/uplot-1.6.32.min.js",
    "uplot.css": "vendor/uplot-1.6.32.min.css",
    "inter.woff2": "vendor/inter-5.3.0.woff2",
    "jetbrains-mono.woff2": "vendor/jetbrains-mono-5.3.0.woff2",
    "icon.svg": "icon.svg",
}
"""Files that pages load: their names in addresses, and their paths below ``static``."""


@dataclass(frozen=True, slots=True)
class NavItem:
    """A page in the navigation. ``key`` is the key that opens it after g."""

    name: str
    path: str
    title: str
    key: str
    visible: Callable[[Access], bool]


def _everyone(access: Access) -> bool:
    return True


def _all_tenants(access: Access) -> bool:
    return access.tenant is None


def _operators(access: Access) -> bool:
    return access.role == Role.OPERATOR


NAVIGATION: tuple[tuple[str, tuple[NavItem, ...]], ...] = (
    (
        "Monitor",
        (
            NavItem("overview", "", "Overview", "o", _everyone),
            NavItem("tenants", "tenants", "Tenants", "t", _all_tenants),
            NavItem("modules", "modules", "Modules and routes", "m", _everyone),
            NavItem("latency", "latency", "Latency", "l", _all_tenants),
            NavItem("feed", "feed", "Invalidations", "i", _everyone),
        ),
    ),
    (
        "Inspect",
        (
            NavItem("keys", "keys", "Keys", "k", _everyone),
            NavItem("explain", "explain", "Explain a request", "e", _everyone),
        ),
    ),
    (
        "Operate",
        (
            NavItem("purge", "purge", "Purge", "p", _operators),
            NavItem("switches", "switches", "Switches", "s", _operators),
        ),
    ),
    (
        "System",
        (
            NavItem("configuration", "configuration", "Configuration", "c", _all_tenants),
            NavItem("audit_log", "audit-log", "Audit log", "a", _everyone),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Asset:
    """A file that pages load."""

    body: bytes
    media_type: str


class PageRenderer:
    """Renders pages from templates."""

    def __init__(self) -> None:
        self._templates = Environment(
            loader=PackageLoader("respcache.ops.dashboard"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(formatting.FILTERS)
        self._templates.globals["special_tenants"] = formatting.SPECIAL_TENANTS

    def page(
        self,
        request: Request,
        template: str,
        *,
        viewer: Viewer | None,
        at: str = "",
        status: int = 200,
        **context: Any,
    ) -> Response:
        """Return a page as a response. ``at`` is its name in the navigation."""
        return HTMLResponse(self.text(request, template, viewer=viewer, at=at, **context), status)

    def text(
        self,
        request: Request,
        template: str,
        *,
        viewer: Viewer | None,
        at: str = "",
        **context: Any,
    ) -> str:
        """Render a page or a part of one."""
        return self._templates.get_template(template).render(
            viewer=viewer,
            at=at,
            to=Addresses(request),
            theme=theme_of(request),
            navigation=navigation(viewer),
            **context,
        )


class Addresses:
    """The addresses of pages, below the path where the dashboard is mounted."""

    def __init__(self, request: Request) -> None:
        self.root = str(request.scope.get("root_path", "")).rstrip("/")

    def __call__(self, path: str, **query: Any) -> str:
        """Return the address of a page, without empty query parameters."""
        given = {name: value for name, value in query.items() if value not in (None, "")}
        return f"{self.root}/{quote(path)}" + (f"?{urlencode(given)}" if given else "")

    def asset(self, name: str) -> str:
        """Return the address of a file, which changes with its content."""
        return f"{self.root}/static/{fingerprint()}/{name}"


def navigation(viewer: Viewer | None) -> list[tuple[str, list[NavItem]]]:
    """Return the pages that a user may open, by group."""
    if viewer is None:
        return []
    groups = (
        (title, [item for item in items if item.visible(viewer.access)])
        for title, items in NAVIGATION
    )
    return [(title, items) for title, items in groups if items]


def theme_of(request: Request) -> str:
    """Return the chosen theme; ``auto`` follows the system."""
    given = request.cookies.get(THEME_COOKIE, "")
    return given if given in THEMES else THEMES[0]


@cache
def assets() -> Mapping[str, Asset]:
    """Return all files that pages load; reads them once."""
    folder = files("respcache.ops.dashboard") / "static"
    found: dict[str, Asset] = {}
    for name, path in ASSETS.items():
        kind = (
            "font/woff2"
            if name.endswith(".woff2")
            else mimetypes.guess_type(name)[0] or "application/octet-stream"
        )
        found[name] = Asset((folder / path).read_bytes(), kind)
    return found


@cache
def fingerprint() -> str:
    """Return a digest of all files that pages load."""
    digest = blake2b(digest_size=6)
    for name, asset in sorted(assets().items()):
        digest.update(name.encode() + asset.body)
    return digest.hexdigest()
