"""Findings about the application's set-up, each reported once per process."""

import logging

log = logging.getLogger("respcache")


class Findings:
    """Logs a warning the first time it is reported. The set-up bounds the number of messages."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def warn_once(self, message: str) -> None:
        """Log this message unless this process has logged it before."""
        if message not in self._reported:
            self._reported.add(message)
            log.warning("%s", message)
