"""Write the table of recipe fields into docs/recipes.md; with --check, fail when it is out of date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ultrafuser.recipe import describe_fields

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
START, END = "<!-- fields:start -->", "<!-- fields:end -->"


def table() -> str:
    rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    rows += [f"| `{path}` | {kind} | {default} | {text} |" for path, kind, default, text in describe_fields()]
    return "\n".join(rows)


def render(page: str) -> str:
    head, start, rest = page.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        sys.exit(f"{PAGE}: expected the markers {START} and {END}")
    return f"{head}{START}\n{table()}\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when out of date")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    fresh = render(page)
    if check and fresh != page:
        sys.exit(f"{PAGE}: out of date; run: python scripts/recipe_docs.py")
    if not check:
        PAGE.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
