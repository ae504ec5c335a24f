"""The generated part of a page, between two comments."""

from __future__ import annotations

import sys
from pathlib import Path


def between(page: str, start: str, end: str, fresh: str, where: Path) -> str:
    """The page with another text between its markers; without them the script ends."""
    head, found, rest = page.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{where}: expected the markers {start} and {end}")
    return f"{head}{start}\n{fresh}\n{end}{tail}"


def refresh(where: Path, start: str, end: str, fresh: str, script: str) -> None:
    """Write the page anew; with --check on the command line, end with an error where it is out of date."""
    page = where.read_text(encoding="utf-8")
    new = between(page, start, end, fresh, where)
    if "--check" not in sys.argv:
        where.write_text(new, encoding="utf-8")
    elif new != page:
        sys.exit(f"{where}: out of date; run: python scripts/{script}.py")
