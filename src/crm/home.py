"""The home page ``/``: links to documentation, dashboard and health. No login; not cached.

In development it also names the demo users. The page loads nothing: its style is inline, and the
Content-Security-Policy permits exactly this style, by its hash.
"""

import base64
import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from crm.demo.seed import PASSWORD
from crm.settings import Settings

USERS = {
    "root@crm.example": "superadmin: all tenants",
    "admin@acme.example": "admin of the tenant acme",
    "manager@globex.example": "manager of a team in globex",
    "employee@globex.example": "employee of a team in globex",
}
"""Demo users: email and role. Only development systems have them."""


def home_page(settings: Settings) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of the home page. The page is rendered once, here."""
    style = (files("crm") / "templates" / "home.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    headers = {
        "cache-control": "no-store",
        "content-security-policy": f"default-src 'none'; style-src 'sha256-{digest}'; "
        "img-src data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "same-origin",
    }
    template = Environment(loader=PackageLoader("crm"), autoescape=True).get_template("home.html")
    development = settings.environment == "development"
    text = template.render(
        style=Markup(style),
        users=USERS,
        password=PASSWORD if development else None,
    )

    async def home(request: Request) -> Response:
        return HTMLResponse(text, headers=headers)

    return home
