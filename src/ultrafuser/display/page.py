"""Self-contained HTML pages, made of blocks. The templates, styles and scripts are files beside the code."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

PACKAGE = Path(__file__).parents[1]
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(PACKAGE),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text over small notes."""

    text: str
    notes: Sequence[str] = ()
    bold: bool = False
    verdict: str = ""  # better, worse or level: how its text is coloured


@dataclass(frozen=True)
class Row:
    """A row of a table. A failure takes the place of all cells."""

    heading: Cell
    cells: Sequence[Cell] = ()
    classes: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Table:
    """A table that scrolls sideways on a narrow screen."""

    headings: Sequence[Cell]
    rows: Sequence[Row]
    dense: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Plot:
    """A figure: an `<svg>` element (of `drawing.svg`) over its caption."""

    svg: str
    caption: str
    label: str = ""
    kind: ClassVar[str] = "plot"

    @property
    def drawing(self) -> str:
        """The element after `<svg`. HTML implies the namespaces, and without them the page holds no address at all."""
        return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", self.svg).removeprefix("<svg")


@dataclass(frozen=True)
class Note:
    """A paragraph in small print, with the legend of verdicts if asked for."""

    text: str
    with_verdicts: bool = False
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Subheading:
    """A heading within a section."""

    text: str
    kind: ClassVar[str] = "subheading"


@dataclass(frozen=True)
class Sentences:
    """A list of sentences."""

    items: Sequence[str]
    kind: ClassVar[str] = "list"


@dataclass(frozen=True)
class Definitions:
    """Terms and their meanings."""

    entries: Mapping[str, str]
    kind: ClassVar[str] = "definitions"


@dataclass(frozen=True)
class Details:
    """A block behind a heading that opens it."""

    heading: str
    content: Block
    kind: ClassVar[str] = "details"


@dataclass(frozen=True)
class Preformatted:
    """Text in a fixed-width font with its line breaks."""

    text: str
    is_error: bool = False
    kind: ClassVar[str] = "preformatted"


@dataclass(frozen=True)
class Html:
    """HTML that a template made. It is not escaped again."""

    html: str
    classes: str = ""
    kind: ClassVar[str] = "html"


Block = Table | Plot | Note | Subheading | Sentences | Definitions | Details | Preformatted | Html
Section = tuple[str, Sequence[Block]]


def page(
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    footer: str = "",
    styles: Sequence[str] = (),
    script: str = "",
) -> str:
    """A page that loads nothing from elsewhere, light and dark, readable on a phone.

    Args:
        sections: pairs of a heading and blocks. A section without a heading is not in the navigation.
        styles: CSS that only this page needs.
        script: JavaScript of this page, run at its end. The browser runs this text and no other, by its hash.
    """
    return render(
        "display/templates/page.html.jinja",
        title=title,
        sections=sections,
        lead=lead,
        footer=footer,
        style="".join([text_file("display/templates/style.css"), *styles]),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def render(template: str, **values: Any) -> str:
    """The HTML of a template, named by its path in the package. Every value is escaped."""
    return _ENVIRONMENT.get_template(template).render(**values)


def text_file(path: str) -> str:
    """A style sheet or script of the package."""
    return (PACKAGE / path).read_text(encoding="utf-8")


def as_json(value: Any) -> Preformatted:
    """Any value as indented JSON."""
    return Preformatted(json.dumps(value, indent=2, ensure_ascii=False, default=str))
