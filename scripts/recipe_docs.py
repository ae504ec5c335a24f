"""Write the tables of recipe fields into the documentation. With --check, fail when one is out of date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from marked_page import between
from ultrafuser import typed_yaml
from ultrafuser.compare.recipe import CompareRecipe
from ultrafuser.recipe import Recipe
from ultrafuser.synth.recipe import SynthRecipe

DOCS = Path(__file__).parents[1] / "docs"
PAGES: dict[Path, type[typed_yaml.Node]] = {
    DOCS / "recipes.md": Recipe,
    DOCS / "comparing.md": CompareRecipe,
    DOCS / "synthesis.md": SynthRecipe,
}
START, END = "<!-- fields:start -->", "<!-- fields:end -->"


def table(root: type[typed_yaml.Node]) -> str:
    rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    rows += [f"| `{path}` | {kind} | {default} | {text} |" for path, kind, default, text in typed_yaml.describe(root)]
    return "\n".join(rows)


def render(text: str, root: type[typed_yaml.Node], page: Path) -> str:
    return between(text, START, END, table(root), page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 when out of date")
    check = parser.parse_args().check
    for page, root in PAGES.items():
        text = page.read_text(encoding="utf-8")
        new = render(text, root, page)
        if check and new != text:
            sys.exit(f"{page}: out of date. Run: python scripts/recipe_docs.py")
        if not check:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
