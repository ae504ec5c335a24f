"""The palette: published colours first, then as many as needed, and readable text on each."""

from __future__ import annotations

from ultrafuser.display.palette import OKABE_ITO, blend, colour, colours, domain_colours, ink_on, rgb


def luminance(hex_colour: str) -> float:
    components = [c / 255 for c in rgb(hex_colour)]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in components)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_okabe_ito_first_then_no_repeats() -> None:
    assert tuple(colours(["a", "b", "c", "d", "e", "f", "g"]).values()) == OKABE_ITO
    many = [colour(index) for index in range(60)]
    assert len(set(many)) == 60
    assert all(len(shade) == 7 and rgb(shade) for shade in many)


def test_text_on_every_colour_meets_the_contrast_of_wcag_aa() -> None:
    for index in range(60):
        for amount in (0.0, 0.3, 0.7, 1.0):
            shade = blend("#dcdcdc", colour(index), amount)
            assert contrast(shade, ink_on(shade)) >= 4.5


def test_blend_ends_and_middle() -> None:
    assert blend("#102030", "#f0e0d0", 0) == "#102030"
    assert blend("#102030", "#f0e0d0", 1) == "#f0e0d0"
    assert blend("#000000", "#ffffff", 0.2) == "#333333"


def test_a_domain_has_its_specialists_colour_and_others_one_of_their_own() -> None:
    shades = domain_colours(["mixed", "code", "other"], ["text", "code", "math"])
    assert shades["code"] == colour(1)
    assert len(set(shades.values())) == 3
    assert not {shades["mixed"], shades["other"]} & {colour(k) for k in range(3)}
