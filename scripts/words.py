"""Count vague names in the source and semicolons in the pages. Fail above the limits. With --report, list the files.

A binding is an assigned name or an argument. Code blocks and inline code of a page do not count.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_VAGUE_PERCENT = 1.5  # of all bindings; seven well-known projects of the field have 0.0 to 1.4
MAX_SEMICOLONS_PER_100_WORDS = 0.3
# Pronouns, participles, adverbs and other words that do not say what a value is.
VAGUE = set(
    "own one mine theirs ours found done given asked wanted kept odd said other others left before place places home "
    "where what at told heard chosen known here whole member members part parts number room want wants look shown now "
    "again each more most much near often".split()
)


def bindings(file: Path) -> list[str]:
    """Every name that a module assigns, and every argument."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
    return names


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"`[^`]*`", "", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="list the files with vague names or semicolons")
    report = parser.parse_args().report
    num_bindings, vague = 0, Counter[str]()
    for file in sorted((ROOT / "src").rglob("*.py")):
        names = bindings(file)
        file_vague = Counter(name for name in names if name.strip("_") in VAGUE)
        num_bindings += len(names)
        vague += file_vague
        if report and file_vague:
            print(f"{file_vague.total():4} of {len(names):4} bindings  {file.relative_to(ROOT)}  {dict(file_vague)}")
    num_words = num_semicolons = 0
    for page in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]:
        text = prose(page)
        words, semicolons = len(text.split()), text.count(";")
        num_words, num_semicolons = num_words + words, num_semicolons + semicolons
        if report and semicolons:
            print(f"{semicolons:4} semicolons in {words:5} words  {page.relative_to(ROOT)}")
    percent = 100 * vague.total() / num_bindings
    per_100 = 100 * num_semicolons / num_words
    print(f"vague names: {percent:.2f}% of {num_bindings:,} bindings (at most {MAX_VAGUE_PERCENT}%)")
    print(f"semicolons: {per_100:.2f} per 100 of {num_words:,} words (at most {MAX_SEMICOLONS_PER_100_WORDS})")
    if percent > MAX_VAGUE_PERCENT or per_100 > MAX_SEMICOLONS_PER_100_WORDS:
        sys.exit("run: python scripts/words.py --report")


if __name__ == "__main__":
    main()
