"""Colours of the specialists, the same in every rendering, and safe for colour-blind readers."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from itertools import count

# Source: Okabe and Ito, "Color Universal Design" (2008), in their order. Black is left to the fused model.
OKABE_ITO = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")

NEUTRAL = "#dcdcdc"  # no specialist leads


def colour(index: int) -> str:
    """Colour of specialist number `index` as #rrggbb. After the seven of Okabe and Ito come golden-angle hues."""
    if index < len(OKABE_ITO):
        return OKABE_ITO[index]
    turn = index - len(OKABE_ITO)
    lightness = (0.45, 0.65, 0.3)[turn % 3]  # neighbours differ in lightness too, which every reader sees
    red, green, blue = colorsys.hls_to_rgb(turn * 0.618034 % 1, lightness, 0.55)
    return _hex((red * 255, green * 255, blue * 255))


def colours(specialists: Sequence[str]) -> dict[str, str]:
    """Colour of every specialist, by its place in the list."""
    return {name: colour(index) for index, name in enumerate(specialists)}


def domain_colours(domains: Sequence[str], specialists: Sequence[str]) -> dict[str, str]:
    """Colour of every domain: of the specialist of the same name, else the next that no specialist has."""
    return extend_colours(colours(specialists), domains, len(specialists))


def extend_colours(shades: Mapping[str, str], names: Sequence[str], first: int) -> dict[str, str]:
    """The colour of each name in `shades`, and for the other names the next colours from number `first` on."""
    # Yellow, number 3, is too faint for a line on white.
    spare = (colour(k) for k in count(first) if k != 3)
    return {name: shades[name] if name in shades else next(spare) for name in names}


def rgb(hex_colour: str) -> tuple[int, int, int]:
    """The three components, 0 to 255, of #rrggbb."""
    return int(hex_colour[1:3], 16), int(hex_colour[3:5], 16), int(hex_colour[5:7], 16)


def blend(background: str, foreground: str, amount: float) -> str:
    """`foreground` laid over `background` with opacity `amount` in [0, 1]."""
    pairs = zip(rgb(background), rgb(foreground), strict=True)
    red, green, blue = (b + (f - b) * amount for b, f in pairs)
    return _hex((red, green, blue))


def ink_on(background: str) -> str:
    """Black or white, whichever is easier to read on `background`."""
    shares = [component / 255 for component in rgb(background)]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # WCAG 2.1, relative luminance
    return "#000000" if luminance > 0.179 else "#ffffff"  # 0.179: equal contrast with black and with white


def _hex(components: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(component):02x}" for component in components)
