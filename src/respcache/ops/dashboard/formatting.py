"""How figures are written: numbers, bytes, times, shares, in as few characters as one reads at a
glance. Pure."""

from datetime import UTC, datetime
from typing import Any

from respcache.core.generations import FLOOR, module_tag, table_tag
from respcache.core.keys import EVERYBODY, SHARED

NOTHING = "–"
_BIG = ((1e9, "G"), (1e6, "M"), (1e4, "k"))
_SPANS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")

OUTCOMES = {"hit": "good", "miss": "warn", "bypass": "accent"}
NOBODYS = {SHARED: "shared data", EVERYBODY: "all tenants"}
"""What stands where else a tenant stands."""

VERDICTS = {
    "valid": "Valid",
    "no-generation": "Cold: no generation",
    "other-server": "Of another life of the server",
    "other-epoch": "Of an earlier epoch",
    "other-generation": "Of an earlier generation",
    "invalidated": "Invalidated",
    "digest": "Made for another key",
    "depends": "Depends on the route",
}


def number(value: float | None) -> str:
    """Write a count: 1,234 and 1.23M."""
    if value is None:
        return NOTHING
    for size, unit in _BIG:
        if abs(value) >= size:
            factor = 1e3 if unit == "k" else size
            return f"{_counters(value / factor)}{unit}"
    return f"{value:,.0f}"


def exact(value: float | None) -> str:
    """Write a count in full."""
    return NOTHING if value is None else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """Write something per second: 0.12, 4.5, 1,234."""
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
    """Write bytes: 512 B, 1.5 KiB."""
    if value is None:
        return NOTHING
    for unit in _BYTES:
        if abs(value) < 1024 or unit == _BYTES[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{_counters(value)} {unit}"
        value /= 1024
    raise AssertionError("there is a largest unit")


def span(seconds: float | None) -> str:
    """Write a time: 85 µs, 1.2 ms, 340 ms, 3.5 s, 12 min, 2.1 h, 4.0 d."""
    if seconds is None:
        return NOTHING
    if seconds == 0:
        return "0 s"
    for length, unit in _SPANS:
        if seconds >= length or unit == "µs":
            value = seconds / length
            return (
                f"{value:.0f} {unit}"
                if length >= 1 and value == round(value)
                else f"{_counters(value)} {unit}"
            )
    raise AssertionError("there is a smallest unit")


def bound(seconds: float) -> str:
    """Write the end of a bucket, which is a round number: 25 µs, 2.5 ms."""
    length, unit = next((one for one in _SPANS if seconds >= one[0] * 0.999), _SPANS[-1])
    return f"{seconds / length:.3g} {unit}"


def share(value: float | None) -> str:
    """Write a share of one as per cent."""
    if value is None:
        return NOTHING
    percent = value * 100
    return f"{percent:.0f}%" if percent in (0.0, 100.0) else f"{percent:.1f}%"


def ago(when: datetime | float | None, now: datetime | None = None) -> str:
    """Write how long ago something was."""
    if when is None:
        return NOTHING
    moment = when if isinstance(when, datetime) else datetime.fromtimestamp(when, UTC)
    passed = ((now or datetime.now(UTC)) - moment).total_seconds()
    return "just now" if passed < 1 else f"{span(float(int(passed)))} ago"


def clock(when: datetime | float | None) -> str:
    """Write a moment in full, in UTC."""
    if when is None:
        return NOTHING
    moment = when if isinstance(when, datetime) else datetime.fromtimestamp(when, UTC)
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def time_of_day(when: datetime) -> str:
    """Write the time of a moment, in UTC, to the tenth of a second."""
    moment = when.astimezone(UTC)
    return f"{moment:%H:%M:%S}.{moment.microsecond // 100_000}"


def short_key(key: str) -> str:
    """Shorten an entry's key to what tells it from its neighbours: module, kind and the begin of
    the digest."""
    return ":".join([*key.split(":")[2:-1], key.rpartition(":")[2][:10]])


def verdict(word: str) -> str:
    """Write a verdict."""
    return VERDICTS.get(word, word)


def tag_words(tag: str) -> str:
    """Write what an answer depends on."""
    if tag == FLOOR:
        return "all of the tenant"
    kind = "module" if tag.startswith(module_tag("")) else "table"
    return f"{kind} {tag.removeprefix(module_tag('')).removeprefix(table_tag(''))}"


def reasons(counted: dict[str, int]) -> str:
    """Write counts by reason, the most frequent first."""
    return ", ".join(
        f"{name} {number(count)}"
        for name, count in sorted(counted.items(), key=lambda item: -item[1])
    )


FILTERS: dict[str, Any] = {
    "number": number, "exact": exact, "rate": rate, "size": size, "span": span, "share": share, "ago": ago, "clock": clock,
    "time_of_day": time_of_day, "short_key": short_key, "verdict": verdict, "reasons": reasons, "tag_words": tag_words,
}  # fmt: skip
"""For templates."""


def _counters(value: float) -> str:
    """Write with two or three figures."""
    much = abs(value)
    return f"{value:.0f}" if much >= 100 else f"{value:.1f}" if much >= 1 else f"{value:.2g}"
