"""How pages are made: templates, navigation, the addresses of scripts and style sheets.

Navigation shows what somebody may do; that they may do nothing else is enforced elsewhere
(``ops/admin.py``).
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
from respcache.ops.dashboard import formatting as words
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
"""What pages load: names in addresses, and files below ``static``."""


@dataclass(frozen=True, slots=True)
class Place:
    """A page in the navigation. ``key``: what to press after g."""

    name: str
    path: str
    title: str
    key: str
    visible: Callable[[Access], bool]


def _everybody(access: Access) -> bool:
    return True


def _everything(access: Access) -> bool:
    return access.tenant is None


def _operators(access: Access) -> bool:
    return access.role == Role.OPERATOR


NAVIGATION: tuple[tuple[str, tuple[Place, ...]], ...] = (
    (
        "Watch",
        (
            Place("overview", "", "Overview", "o", _everybody),
            Place("tenants", "tenants", "Tenants", "t", _everything),
            Place("modules", "modules", "Modules and routes", "m", _everybody),
            Place("latency", "latency", "Latency", "l", _everything),
            Place("feed", "feed", "Invalidations", "i", _everybody),
        ),
    ),
    (
        "Look closer",
        (
            Place("keys", "keys", "Keys", "k", _everybody),
            Place("explain", "explain", "Explain a request", "e", _everybody),
        ),
    ),
    (
        "Act",
        (
            Place("purge", "purge", "Purge", "p", _operators),
            Place("switches", "switches", "Switches", "s", _operators),
        ),
    ),
    (
        "System",
        (
            Place("configuration", "configuration", "Configuration", "c", _everything),
            Place("trail", "trail", "Trail", "r", _everybody),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Asset:
    """A file that pages load."""

    body: bytes
    media_type: str


class PageRenderer:
    """Makes pages from templates."""

    def __init__(self) -> None:
        self._templates = Environment(
            loader=PackageLoader("respcache.ops.dashboard"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(words.FILTERS)
        self._templates.globals["nobodys"] = words.NOBODYS

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
        """Answer with a page. ``at``: its name in the navigation."""
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
        """Write a page, or a part of one."""
        return self._templates.get_template(template).render(
            viewer=viewer,
            at=at,
            to=Addresses(request),
            theme=theme_of(request),
            navigation=navigation(viewer),
            **context,
        )


class Addresses:
    """The addresses of pages, below wherever the dashboard is mounted."""

    def __init__(self, request: Request) -> None:
        self.root = str(request.scope.get("root_path", "")).rstrip("/")

    def __call__(self, path: str, **query: Any) -> str:
        """Return the address of a page; of the query, what is not empty."""
        given = {name: value for name, value in query.items() if value not in (None, "")}
        return f"{self.root}/{quote(path)}" + (f"?{urlencode(given)}" if given else "")

    def asset(self, name: str) -> str:
        """Return the address of a file, which changes with its content."""
        return f"{self.root}/static/{fingerprint()}/{name}"


def navigation(viewer: Viewer | None) -> list[tuple[str, list[Place]]]:
    """Return the pages that somebody may see, by group."""
    if viewer is None:
        return []
    groups = (
        (title, [place for place in places if place.visible(viewer.access)])
        for title, places in NAVIGATION
    )
    return [(title, places) for title, places in groups if places]


def theme_of(request: Request) -> str:
    """Return what somebody chose: auto is as their system is."""
    given = request.cookies.get(THEME_COOKIE, "")
    return given if given in THEMES else THEMES[0]


@cache
def assets() -> Mapping[str, Asset]:
    """Read all files that pages load, once."""
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
    """Return what tells this set of files from any other."""
    digest = blake2b(digest_size=6)
    for name, asset in sorted(assets().items()):
        digest.update(name.encode() + asset.body)
    return digest.hexdigest()
