"""Pages: blocks are escaped, the page loads nothing, a script runs by its hash alone."""

from __future__ import annotations

import base64
import hashlib
import re

from ultrafuser.display.page import (
    Block,
    Cell,
    Definitions,
    Details,
    Html,
    Note,
    Plot,
    Preformatted,
    Row,
    Sentences,
    Subheading,
    Table,
    page,
)

EVIL = "</script><script>\"'&</script>"
ESCAPED = "&lt;/script&gt;&lt;script&gt;&#34;&#39;&amp;&lt;/script&gt;"


def test_the_page_escapes_text_keeps_fragments_and_loads_nothing() -> None:
    html = page("a < b", [("1 < 2", [Note("n")]), ("", [Html("<p>raw</p>")])], lead="x & y", footer="<i>")
    assert html.startswith("<!DOCTYPE html>") and html.count("a &lt; b") == 2 and "<h2>1 &lt; 2</h2>" in html
    assert "x &amp; y" in html and "&lt;i&gt;" in html and "<p>raw</p>" in html
    assert html.count("<h2>") == 1 and "<nav>" not in html
    assert not re.search(r"https?:|//\w|@import|<script|<iframe", html)
    loads = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', html) + re.findall(r"url\(\s*[\'\"]?([^)\'\"]*)", html)
    assert all(load.startswith(("#", "data:")) for load in loads), loads
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_no_block_lets_markup_through() -> None:
    cell = Cell(EVIL, [EVIL])
    table = Table([cell, cell], [Row(cell, [cell]), Row(cell, failure=EVIL)])
    blocks: list[Block] = [
        table,
        Plot("<svg></svg>", EVIL, label=EVIL),
        Note(EVIL),
        Subheading(EVIL),
        Sentences([EVIL]),
        Definitions({EVIL: EVIL}),
        Details(EVIL, Preformatted(EVIL, is_error=True)),
    ]
    html = page(EVIL, [(EVIL, blocks)] * 3, lead=EVIL, footer=EVIL)
    assert "<script" not in html and "</script" not in html
    # title, heading, lead and footer; per section: navigation, heading, 10 cells and notes, a failure, 2 captions and a label of
    # the plot, note, subheading, sentence, 2 of the definitions, 2 of the details
    assert html.count(ESCAPED) == 4 + 3 * (2 + 10 + 1 + 3 + 3 + 2 + 2)


def test_sections_with_a_heading_are_in_the_navigation() -> None:
    html = page("t", [("a", [Note("1")]), ("", [Note("2")]), ("b", [Note("3")])])
    assert '<nav><a href="#s0">a</a><a href="#s2">b</a></nav>' in html
    assert re.findall(r'<section id="(s\d)">\s*(?:<h2>(.*?)</h2>)?', html) == [("s0", "a"), ("s1", ""), ("s2", "b")]


def test_a_script_runs_by_its_hash() -> None:
    script = "let a = 1 < 2 && '</b>';\n"
    html = page("t", [], script=script, styles=["b > i { color: red }"])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"<script>{script}</script>" in html and f"script-src 'sha256-{digest}'" in html
    assert "b > i { color: red }" in html


def test_a_plot_keeps_no_address_and_tells_its_caption_to_screen_readers() -> None:
    image = '<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="9" xmlns="http://www.w3.org/2000/svg"><path/></svg>'
    html = page("t", [("", [Plot(image, "A & B", label="Figure 1.")])])
    assert '<svg role="img" aria-label="A &amp; B" width="9"><path/></svg>' in html
    assert "<figcaption><b>Figure 1.</b> A &amp; B</figcaption>" in html
