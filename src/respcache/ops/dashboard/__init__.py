"""The dashboard: pages, JSON API and live figures for operators and tenant admins, as one ASGI
application to be mounted.

``Dashboard(admin, gate)``; see docs/dashboard.md. It needs the extra ``dashboard``.
"""

from respcache.ops.dashboard.app import Dashboard
from respcache.ops.dashboard.auth import AuthBackend, TooManyAttempts

__all__ = ["AuthBackend", "Dashboard", "TooManyAttempts"]
