"""Formats numbers, bytes, durations and shares in few characters. Pure."""

from datetime import UTC, datetime
from typing import Any

from respcache.core.generations import FLOOR, module_tag, table_tag
from respcache.core.keys import EVERYBODY, SHARED

NOTHING = "–"
_BIG = ((1e9, "G"), (1e6, "M"), (1e4, "k"))
_DURATIONS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")

OUTCOME_TONES = {"hit": "good", "miss": "warn", "bypass": "accent"}
SPECIAL_TENANTS = {SHARED: "shared data", EVERYBODY: "all tenants"}
"""Labels of special tenants."""

VERDICTS = {
    "valid": "Valid",
    "no-generation": "No generation",
    "other-server": "From another server life",
    "other-epoch": "From an earlier epoch",
    "other-generation": "From an earlier generation",
    "invalidated": "Invalidated",
    "digest": "Stored under another key",
    "depends": "Depends on the route",
}


def number(value: float | None) -> str:
    """Format a count: 1,234 or 1.23M."""
    if value is None:
        return NOTHING
    for size, unit in _BIG:
        if abs(value) >= size:
            factor = 1e3 if unit == "k" else size
            return f"{_digits(value / factor)}{unit}"
    return f"{value:,.0f}"


def exact(value: float | None) -> str:
    """Format a count with all digits."""
    return NOTHING if value is None else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """Format a rate per second: 0.12, 4.5, 1,234."""
    if value is None:
        return NOTHING
    return (
        number(value)
        if value >= 100
        else f"{value:.1f}"
        if value >= 10 or value == 0
        else f"{value:.2f}"
    )


def size(value: float | None) -> str:
    """Format a number of bytes: 512 B, 1.5 KiB."""
    if value is None:
        return NOTHING
    for unit in _BYTES:
        if abs(value) < 1024 or unit == _BYTES[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{_digits(value)} {unit}"
        value /= 1024
    raise AssertionError("there is a largest unit")


def duration(seconds: float | None) -> str:
    """Format a duration: 85 µs, 1.2 ms, 340 ms, 3.5 s, 12 min, 2.1 h, 4.0 d."""
    if seconds is None:
        return NOTHING
    if seconds == 0:
        return "0 s"
    for length, unit in _DURATIONS:
        if seconds >= length or unit == "µs":
            value = seconds / length
            return (
                f"{value:.0f} {unit}"
                if length >= 1 and value == round(value)
                else f"{_digits(value)} {unit}"
            )
    raise AssertionError("there is a smallest unit")


def bound(seconds: float) -> str:
    """Format the bound of a bucket, which is a round number: 25 µs, 2.5 ms."""
    length, unit = next((one for one in _DURATIONS if seconds >= one[0] * 0.999), _DURATIONS[-1])
    return f"{seconds / length:.3g} {unit}"


def share(value: float | None) -> str:
    """Format a share from 0 to 1 in per cent."""
    if value is None:
        return NOTHING
    percent = value * 100
    return f"{percent:.0f}%" if percent in (0.0, 100.0) else f"{percent:.1f}%"


def ago(when: datetime | float | None, now: datetime | None = None) -> str:
    """Format the time since a moment."""
    if when is None:
        return NOTHING
    moment = when if isinstance(when, datetime) else datetime.fromtimestamp(when, UTC)
    passed = ((now or datetime.now(UTC)) - moment).total_seconds()
    return "just now" if passed < 1 else f"{duration(float(int(passed)))} ago"


def clock(when: datetime | float | None) -> str:
    """Format a moment with date and time in UTC."""
    if when is None:
        return NOTHING
    moment = when if isinstance(when, datetime) else datetime.fromtimestamp(when, UTC)
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def time_of_day(when: datetime) -> str:
    """Format the time of a moment in UTC, to a tenth of a second."""
    moment = when.astimezone(UTC)
    return f"{moment:%H:%M:%S}.{moment.microsecond // 100_000}"


def short_key(key: str) -> str:
    """Shorten an entry's key to module, kind and the beginning of the digest."""
    return ":".join([*key.split(":")[2:-1], key.rpartition(":")[2][:10]])


def verdict(word: str) -> str:
    """Return the label of a verdict."""
    return VERDICTS.get(word, word)


def tag_words(tag: str) -> str:
    """Return the meaning of a tag."""
    if tag == FLOOR:
        return "the whole tenant"
    kind = "module" if tag.startswith(module_tag("")) else "table"
    return f"{kind} {tag.removeprefix(module_tag('')).removeprefix(table_tag(''))}"


def reasons(counted: dict[str, int]) -> str:
    """Format counts by reason, the most frequent first."""
    return ", ".join(
        f"{name} {number(count)}"
        for name, count in sorted(counted.items(), key=lambda item: -item[1])
    )


FILTERS: dict[str, Any] = {
    "number": number,
    "exact": exact,
    "rate": rate,
    "size": size,
    "duration": duration,
    "share": share,
    "ago": ago,
    "clock": clock,
    "time_of_day": time_of_day,
    "short_key": short_key,
    "verdict": verdict,
    "reasons": reasons,
    "tag_words": tag_words,
}
"""Filters of templates."""


def _digits(value: float) -> str:
    """Format with two or three digits."""
    much = abs(value)
    return f"{value:.0f}" if much >= 100 else f"{value:.1f}" if much >= 1 else f"{value:.2g}"
