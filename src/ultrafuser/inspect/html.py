"""A token trace as HTML: tokens on the colours of the leading specialists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ultrafuser.display.page import Html, page, render, text_file
from ultrafuser.display.palette import colour, rgb
from ultrafuser.inspect.trace import TokenTrace, mean_weights, on_one_line, printable

_CODE_LIKE = re.compile(r"```|^(?:    |\t)[^\S\n]*\S", re.MULTILINE)  # a fence, or an indented line


def trace_html(trace: TokenTrace, *, style: bool = True) -> str:
    """An HTML fragment: a span per token, coloured by the leading specialist, stronger the clearer it leads.

    Each span's tooltip gives the token and every weight. White space is kept.

    Args:
        style: put the style sheet before the fragment. A page with many fragments needs it once.
    """
    means = mean_weights([trace]) if trace.tokens else {}
    rows = zip(trace.tokens, trace.weights, trace.leaders, strict=True)
    return render(
        "inspect/templates/trace.html.jinja",
        style=trace_css() if style else "",
        code=code_like(trace),
        title=printable(trace.title),
        domain=printable(trace.domain or ""),
        prompt=printable(trace.prompt),
        specialists=[
            {"name": printable(name), "colour": _components(k), "weight": means.get(name)}
            for k, name in enumerate(trace.specialists)
        ],
        tokens=[_token(trace.specialists, *row) for row in rows],
    )


def trace_page(title: str, traces: Sequence[TokenTrace]) -> str:
    """A page with a section for each trace."""
    sections = [(trace.title or trace.prompt[:80], [Html(trace_html(trace, style=False))]) for trace in traces]
    return page(title, sections, styles=[trace_css()])


def trace_css() -> str:
    """The style sheet of traces."""
    return text_file("inspect/templates/trace.css")


def code_like(trace: TokenTrace) -> bool:
    """Whether the response reads better in a fixed-width font: code data, fenced or indented blocks."""
    return trace.domain == "code" or _CODE_LIKE.search(trace.text) is not None


def _token(specialists: list[str], token: str, weights: list[float], leader: tuple[int, float]) -> dict[str, Any]:
    index, margin = leader
    pairs = zip(specialists, weights, strict=True)
    tooltip = f"{on_one_line(token)}   " + "  ".join(f"{name} {weight:.3f}" for name, weight in pairs)
    return {
        "text": printable(token),
        "is_newline": token and not token.strip() and "\n" in token,
        "colour": _components(index),
        "strength": min(1.0, margin),
        "tooltip": printable(tooltip),
    }


def _components(index: int) -> str:
    """A specialist's colour as `red,green,blue`."""
    return ",".join(map(str, rgb(colour(index))))
