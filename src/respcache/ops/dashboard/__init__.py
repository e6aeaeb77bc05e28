"""The dashboard for operators and tenant admins: pages, a JSON API and live statistics, as one ASGI
application.

``Dashboard(admin, auth)``; see docs/dashboard.md. It needs the extra ``respcache[dashboard]``.
"""

from respcache.ops.dashboard.app import Dashboard
from respcache.ops.dashboard.auth import AuthBackend, TooManyAttempts

__all__ = ["AuthBackend", "Dashboard", "TooManyAttempts"]
