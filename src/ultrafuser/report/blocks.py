"""The blocks that a report's sections are made of: tables, figures, answers, definitions; all HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ultrafuser.inspect.html import trace_html
from ultrafuser.inspect.trace import TokenTrace

ANSWERS_NOTE = (
    "Each token lies on the colour of the specialist with the largest weight, stronger the further it is "
    "ahead of the next. Point at a token, or tap it, for its weights."
)


def table(heads: Sequence[str], rows: Sequence[str], *, kind: str = "") -> str:
    """A table that scrolls sideways on a narrow screen; heads and rows are HTML, kind is its CSS class."""
    cells = "".join(f'<th scope="col">{head}</th>' for head in heads)
    name = f' class="{kind}"' if kind else ""
    body = "\n".join(rows)
    return f'<div class="scroll"><table{name}><thead><tr>{cells}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def row(head: str, cells: Sequence[str], kind: str = "") -> str:
    """A row of `table`: its head and cells are HTML."""
    columns = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{kind}"><th scope="row">{head}</th>{columns}</tr>'


def plot(image: str, caption: str, *, number: str = "") -> str:
    """An inline figure: an `<svg>` element (of `drawing.svg`) over its caption, which is plain text.

    Namespaces are implied in HTML and left out, so that no address at all stands in the page.
    """
    image = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", image)
    image = image.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    head = f"<b>{escape(number)}</b> " if number else ""
    text = f"<figcaption>{head}{escape(caption)}</figcaption>"
    return f'<figure class="plot"><div class="scroll">{image}</div>{text}</figure>\n'


def answers(traces: Sequence[TokenTrace]) -> str:
    """Answers in the colours of the specialists that led."""
    shown = "\n".join(f'<div class="answer">{trace_html(trace, style=False)}</div>' for trace in traces)
    return f'<p class="note">{ANSWERS_NOTE}</p>\n{shown}'


def definitions(entries: Mapping[str, str]) -> str:
    """Terms and what they mean, in plain text."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"


def details(heading: str, content: str) -> str:
    """Content, which is HTML, behind a heading to open."""
    return f"<details><summary>{escape(heading)}</summary>{content}</details>\n"


def as_json(value: Any) -> str:
    """Any value as indented JSON."""
    return f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False, default=str))}</pre>"
