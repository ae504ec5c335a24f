"""Replace the generated block of a page, between two comments."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from PIL import Image


def between(text: str, start: str, end: str, block: str, page: Path) -> str:
    """The text of a page with another block between its markers. Without markers, exit with an error."""
    head, opening, rest = text.partition(start)
    _, closing, tail = rest.partition(end)
    if not opening or not closing:
        sys.exit(f"{page}: expected the markers {start} and {end}")
    return f"{head}{start}\n{block}\n{end}{tail}"


def refresh(page: Path, start: str, end: str, block: str, script: str) -> None:
    """Write the block into the page. With --check on the command line, exit with an error if the page is out of date."""
    text = page.read_text(encoding="utf-8")
    new = between(text, start, end, block, page)
    if "--check" not in sys.argv:
        page.write_text(new, encoding="utf-8")
    elif new != text:
        sys.exit(f"{page}: out of date. Run: python scripts/{script}.py")


def digest(results: Path) -> str:
    """What ties a figure to the file of results that it was drawn from: stored in the image under `Results`."""
    return hashlib.sha256(results.read_bytes()).hexdigest()[:16]


def check_figure(figure: Path, results: Path, script: str) -> None:
    """Exit with an error if the figure was not drawn from these results."""
    with Image.open(figure) as image:
        if image.info.get("Results") != digest(results):
            sys.exit(f"{figure}: not drawn from {results}. Run: python scripts/{script}.py")
