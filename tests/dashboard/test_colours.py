"""The colours of the style sheet."""

import re

import pytest

from respcache.ops.dashboard import layout

CSS = layout.assets()["app.css"].body.decode()
PALETTES = {
    "light": ":root {",
    "dark": ':root[data-theme="dark"] {',
    "system": ':root:not([data-theme="light"]) {',
}
LEGIBLE = 4.5
"""Of small text: WCAG 2.2, 1.4.3."""

ON = {
    "text": ("bg", "panel", "raised"),
    "dim": ("bg", "panel", "raised"),
    "faint": ("bg", "panel", "raised"),
    "accent": ("bg", "panel", "raised", "accent-soft"),
    "good": ("good-soft",),
    "warn": ("warn-soft", "panel"),
    "bad": ("bad-soft",),
    "on-accent": ("accent", "bad"),
}
"""What is written in a colour, and on which."""


def palette(name: str) -> dict[str, str]:
    """Return the colours of a palette by their names."""
    return dict(
        re.findall(r"--([\w-]+): (#[0-9a-f]{6})", CSS.split(PALETTES[name])[1].split("}")[0])
    )


def luminance(colour: str) -> float:
    """Return the relative luminance (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_is_legible(name: str) -> None:
    """Every colour of text on every ground that it stands on."""
    colours = palette(name)
    for text, grounds in ON.items():
        for ground in grounds:
            dark, light = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (light + 0.05) / (dark + 0.05) >= LEGIBLE, (text, ground)


def test_dark_is_the_same_whoever_chose_it() -> None:
    """The system, or somebody by hand."""
    assert palette("dark") == palette("system")
