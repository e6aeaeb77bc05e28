"""The pages that only read: each calls ``ops/admin.py`` with the access of the signed-in user.

``actions.py`` contains the pages that change something.
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
from respcache.ops.dashboard import formatting as fmt
from respcache.ops.dashboard.api import describe_error, numbers
from respcache.ops.dashboard.auth import Authenticator, Viewer
from respcache.ops.dashboard.layout import Addresses, PageRenderer, assets, fingerprint
from respcache.ops.search import TtlBucket
from respcache.ops.stats.rows import Overview, StatsRow
from respcache.telemetry.stats import BOUNDS_S, Histogram

TENANTS_A_PAGE = 50
EVENTS_SHOWN = 100
ACTIONS_A_PAGE = 100
KEYS_A_PAGE = 50
BUSIEST = 8
MAX_FOUND = 20
"""Tenants that a search by name returns."""

FOREVER = {"cache-control": "public, max-age=31536000, immutable"}
TITLES = {
    400: "Bad request",
    403: "Forbidden",
    404: "Page not found",
    405: "Method not allowed",
    413: "Content too large",
    429: "Too many requests",
    500: "Internal server error",
    503: "Service unavailable",
}

Endpoint = Callable[[Request, Viewer], Awaitable[Response]]


class Pages:
    """The pages that only read."""

    def __init__(self, admin: Admin, authenticator: Authenticator, renderer: PageRenderer) -> None:
        self._admin = admin
        self._authenticator = authenticator
        self.renderer = renderer

    def routes(self) -> list[BaseRoute]:
        """Return the routes of the pages."""
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
            "/audit-log": self.audit_log,
        }
        return [
            Route("/static/{fingerprint}/{name}", self.asset, methods=["GET"]),
            *(
                Route(path, self.signed_in(endpoint), methods=["GET"])
                for path, endpoint in shown.items()
            ),
        ]

    def signed_in(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        """Wrap an endpoint for signed-in users: others are redirected to the sign-in page, and
        errors get an error page."""

        async def respond(request: Request) -> Response:
            viewer = await self._authenticator.by_cookie(request)
            if viewer is None:
                return to_sign_in(request)
            try:
                return await endpoint(request, viewer)
            except (OperationError, StoreError) as error:
                status, _, text = describe_error(error, viewer.access)
                return self.error_page(request, viewer, status=status, message=text)

        return respond

    def error_page(
        self, request: Request, viewer: Viewer | None, *, status: int, message: str
    ) -> Response:
        """Return an error page."""
        title = TITLES.get(status, TITLES[400])
        return self.renderer.page(
            request, "error.html", viewer=viewer, status=status, title=title, message=message
        )

    async def asset(self, request: Request) -> Response:
        """Return a script, a style sheet or a font. Its address changes with its content, so
        browsers may cache it forever."""
        asset = assets().get(request.path_params["name"])
        if asset is None or request.path_params["fingerprint"] != fingerprint():
            raise HTTPException(404, "There is no file at this address")
        return Response(asset.body, media_type=asset.media_type, headers=FOREVER)

    # -- statistics --------------------------------------------------------------------------------

    async def overview(self, request: Request, viewer: Viewer) -> Response:
        """Show the state of the cache; to the admin of one tenant, that tenant."""
        if viewer.access.tenant is not None:
            return await self._one_tenant(request, viewer, viewer.access.tenant, at="overview")
        overview = await self._admin.overview(viewer.access)
        routes = sorted(await self._admin.routes(viewer.access), key=lambda row: -row.requests)[
            :BUSIEST
        ]
        columns = view.columns(overview.series)
        tiles = view.tiles(overview)
        return self.renderer.page(
            request,
            "overview.html",
            viewer=viewer,
            at="overview",
            overview=overview,
            routes=routes,
            tiles=tiles,
            now=time.time(),
            states=view.states(overview),
            static_charts=_static_charts(columns),
            sparks={
                tile.spark: charts.spark(
                    columns[tile.spark], top=100 if tile.spark == "ratio" else None
                )
                for tile in tiles
            },
        )

    async def tenants(self, request: Request, viewer: Viewer) -> Response:
        """Show the tenants, the largest first, or those that a search finds."""
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
        return self.renderer.page(
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
        """Show one tenant."""
        tenant = viewer.tenant(request.path_params["tenant"]) or ""
        return await self._one_tenant(
            request, viewer, tenant, at="tenants" if viewer.access.tenant is None else "overview"
        )

    async def modules(self, request: Request, viewer: Viewer) -> Response:
        """Show modules and routes, of all tenants or of one."""
        tenant = viewer.tenant(request.query_params.get("tenant", ""))
        modules = await self._admin.modules(viewer.access, tenant=tenant)
        routes = await self._admin.routes(viewer.access, tenant=tenant)
        switches = await self._admin.switches(viewer.access)
        return self.renderer.page(
            request,
            "modules.html",
            viewer=viewer,
            at="modules",
            modules=_busiest(modules),
            routes=_busiest(routes),
            timed=viewer.access.tenant is None and tenant is None,
            off=switches.modules,
            selected_tenant=_name_of(viewer, tenant),
        )

    async def latency(self, request: Request, viewer: Viewer) -> Response:
        """Show the durations of hits and misses."""
        viewer.access.demand_everything("the latency of all tenants")
        overview = await self._admin.overview(viewer.access, minutes=1)
        routes = [
            row
            for row in await self._admin.routes(viewer.access)
            if row.miss_p50_s is not None or row.hit_p50_s is not None
        ]
        routes.sort(key=lambda row: -(row.miss_p95_s or 0.0))
        return self.renderer.page(
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
        """Show the last invalidations; new ones are added live."""
        tenant = viewer.tenant(request.query_params.get("tenant", ""))
        feed = await self._admin.feed(viewer.access, tenant=tenant, limit=EVENTS_SHOWN)
        name = _name_of(viewer, tenant)
        return self.renderer.page(
            request, "feed.html", viewer=viewer, at="feed", feed=feed, selected_tenant=name
        )

    # -- stored responses --------------------------------------------------------------------------

    async def keys(self, request: Request, viewer: Viewer) -> Response:
        """Show a sample of the stored responses, and the keys of a tenant or a module."""
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
        return self.renderer.page(
            request,
            "keys.html",
            viewer=viewer,
            at="keys",
            page=page,
            sample=sample,
            module=module or "",
            selected_tenant=_name_of(viewer, tenant),
            modules=self._admin.module_names(),
            ttl=[] if sample is None else _by_ttl(sample.ttl),
            sizes=[]
            if sample is None
            else sorted(sample.modules.items(), key=lambda item: -item[1]),
        )

    async def key(self, request: Request, viewer: Viewer) -> Response:
        """Show one stored response, without its body."""
        return await self.one_key(request, viewer, request.query_params.get("key", ""))

    async def one_key(
        self, request: Request, viewer: Viewer, key: str, *, body: Any = None
    ) -> Response:
        """Show one stored response, with its body if it was revealed."""
        one = await self._admin.inspect(viewer.access, key)
        return self.renderer.page(request, "key.html", viewer=viewer, at="keys", one=one, body=body)

    # -- the system --------------------------------------------------------------------------------

    async def configuration(self, request: Request, viewer: Viewer) -> Response:
        """Show the effective configuration and its sources."""
        settings = await self._admin.configuration(viewer.access)
        return self.renderer.page(
            request, "configuration.html", viewer=viewer, at="configuration", settings=settings
        )

    async def audit_log(self, request: Request, viewer: Viewer) -> Response:
        """Show the actions in the audit log."""
        before = numbers(request, "before").get("before")
        events = await self._admin.audit_log(viewer.access, limit=ACTIONS_A_PAGE + 1, before=before)
        return self.renderer.page(
            request,
            "audit_log.html",
            viewer=viewer,
            at="audit_log",
            events=events[:ACTIONS_A_PAGE],
            more=len(events) > ACTIONS_A_PAGE,
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
        return self.renderer.page(
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

    async def _found(self, viewer: Viewer, q: str) -> list[StatsRow]:
        """Return the tenants with statistics whose name or id contains a text."""
        wanted = q.lower()
        names = (
            tenant
            for tenant, name in viewer.names.items()
            if wanted in name.lower() or wanted in tenant.lower()
        )
        rows: list[StatsRow] = []
        for tenant in [*dict.fromkeys([*names, q])][:MAX_FOUND]:
            try:
                rows.append(await self._admin.tenant(viewer.access, tenant))
            except OperationError:
                continue
        return sorted(rows, key=lambda row: -row.requests)


def to_sign_in(request: Request) -> Response:
    """Redirect to the sign-in page, which redirects back afterwards."""
    to = Addresses(request)
    back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    address = (
        f"{to('sign-in')}?{urlencode({'next': back})}" if request.method == "GET" else to("sign-in")
    )
    if "hx-request" in request.headers:
        return Response(status_code=401, headers={"hx-redirect": to("sign-in")})
    return RedirectResponse(address, 303)


def _name_of(viewer: Viewer, tenant: str | None) -> str:
    return "" if tenant is None else viewer.name(tenant)


def _busiest(rows: Sequence[StatsRow]) -> list[StatsRow]:
    return sorted(rows, key=lambda row: (-row.requests, row.name))


def _warnings(overview: Overview, tenant: str) -> list[tuple[str, str]]:
    """Return titles and texts of the warnings on a tenant's page."""
    found: list[tuple[str, str]] = []
    if overview.problem:
        found.append(("Statistics of one worker only", overview.problem))
    if overview.switches.everything:
        found.append(("The cache is switched off", "the application handles every request"))
    if tenant in overview.switches.tenants:
        found.append(("This tenant is switched off", "the application handles its requests"))
    if tenant in overview.pending_tenants:
        found.append(
            ("An invalidation is not confirmed yet", "until then this worker bypasses the tenant")
        )
    stale = [finding for finding in overview.findings if finding.tenant == tenant]
    if stale:
        found.append(
            (
                f"The verifier found {len(stale)} wrong responses",
                f"the last one at {stale[-1].at}, {stale[-1].route}",
            )
        )
    return found


