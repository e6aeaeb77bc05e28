"""The forms: sign in and out, purge, switch, reveal, explain, and the theme.

Every form contains the CSRF token of its session (``auth.py``); without it nothing is done. The
page shows why an action was refused.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from respcache.core.errors import AuditLogUnavailable, InvalidOperation, OperationError, StoreError
from respcache.ops.admin import Admin, Purge
from respcache.ops.dashboard import auth, formatting
from respcache.ops.dashboard.api import describe_error
from respcache.ops.dashboard.auth import Authenticator, TooManyAttempts, Viewer
from respcache.ops.dashboard.layout import THEMES, Addresses, theme_of
from respcache.ops.dashboard.pages import Endpoint, Pages

FORGED = (
    "The form does not belong to this session. Nothing was done: reload the page and try again."
)
WRONG_CONFIRMATION = "the confirmation does not match"
A_YEAR_S = 365 * 86400
MAX_HEADERS = 50

Form = Mapping[str, str]


class Actions:
    """The pages with forms, and the actions of these forms."""

    def __init__(self, admin: Admin, authenticator: Authenticator, pages: Pages) -> None:
        self._admin = admin
        self._authenticator = authenticator
        self._pages = pages

    def routes(self) -> list[BaseRoute]:
        """Return the routes of the forms."""
        shown: dict[str, Endpoint] = {
            "/purge": self.purge_page,
            "/switches": self.switches_page,
            "/explain": self.explain_page,
        }
        done: dict[str, Any] = {
            "/purge": self.purge,
            "/switches": self.switch,
            "/explain": self.explain,
            "/key": self.reveal,
            "/theme": self.theme,
            "/sign-out": self.sign_out,
        }
        return [
            Route("/sign-in", self.sign_in_page, methods=["GET"]),
            Route("/sign-in", self.sign_in, methods=["POST"]),
            *(
                Route(path, self._pages.signed_in(endpoint), methods=["GET"])
                for path, endpoint in shown.items()
            ),
            *(
                Route(path, self._pages.signed_in(self._checked(action)), methods=["POST"])
                for path, action in done.items()
            ),
        ]

    def _checked(self, action: Any) -> Endpoint:
        """Wrap an action so that it runs only for a form of this session."""

        async def respond(request: Request, viewer: Viewer) -> Response:
            form = await _form(request)
            if not auth.is_form_token(form.get("csrf", ""), viewer.token):
                return self._pages.error_page(request, viewer, status=403, message=FORGED)
            response: Response = await action(request, viewer, form)
            return response

        return respond

    # -- sessions ----------------------------------------------------------------------------------

    async def sign_in_page(self, request: Request) -> Response:
        """Show the sign-in form."""
        if await self._authenticator.by_cookie(request) is not None:
            return RedirectResponse(_back(request, request.query_params.get("next", "")), 303)
        return self._sign_in_form(request, next_page=request.query_params.get("next", ""))

    async def sign_in(self, request: Request) -> Response:
        """Start a session."""
        form = await _form(request)
        name, next_page = form.get("name", ""), form.get("next", "")
        secret = request.cookies.get(auth.SIGN_IN_COOKIE, "")
        if not auth.is_form_token(form.get("csrf", ""), secret):
            return self._sign_in_form(
                request,
                next_page=next_page,
                name=name,
                status=403,
                problem="This page has expired. Try again.",
            )
        try:
            token = await self._authenticator.sign_in(request, name, form.get("password", ""))
        except TooManyAttempts as error:
            response = self._sign_in_form(
                request, next_page=next_page, name=name, status=429, problem=str(error)
            )
            response.headers["retry-after"] = str(error.retry_after_s)
            return response
        if token is None:
            problem = "Wrong name or password, or this user has no access to the cache."
            return self._sign_in_form(
                request, next_page=next_page, name=name, status=401, problem=problem
            )
        redirect = RedirectResponse(_back(request, next_page), 303)
        auth.begin_session(redirect, request, token)
        return redirect

    async def sign_out(self, request: Request, viewer: Viewer, form: Form) -> Response:
        """End the session of this browser."""
        response = RedirectResponse(Addresses(request)("sign-in"), 303)
        auth.end_session(response, request)
        return response

    def _sign_in_form(
        self,
        request: Request,
        *,
        next_page: str,
        name: str = "",
        status: int = 200,
        problem: str = "",
    ) -> Response:
        secret = auth.sign_in_secret(request)
        shown = {
            "csrf": auth.form_token(secret),
            "next": next_page,
            "name": name,
            "problem": problem,
        }
        page = self._pages.renderer.page(
            request, "sign_in.html", viewer=None, status=status, **shown
        )
        auth.keep_sign_in_secret(page, request, secret)
        return page

    async def theme(self, request: Request, viewer: Viewer, form: Form) -> Response:
        """Select the theme, or the next of: as the system, light, dark."""
        chosen = form.get("theme") or THEMES[(THEMES.index(theme_of(request)) + 1) % len(THEMES)]
        response = RedirectResponse(
            _back(request, urlsplit(request.headers.get("referer", "")).path), 303
        )
        if chosen in THEMES:
            auth.set_cookie(
                response, request, name=auth.THEME_COOKIE, value=chosen, max_age=A_YEAR_S
            )
        return response

    # -- purge -------------------------------------------------------------------------------------

    async def purge_page(self, request: Request, viewer: Viewer) -> Response:
        """Show the form, the number of entries, and the confirmation."""
        return await self._purge_page(request, viewer, request.query_params)

    async def purge(self, request: Request, viewer: Viewer, form: Form) -> Response:
        """Purge if the confirmation matches."""
        tenant, module, key = _target(viewer, form)
        try:
            if form.get("confirmation", "").strip() != _confirmation(viewer, tenant, key):
                raise InvalidOperation(WRONG_CONFIRMATION)
            done = await self._admin.purge(viewer.access, tenant=tenant, module=module, key=key)
        except (InvalidOperation, AuditLogUnavailable, StoreError) as error:
            return await self._purge_page(request, viewer, form, problem=error)
        return self._purge_response(request, viewer, {}, done=done)

    async def _purge_page(
        self, request: Request, viewer: Viewer, given: Form, *, problem: Exception | None = None
    ) -> Response:
        viewer.access.demand_operator("a purge")
        tenant, module, key = _target(viewer, given)
        counted = None
        if key or tenant or (viewer.access.tenant and "module" in given):
            counted = await self._counted(viewer, tenant=tenant, module=module, key=key)
        return self._purge_response(request, viewer, given, counted=counted, problem=problem)

    async def _counted(
        self, viewer: Viewer, *, tenant: str | None, module: str | None, key: str | None
    ) -> Purge:
        """Count the entries; if the server is unavailable, a tenant can be purged without that."""
        try:
            return await self._admin.purge(
                viewer.access, tenant=tenant, module=module, key=key, dry_run=True
            )
        except StoreError:
            if key is not None:
                raise
            return Purge(
                tenant=viewer.access.within(tenant) or "", module=module, key=None, dry_run=True
            )

    def _purge_response(
        self,
        request: Request,
        viewer: Viewer,
        given: Form,
        *,
        counted: Any = None,
        done: Any = None,
        problem: Exception | None = None,
    ) -> Response:
        tenant, module, key = _target(viewer, given)
        shown = {
            "counted": counted,
            "done": done,
            "key": key,
            "module": module or "",
            "modules": self._admin.module_names(),
            "selected_tenant": "" if tenant is None else viewer.name(tenant),
            "confirmation": _confirmation(viewer, tenant, key) if counted else "",
            "typed": given.get("confirmation", "") if problem else "",
        }
        return self._page(request, "purge", viewer, problem=problem, **shown)

    # -- switches ----------------------------------------------------------------------------------

    async def switches_page(self, request: Request, viewer: Viewer) -> Response:
        """Show what is switched off."""
        viewer.access.demand_operator("a switch")
        return await self._switches_response(
            request, viewer, await self._admin.switches(viewer.access)
        )

    async def switch(self, request: Request, viewer: Viewer, form: Form) -> Response:
        """Switch a tenant, a module or everything off or on."""
        off, everything = form.get("off") == "yes", form.get("everything") == "yes"
        tenant, module = viewer.tenant(form.get("tenant", "")), form.get("module") or None
        try:
            if everything and off and form.get("confirmation", "").strip() != "off":
                raise InvalidOperation(WRONG_CONFIRMATION)
            if not everything and tenant is None and module is None:
                raise InvalidOperation("name a tenant or a module")
            switches = await self._admin.switch(
                viewer.access, off=off, tenant=tenant, module=module
            )
        except (InvalidOperation, AuditLogUnavailable, StoreError) as error:
            switches, typed = (
                await self._admin.switches(viewer.access),
                form.get("confirmation", ""),
            )
            return await self._switches_response(
                request, viewer, switches, problem=error, typed=typed
            )
        return await self._switches_response(request, viewer, switches, done="off" if off else "on")

    async def _switches_response(
        self,
        request: Request,
        viewer: Viewer,
        switches: Any,
        *,
        done: str = "",
        typed: str = "",
        problem: Exception | None = None,
    ) -> Response:
        modules = self._admin.module_names()
        return self._page(
            request,
            "switches",
            viewer,
            problem=problem,
            switches=switches,
            done=done,
            typed=typed,
            modules=modules,
        )

    # -- details -----------------------------------------------------------------------------------

    async def reveal(self, request: Request, viewer: Viewer, form: Form) -> Response:
        """Show the body of a stored response."""
        key = request.query_params.get("key", "")
        body = await self._admin.reveal(viewer.access, key)
        return await self._pages.one_key(request, viewer, key, body=body)

    async def explain_page(self, request: Request, viewer: Viewer) -> Response:
        """Show the form."""
        path = request.query_params.get("path", "")
        return self._explained(request, viewer, {"method": "GET", "path": path, "headers": ""})

    async def explain(self, request: Request, viewer: Viewer, form: Form) -> Response:
        """Explain a request. The form uses POST to keep credentials out of addresses."""
        given = {
            "method": form.get("method", "GET"),
            "path": form.get("path", ""),
            "headers": form.get("headers", ""),
        }
        try:
            found = await self._admin.explain(
                viewer.access,
                method=given["method"],
                path=given["path"],
                headers=_headers(given["headers"]),
            )
        except (OperationError, StoreError) as error:
            return self._explained(request, viewer, given, problem=error)
        return self._explained(request, viewer, {**given, "headers": ""}, found=found)

    def _explained(
        self,
        request: Request,
        viewer: Viewer,
        given: Form,
        *,
        found: Any = None,
        problem: Exception | None = None,
    ) -> Response:
        return self._page(
            request,
            "explain",
            viewer,
            problem=problem,
            given=given,
            found=found,
            outcomes=formatting.OUTCOME_TONES,
        )

    def _page(
        self,
        request: Request,
        name: str,
        viewer: Viewer,
        *,
        problem: Exception | None,
        **context: Any,
    ) -> Response:
        """Return a page, which shows the problem if there is one."""
        status, _, text = (
            (200, "", "") if problem is None else describe_error(problem, viewer.access)
        )
        return self._pages.renderer.page(
            request, f"{name}.html", viewer=viewer, at=name, status=status, problem=text, **context
        )


async def _form(request: Request) -> Form:
    """Return the fields of a form; the last value of repeated fields, and no files."""
    async with request.form(max_files=0, max_fields=50) as form:
        return {name: value for name, value in form.multi_items() if isinstance(value, str)}


def _target(viewer: Viewer, given: Form) -> tuple[str | None, str | None, str | None]:
    """Return tenant, module and key to purge."""
    key = given.get("key") or None
    if key is not None:
        return None, None, key
    return (
        viewer.tenant(given.get("tenant", "")) or viewer.access.tenant,
        given.get("module") or None,
        None,
    )


def _confirmation(viewer: Viewer, tenant: str | None, key: str | None) -> str:
    """Return the text to type: the tenant's name, or the end of the key."""
    return key[-8:] if key is not None else viewer.name(tenant or "")


def _headers(text: str) -> list[tuple[str, str]]:
    """Parse header lines. Raises ``InvalidOperation``."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > MAX_HEADERS:
        raise InvalidOperation(f"{len(lines)} headers are more than {MAX_HEADERS}")
    found: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise InvalidOperation(f"line {number} of the headers is not NAME: VALUE")
        found.append((name.strip(), value.strip()))
    return found


def _back(request: Request, page: str) -> str:
    """Return the requested page if it is one of the dashboard, else the overview."""
    to = Addresses(request)
    is_own = (
        page.startswith(f"{to.root}/")
        and not page.startswith("//")
        and "\\" not in page
        and page.isprintable()
    )
    return page if is_own and not page.startswith(to("sign-in")) else to("")
