"""The client of the dashboard's JSON API (``ops/dashboard/api.py``): one connection, one token,
failures as exit statuses."""

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
"""Of answers; all others but 200 are failures."""


def read_token(file: Path | None) -> str | None:
    """Return the token: of the file (``-``: standard input), else of RESPCACHE_TOKEN. Raises
    ``Failure``."""
    if file is None:
        return os.environ.get("RESPCACHE_TOKEN") or None
    try:
        if str(file) == "-":
            with open(0, closefd=False) as stream:
                token = stream.readline().strip()
        else:
            if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise Failure(Status.USAGE, f"{file} can be read by others: chmod 600 {file}")
            token = file.read_text().strip()
    except OSError as error:
        raise Failure(Status.USAGE, f"--token-file {file}: {error.strerror}") from None
    if not token:
        raise Failure(Status.USAGE, f"--token-file {file} holds no token")
    return token


class Client:
    """Asks one application. ``url`` is where its dashboard is mounted."""

    def __init__(self, url: str, token: str | None) -> None:
        try:
            parsed = httpx2.URL(url.rstrip("/") + "/")
        except httpx2.InvalidURL as error:
            raise Failure(Status.USAGE, f"--url {url!r} cannot be read: {error}") from None
        if parsed.userinfo:
            raise Failure(
                Status.USAGE,
                "--url holds a user or a password: leave them out, the token is in RESPCACHE_TOKEN",
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
                "the token holds blanks or characters that no token has: give it whole and alone",
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
        """Ask for a document. None and empty values are left out. Raises ``Failure``."""
        given = {name: str(value) for name, value in query.items() if value not in (None, "")}
        return self._answer("GET", path, params=given)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Have something done, or explained. Raises ``Failure``."""
        return self._answer(
            "POST", path, json={name: value for name, value in body.items() if value is not None}
        )

    def _answer(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = self._http.request(method, path, **options)
        except httpx2.HTTPError as error:
            said = str(error) or type(error).__name__
            raise Failure(
                Status.UNREACHABLE,
                f"{self.url} does not answer: {said}; set --url or RESPCACHE_URL",
            ) from None
        try:
            document = answer.json()
        except ValueError:
            document = None
        if answer.status_code == 200 and document is not None:
            return document
        raise self._failure(answer, document)

    def _failure(self, answer: httpx2.Response, document: Any) -> Failure:
        """Say what an answer means that is no document."""
        code = answer.status_code
        said = document.get("message") if isinstance(document, dict) else None
        if code == 401 and self.token is None:
            return Failure(
                Status.REFUSED, "a token is needed: set RESPCACHE_TOKEN, or give --token-file"
            )
        if code == 401:
            return Failure(
                Status.REFUSED,
                f"{self.url} does not know the token, or it has ended: set RESPCACHE_TOKEN anew",
            )
        if not isinstance(said, str) or not isinstance(document, dict) or "error" not in document:
            where = f"{answer.request.url} answered {code}"
            hint = "is that where the dashboard is mounted? set --url or RESPCACHE_URL"
            return Failure(
                STATUSES.get(code, Status.FAILED) if code >= 500 else Status.UNREACHABLE,
                f"{where}: {hint}",
            )
        return Failure(STATUSES.get(code, Status.FAILED), said)
