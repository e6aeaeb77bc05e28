"""A client for the dashboard's JSON API (``ops/dashboard/api.py``), with one connection and one
token. Failures become exit statuses."""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2

from respcache.ops.cli.outcome import Failure, Status

DEADLINE_S = 15.0
STATUSES = {
    400: Status.USAGE,
    401: Status.REFUSED,
    403: Status.REFUSED,
    404: Status.FAILED,
    429: Status.REFUSED,
    502: Status.UNREACHABLE,
    503: Status.UNREACHABLE,
    504: Status.UNREACHABLE,
}
"""Exit statuses by HTTP status; others except 200 are FAILED."""


def read_token(file: Path | None) -> str | None:
    """Return the token from the file (``-`` for standard input), else from RESPCACHE_TOKEN.

    Raises ``Failure``.
    """
    if file is None:
        return os.environ.get("RESPCACHE_TOKEN") or None
    try:
        if str(file) == "-":
            with open(0, closefd=False) as stream:
                token = stream.readline().strip()
        else:
            if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise Failure(Status.USAGE, f"other users can read {file}: chmod 600 {file}")
            token = file.read_text().strip()
    except OSError as error:
        raise Failure(Status.USAGE, f"--token-file {file}: {error.strerror}") from None
    if not token:
        raise Failure(Status.USAGE, f"--token-file {file} contains no token")
    return token


class Client:
    """Sends requests to one application. ``url`` is the address of its dashboard."""

    def __init__(self, url: str, token: str | None) -> None:
        try:
            parsed = httpx2.URL(url.rstrip("/") + "/")
        except httpx2.InvalidURL as error:
            raise Failure(Status.USAGE, f"--url {url!r} cannot be parsed: {error}") from None
        if parsed.userinfo:
            raise Failure(
                Status.USAGE,
                "--url contains a user or a password: remove them and set RESPCACHE_TOKEN",
            )
        if (
            parsed.scheme not in ("http", "https")
            or not parsed.host
            or parsed.query
            or parsed.fragment
        ):
            raise Failure(Status.USAGE, f"--url {url!r} must be like http://localhost:4001/cache")
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            raise Failure(
                Status.USAGE,
                "the token contains blanks or other invalid characters: pass the token only",
            )
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self.url = parsed
        self.token = token
        self._http = httpx2.Client(
            base_url=parsed.join("api/"), headers=headers, timeout=DEADLINE_S
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def get(self, path: str, **query: str | int | None) -> Any:
        """Return a document. Query values that are None or empty are left out. Raises
        ``Failure``."""
        given = {name: str(value) for name, value in query.items() if value not in (None, "")}
        return self._request("GET", path, params=given)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send a body and return the resulting document. Raises ``Failure``."""
        return self._request(
            "POST", path, json={name: value for name, value in body.items() if value is not None}
        )

    def _request(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self._http.request(method, path, **options)
        except httpx2.HTTPError as error:
            message = str(error) or type(error).__name__
            raise Failure(
                Status.UNREACHABLE,
                f"{self.url} does not respond: {message}; set --url or RESPCACHE_URL",
            ) from None
        try:
            document = response.json()
        except ValueError:
            document = None
        if response.status_code == 200 and document is not None:
            return document
        raise self._failure(response, document)

    def _failure(self, response: httpx2.Response, document: Any) -> Failure:
        """Return the failure that a response without the expected document means."""
        code = response.status_code
        message = document.get("message") if isinstance(document, dict) else None
        if code == 401 and self.token is None:
            return Failure(
                Status.REFUSED, "a token is required: set RESPCACHE_TOKEN, or use --token-file"
            )
        if code == 401:
            return Failure(
                Status.REFUSED,
                f"{self.url} rejects the token, which is invalid or expired: set RESPCACHE_TOKEN",
            )
        if (
            not isinstance(message, str)
            or not isinstance(document, dict)
            or "error" not in document
        ):
            where = f"{response.request.url} responded with {code}"
            hint = "is that the address of the dashboard? set --url or RESPCACHE_URL"
            return Failure(
                STATUSES.get(code, Status.FAILED) if code >= 500 else Status.UNREACHABLE,
                f"{where}: {hint}",
            )
        return Failure(STATUSES.get(code, Status.FAILED), message)
