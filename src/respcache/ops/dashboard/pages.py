"""The pages that are looked at: each asks ``ops/admin.py`` as who is signed in, and changes
nothing.

What changes something is in ``acts.py``.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from math import log10
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from respcache.core.errors import OperationError, StoreError
from respcache.ops.admin import Admin
from respcache.ops.dashboard import charts, view
from respcache.ops.dashboard import formatting as words
from respcache.ops.dashboard.api import numbers, refusal
from respcache.ops.dashboard.auth import Authenticator, Viewer
from respcache.ops.dashboard.layout import Addresses, PageRenderer, assets, fingerprint
from respcache.ops.figures import Overview, Row
from respcache.ops.search import Bucket
from respcache.telemetry.stats import BOUNDS_S, Histogram

TENANTS_A_PAGE = 50
EVENTS_SHOWN = 100
ACTS_A_PAGE = 100
KEYS_A_PAGE = 50
BUSIEST = 8
MAX_FOUND = 20
"""Tenants that a search by name shows."""

FOREVER = {"cache-control": "public, max-age=31536000, immutable"}
TITLES = {
    400: "That cannot be",
    403: "Not allowed",
    404: "Not found",
    405: "Not allowed",
    413: "Too much",
    429: "Too many attempts",
    500: "That failed",
    503: "Not just now",
}

Endpoint = Callable[[Request, Viewer], Awaitable[Response]]


class Pages:
    """The pages that are looked at."""

    def __init__(self, admin: Admin, authenticator: Authenticator, pages: PageRenderer) -> None:
        self._admin = admin
        self._authenticator = authenticator
        self._pages = pages

    def routes(self) -> list[BaseRoute]:
        """Return their routes."""
        shown: dict[str, Endpoint] = {
            "/": self.overview,
            "/tenants": self.tenants,
            "/tenants/{tenant}": self.tenant,
            "/modules": self.modules,
            "/latency": self.latency,
            "/feed": self.feed,
            "/keys": self.keys,
            "/key": self.key,
            "/configuration": self.configuration,
            "/trail": self.audit_log,
        }
        return [
            Route("/static/{fingerprint}/{name}", self.asset, methods=["GET"]),
            *(
                Route(path, self.signed_in(endpoint), methods=["GET"])
                for path, endpoint in shown.items()
            ),
        ]

    def signed_in(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        """Make an endpoint of what answers somebody who is signed in; others are sent to sign in,
        what is refused gets a page."""

        async def respond(request: Request) -> Response:
            viewer = await self._authenticator.by_cookie(request)
            if viewer is None:
                return to_sign_in(request)
            try:
                return await endpoint(request, viewer)
            except (OperationError, StoreError) as error:
                status, _, text = refusal(error, viewer.access)
                return self.problem(request, viewer, status, text)

        return respond

    def problem(
        self, request: Request, viewer: Viewer | None, status: int, message: str
    ) -> Response:
        """Answer with a page that says what is wrong."""
        title = TITLES.get(status, TITLES[400])
        return self._pages.page(
            request, "error.html", viewer=viewer, status=status, title=title, message=message
        )

    async def asset(self, request: Request) -> Response:
        """Send a script, a style sheet or a font. Its address changes with it, so browsers may keep
        it."""
        asset = assets().get(request.path_params["name"])
        if asset is None or request.path_params["fingerprint"] != fingerprint():
            raise HTTPException(404, "There is no such file")
        return Response(asset.body, media_type=asset.media_type, headers=FOREVER)

    # -- figures -----------------------------------------------------------------------------------

    async def overview(self, request: Request, viewer: Viewer) -> Response:
        """Everything at a glance; to whom one tenant is within reach, that tenant."""
        if viewer.access.tenant is not None:
            return await self._one_tenant(request, viewer, viewer.access.tenant, at="overview")
        overview = await self._admin.overview(viewer.access)
        routes = sorted(await self._admin.routes(viewer.access), key=lambda row: -row.requests)[
            :BUSIEST
        ]
        drawn = view.columns(overview.series)
        tiles = view.tiles(overview)
        return self._pages.page(
            request,
            "overview.html",
            viewer=viewer,
            at="overview",
            overview=overview,
            routes=routes,
            tiles=tiles,
            now=time.time(),
            shown=view.states(overview),
            stills=_stills(drawn),
            sparks={
                tile.spark: charts.spark(
                    drawn[tile.spark], top=100 if tile.spark == "ratio" else None
                )
                for tile in tiles
            },
        )

    async def tenants(self, request: Request, viewer: Viewer) -> Response:
        """The tenants, the largest first, or those that a search finds."""
        access = viewer.access
        access.demand_everything("the list of tenants")
        query = request.query_params
        q, order = query.get("q", "").strip(), query.get("order") or "requests"
        offset = numbers(request, "offset").get("offset", 0)
        if q:
            rows = await self._found(viewer, q)
        else:
            rows = await self._admin.tenants(
                access,
                order=order,  # type: ignore[arg-type]
                offset=offset,
                limit=TENANTS_A_PAGE + 1,
            )
        overview = await self._admin.overview(access, minutes=1)
        return self._pages.page(
            request,
            "tenants.html",
            viewer=viewer,
            at="tenants",
            rows=rows[:TENANTS_A_PAGE],
            more=len(rows) > TENANTS_A_PAGE,
            order=order,
            offset=offset,
            q=q,
            total=overview.totals.requests,
            off=overview.switches.tenants,
        )

    async def tenant(self, request: Request, viewer: Viewer) -> Response:
        """One tenant."""
        tenant = viewer.tenant(request.path_params["tenant"]) or ""
        return await self._one_tenant(
            request, viewer, tenant, at="tenants" if viewer.access.tenant is None else "overview"
        )

    async def modules(self, request: Request, viewer: Viewer) -> Response:
        """Modules and routes: of everybody, or of one tenant."""
        tenant = viewer.tenant(request.query_params.get("tenant", ""))
        modules = await self._admin.modules(viewer.access, tenant=tenant)
        routes = await self._admin.routes(viewer.access, tenant=tenant)
        switches = await self._admin.switches(viewer.access)
        return self._pages.page(
            request,
            "modules.html",
            viewer=viewer,
            at="modules",
            modules=_busiest(modules),
            routes=_busiest(routes),
            timed=viewer.access.tenant is None and tenant is None,
            off=switches.modules,
            tenant_called=_called(viewer, tenant),
        )

    async def latency(self, request: Request, viewer: Viewer) -> Response:
        """How long hits and misses take."""
        viewer.access.demand_everything("the times of all tenants")
        overview = await self._admin.overview(viewer.access, minutes=1)
        routes = [
            row
            for row in await self._admin.routes(viewer.access)
            if row.miss_p50_s is not None or row.hit_p50_s is not None
        ]
        routes.sort(key=lambda row: -(row.miss_p95_s or 0.0))
        return self._pages.page(
            request,
            "latency.html",
            viewer=viewer,
            at="latency",
            overview=overview,
            routes=routes,
            hits=_by_time(overview.hit_times),
            misses=_by_time(overview.miss_times),
        )

    async def feed(self, request: Request, viewer: Viewer) -> Response:
        """What was invalidated, and what is being invalidated from now on."""
        tenant = viewer.tenant(request.query_params.get("tenant", ""))
        feed = await self._admin.feed(viewer.access, tenant=tenant, limit=EVENTS_SHOWN)
        called = _called(viewer, tenant)
        return self._pages.page(
            request, "feed.html", viewer=viewer, at="feed", feed=feed, tenant_called=called
        )

    # -- what is stored ----------------------------------------------------------------------------

    async def keys(self, request: Request, viewer: Viewer) -> Response:
        """What is stored: a sample of it, and the keys of a tenant or a module."""
        query = request.query_params
        tenant, module, cursor = (
            viewer.tenant(query.get("tenant", "")),
            query.get("module") or None,
            query.get("cursor", ""),
        )
        page = await self._admin.keys(
            viewer.access, tenant=tenant, module=module, cursor=cursor, limit=KEYS_A_PAGE
        )
        sample = (
            None
            if cursor
            else await self._admin.sample(viewer.access, tenant=tenant, module=module)
        )
        return self._pages.page(
            request,
            "keys.html",
            viewer=viewer,
            at="keys",
            page=page,
            sample=sample,
            module=module or "",
            tenant_called=_called(viewer, tenant),
            modules=self._admin.module_names(),
            ttl=[] if sample is None else _by_ttl(sample.ttl),
            sizes=[]
            if sample is None
            else sorted(sample.modules.items(), key=lambda item: -item[1]),
        )

    async def key(self, request: Request, viewer: Viewer) -> Response:
        """One stored answer, without its body."""
        return await self.one_key(request, viewer, request.query_params.get("key", ""))

    async def one_key(
        self, request: Request, viewer: Viewer, key: str, *, body: Any = None
    ) -> Response:
        """Show one stored answer; ``body``: what was revealed."""
        one = await self._admin.inspect(viewer.access, key)
        return self._pages.page(request, "key.html", viewer=viewer, at="keys", one=one, body=body)

    # -- the system --------------------------------------------------------------------------------

    async def configuration(self, request: Request, viewer: Viewer) -> Response:
        """What is in force, and from where."""
        settings = await self._admin.configuration(viewer.access)
        return self._pages.page(
            request, "configuration.html", viewer=viewer, at="configuration", settings=settings
        )

    async def audit_log(self, request: Request, viewer: Viewer) -> Response:
        """Who did what."""
        before = numbers(request, "before").get("before")
        acts = await self._admin.audit_log(viewer.access, limit=ACTS_A_PAGE + 1, before=before)
        more = len(acts) > ACTS_A_PAGE
        return self._pages.page(
            request, "trail.html", viewer=viewer, at="trail", acts=acts[:ACTS_A_PAGE], more=more
        )

    # -- parts -------------------------------------------------------------------------------------

    async def _one_tenant(
        self, request: Request, viewer: Viewer, tenant: str, *, at: str
    ) -> Response:
        access = viewer.access
        row = await self._admin.tenant(access, tenant)
        overview = await self._admin.overview(access, minutes=1)
        modules = _busiest(await self._admin.modules(access, tenant=tenant))
        routes = _busiest(await self._admin.routes(access, tenant=tenant))
        return self._pages.page(
            request,
            "tenant.html",
            viewer=viewer,
            at=at,
            row=row,
            tiles=view.tenant_tiles(row),
            modules=modules,
            routes=routes,
            off=overview.switches.modules,
            own=access.tenant,
            warnings=_warnings(overview, tenant),
        )

    async def _found(self, viewer: Viewer, q: str) -> list[Row]:
        """Return the tenants whose name or id contains a text, as far as they have figures."""
        wanted = q.lower()
        names = (
            tenant
            for tenant, name in viewer.names.items()
            if wanted in name.lower() or wanted in tenant.lower()
        )
        rows: list[Row] = []
        for tenant in [*dict.fromkeys([*names, q])][:MAX_FOUND]:
            try:
                rows.append(await self._admin.tenant(viewer.access, tenant))
            except OperationError:
                continue
        return sorted(rows, key=lambda row: -row.requests)


def to_sign_in(request: Request) -> Response:
    """Send somebody to sign in, and back again afterwards."""
    to = Addresses(request)
    back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    address = (
        f"{to('sign-in')}?{urlencode({'next': back})}" if request.method == "GET" else to("sign-in")
    )
    if "hx-request" in request.headers:
        return Response(status_code=401, headers={"hx-redirect": to("sign-in")})
    return RedirectResponse(address, 303)


def _called(viewer: Viewer, tenant: str | None) -> str:
    return "" if tenant is None else viewer.name(tenant)


def _busiest(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (-row.requests, row.name))


def _warnings(overview: Overview, tenant: str) -> list[tuple[str, str]]:
    """Return what whoever looks at a tenant should know."""
    found: list[tuple[str, str]] = []
    if overview.problem:
        found.append(("Figures of one worker only", overview.problem))
    if overview.switches.everything:
        found.append(("The cache is switched off", "every request is answered by the application"))
    if tenant in overview.switches.tenants:
        found.append(
            ("This tenant is switched off", "its requests are answered by the application")
        )
    if tenant in overview.pending_tenants:
        found.append(
            ("An invalidation is not confirmed yet", "this worker bypasses the tenant until it is")
        )
    stale = [finding for finding in overview.findings if finding.tenant == tenant]
    if stale:
        found.append(
            (
                f"The audit found {len(stale)} wrong answers",
                f"the last one at {stale[-1].at}, {stale[-1].route}",
            )
        )
    return found


def _stills(drawn: dict[str, view.Column]) -> dict[str, charts.Picture]:
    """Return the pictures of the overview for browsers without JavaScript."""
    names = ("hit_p50", "hit_p95", "miss_p50", "miss_p95")
    styles = ("c-hit", "c-time-2", "c-miss", "c-miss-2")
    decades = [
        (style, [None if ms is None else _decades(ms) for ms in drawn[name]])
        for style, name in zip(styles, names, strict=True)
    ]
    pile = [
        (style, _filled(drawn[name]))
        for style, name in (("c-hit", "hits"), ("c-miss", "misses"), ("c-bypass", "bypasses"))
    ]
    work = [("c-miss", drawn["misses"]), ("c-time", drawn["invalidations"])]
    return {
        "requests": charts.picture(pile, words.rate, stacked=True),
        "ratio": charts.picture([("c-hit", drawn["ratio"])], words.rate, top=100),
        "latency": charts.picture(
            decades, lambda top: words.span(10 ** (top - 5)), top=6, area=False
        ),
        "work": charts.picture(work, words.rate, area=False),
        "saved": charts.picture([("c-saved", drawn["saved"])], words.rate),
    }


def _filled(column: view.Column) -> list[float]:
    return [value or 0.0 for value in column]


def _decades(ms: float) -> float:
    """Return where a time stands on a logarithmic axis that begins at 10 microseconds."""
    return max(0.0, log10(max(ms, 0.01)) + 2)


def _by_time(taken: Histogram | None) -> list[charts.Column]:
    if taken is None:
        return []
    labels = [*map(words.bound, BOUNDS_S), "more"]
    return charts.histogram(taken.counts, labels)


def _by_ttl(buckets: Sequence[Bucket]) -> list[charts.Column]:
    labels = [
        "more" if bucket.below_s is None else f"< {words.bound(bucket.below_s)}"
        for bucket in buckets
    ]
    return charts.histogram([bucket.count for bucket in buckets], labels)