def _static_charts(columns: dict[str, view.Column]) -> dict[str, charts.Chart]:
    """Return the charts of the overview for browsers without JavaScript."""
    names = ("hit_p50", "hit_p95", "miss_p50", "miss_p95")
    styles = ("c-hit", "c-time-2", "c-miss", "c-miss-2")
    decades = [
        (style, [None if ms is None else _decades(ms) for ms in columns[name]])
        for style, name in zip(styles, names, strict=True)
    ]
    stack = [
        (style, _filled(columns[name]))
        for style, name in (("c-hit", "hits"), ("c-miss", "misses"), ("c-bypass", "bypasses"))
    ]
    work = [("c-miss", columns["misses"]), ("c-time", columns["invalidations"])]
    return {
        "requests": charts.chart(stack, fmt.rate, stacked=True),
        "ratio": charts.chart([("c-hit", columns["ratio"])], fmt.rate, top=100),
        "latency": charts.chart(
            decades, lambda top: fmt.duration(10 ** (top - 5)), top=6, area=False
        ),
        "work": charts.chart(work, fmt.rate, area=False),
        "saved": charts.chart([("c-saved", columns["saved"])], fmt.rate),
    }


def _filled(column: view.Column) -> list[float]:
    return [value or 0.0 for value in column]


def _decades(ms: float) -> float:
    """Return the position of a duration on a logarithmic axis that starts at 10 microseconds."""
    return max(0.0, log10(max(ms, 0.01)) + 2)


def _by_time(taken: Histogram | None) -> list[charts.Bar]:
    if taken is None:
        return []
    labels = [*map(fmt.bound, BOUNDS_S), "more"]
    return charts.histogram(taken.counts, labels)


def _by_ttl(buckets: Sequence[TtlBucket]) -> list[charts.Bar]:
    labels = [
        "more" if bucket.below_s is None else f"< {fmt.bound(bucket.below_s)}" for bucket in buckets
    ]
    return charts.histogram([bucket.count for bucket in buckets], labels)
