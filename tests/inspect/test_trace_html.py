"""HTML: tokens are escaped, whole and in order, coloured as in the terminal, and the page loads nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from ultrafuser.display.palette import colour, rgb
from ultrafuser.inspect.html import code_like, trace_css, trace_html, trace_page
from ultrafuser.inspect.trace import TokenTrace, on_one_line, printable


class Tokens(HTMLParser):
    """What a browser makes of the token spans: their text, title and style."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self._inside = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "span" and (dict(attrs).get("class") or "").startswith("uf-t"):
            self._inside = True
            self.texts.append("")
            self.attributes.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "span"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def test_a_browser_reads_every_token_in_order_with_its_whitespace(trace: TokenTrace) -> None:
    html = trace_html(trace)
    assert Tokens(html).texts == [printable(token) for token in trace.tokens]
    assert "</span><span" in html and not re.search(r"</span>\s+<span class=\"uf-t", html)
    assert re.search(r"\.uf-tokens \{[^}]*white-space: pre-wrap", html)


@pytest.mark.parametrize("field", ["tokens", "specialists", "prompt", "title", "domain"])
def test_markup_never_appears_raw(field: str) -> None:
    evil = "<script>\"'&</script>"
    fields: dict[str, object] = {
        "tokens": ["a"],
        "weights": [[1.0]],
        "specialists": ["x"],
        "prompt": "p",
        "title": "t",
        "domain": "d",
    }
    fields[field] = [evil] if isinstance(fields[field], list) else evil
    html = trace_html(TokenTrace(**fields))  # type: ignore[arg-type]
    assert "<script" not in html
    assert "&lt;script&gt;&#34;&#39;&amp;&lt;/script&gt;" in html
    assert Tokens(html).tags <= {"style", "figure", "figcaption", "small", "div", "span", "i", "b", "p"}


def test_colour_and_strength_are_the_leaders(trace: TokenTrace) -> None:
    for attributes, (index, margin) in zip(Tokens(trace_html(trace)).attributes, trace.leaders, strict=True):
        red, green, blue = rgb(colour(index))
        assert attributes["style"] == f"--c:{red},{green},{blue};--a:{margin:.3f}"


def test_the_tooltip_gives_the_token_and_each_weight(trace: TokenTrace) -> None:
    titles = [attributes["title"] for attributes in Tokens(trace_html(trace)).attributes]
    for title, token, row in zip(titles, trace.tokens, trace.weights, strict=True):
        pairs = "  ".join(f"{name} {weight:.3f}" for name, weight in zip(trace.specialists, row, strict=True))
        assert title == f"{on_one_line(token)}   {pairs}"


def test_the_legend_gives_mean_weights_in_the_same_colours() -> None:
    html = trace_html(TokenTrace(["a", "b"], [[1, 0], [0.5, 0.5]], ["x", "y"]), style=False)
    keys = re.findall(r'<span><i style="--c:([\d,]+)"></i>(\w)<b>([\d.]+)</b>', html)
    assert keys == [("230,159,0", "x", "0.75"), ("86,180,233", "y", "0.25")]
    assert re.findall(r"width:([\d.]+)%", html) == ["75.00", "25.00"]


def test_style_can_be_left_out(trace: TokenTrace) -> None:
    assert trace_html(trace) == f"<style>{trace_css()}</style>\n{trace_html(trace, style=False)}"


@pytest.mark.parametrize(
    ("text", "domain", "expected"),
    [
        ("Plain prose.", "text", False),
        ("See:\n```\nx\n```", "text", True),
        ("a:\n    b", None, True),
        ("x", "code", True),
    ],
)
def test_code_is_set_in_a_fixed_width_font(text: str, domain: str | None, expected: bool) -> None:
    trace = TokenTrace([text], [[1.0]], ["x"], domain=domain)
    assert code_like(trace) is expected
    assert ("uf-code" in trace_html(trace, style=False)) is expected


def test_a_page_of_traces_has_a_section_for_each_and_loads_nothing(trace: TokenTrace) -> None:
    html = trace_page("a < b", [trace, TokenTrace(["x"], [[1.0]], ["s"], prompt="p < q")])
    assert html.count("a &lt; b") == 2 and "<h2>A &amp; B</h2>" in html and "<h2>p &lt; q</h2>" in html
    assert html.count("<h2>") == 2 and html.count("<style>") == 1
    assert trace_html(trace, style=False) in html
    assert_self_contained(html)


def assert_self_contained(html: str) -> None:
    assert not re.search(r"https?:|//\w|@import|<script|<iframe", html)
    loads = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', html) + re.findall(r"url\(\s*['\"]?([^)'\"]*)", html)
    assert all(load.startswith(("#", "data:")) for load in loads), loads
    assert "default-src 'none'" in html
