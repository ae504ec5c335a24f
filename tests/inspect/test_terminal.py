"""The terminal: the response as it is, in the leaders' colours; tokens cannot act on the terminal."""

from __future__ import annotations

import io

from rich.console import Console
from rich.text import Text

from ultrafuser.display.palette import NEUTRAL, blend, colour
from ultrafuser.inspect.terminal import render_terminal
from ultrafuser.inspect.trace import TokenTrace, printable


def printed(renderable: object, *, coloured: bool = False) -> str:
    file = io.StringIO()
    system = "truecolor" if coloured else None
    console = Console(file=file, width=200, force_terminal=coloured, color_system=system, tab_size=4)  # type: ignore[arg-type]
    console.print(renderable)
    return file.getvalue()


def response(trace: TokenTrace) -> Text:
    texts = [line for line in render_terminal(trace).renderables if isinstance(line, Text)]
    return next(text for text in texts if text.plain == printable(trace.text))


def test_each_token_has_its_leaders_colour_and_its_own_text(trace: TokenTrace) -> None:
    text = response(trace)
    assert [text.plain[span.start : span.end] for span in text.spans] == [printable(token) for token in trace.tokens]
    backgrounds = [span.style.bgcolor.triplet.hex for span in text.spans]  # type: ignore[union-attr]
    assert backgrounds == [blend(NEUTRAL, colour(index), margin) for index, margin in trace.leaders]


def test_the_clearer_the_lead_the_nearer_to_the_pure_colour() -> None:
    rows = [[0.5, 0.5], [0.6, 0.4], [1.0, 0.0]]
    spans = response(TokenTrace(["a", "b", "c"], rows, ["x", "y"])).spans
    shades = [span.style.bgcolor.triplet.hex for span in spans]  # type: ignore[union-attr]
    assert shades[0] == NEUTRAL and shades[2] == colour(0) and shades[1] not in (shades[0], shades[2])


def test_printed_text_keeps_order_and_whitespace_and_markup_is_not_markup(trace: TokenTrace) -> None:
    lines = [line.rstrip() for line in printed(render_terminal(trace)).splitlines()]
    assert lines[:2] == ["A & B", "<b>why</b> [red]"]
    assert lines[2:6] == ["Let $x_1$:", "", '    if    a<script> &amp;[bold]"␛[31m数', "end"]
    # text leads 6 tokens of 15, code 6, math 3; the mean is (6 * 0.8 + 9 * 0.1) / 15, and so on.
    assert lines[-1].split() == ["text", "0.38", "code", "0.38", "math", "0.24", "no", "clear", "lead"]


def test_no_escape_sequence_of_a_token_reaches_the_terminal(trace: TokenTrace) -> None:
    assert "\x1b" not in printed(render_terminal(trace, weights=True))
    assert "\x1b[31m" not in printed(render_terminal(trace), coloured=True)


def test_the_weights_table_has_every_token_and_weight(trace: TokenTrace) -> None:
    plain, full = printed(render_terminal(trace)), printed(render_terminal(trace, weights=True))
    assert full.startswith(plain)
    rows = [line.split() for line in full[len(plain) :].splitlines() if line.strip()]
    assert rows[0] == ["token", "text", "code", "math"]
    assert [row[-3:] for row in rows[1:]] == [[f"{weight:.3f}" for weight in row] for row in trace.weights]
    assert [row[0] for row in rows[1:]][:6] == ["Let", "·$x_1", "$", ":↵", "↵", "⇥if"]


def test_a_response_without_tokens_says_so() -> None:
    assert "no tokens" in printed(render_terminal(TokenTrace([], [], ["x"]), weights=True))
