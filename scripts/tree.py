"""Write the tree of files into README.md. With --check, fail when it is out of date.

A module's comment is the first sentence of its docstring. A package's comment is that of its `__init__.py`. Files that
are not Python have one line per folder or kind, from the table below.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from marked_page import refresh

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ultrafuser"
SHORT_START, SHORT_END = "<!-- tree:start -->", "<!-- tree:end -->"
FULL_START, FULL_END = "<!-- files:start -->", "<!-- files:end -->"
COLUMN = 33  # where the comments begin
# Folders and kinds of files that are not Python, as patterns below src/ultrafuser.
DATA_FILES = {
    "datamap/templates/": "HTML, CSS and JavaScript of the map",
    "display/templates/": "HTML and CSS that all pages share",
    "evaluate/judged/prompts/": "Prompts of the judges",
    "evaluate/tasks/*.yaml": "One lm-eval task per file",
    "inspect/templates/": "HTML and CSS of a token trace",
    "playground/export.css": "CSS of an exported conversation",
    "playground/page/": "HTML, CSS and JavaScript of the playground",
    "py.typed": "Marks the package as typed",
    "report/templates/": "CSS of the report",
    "synth/output/card.md.jinja": "Text of the data card",
    "synth/prompts/": "Prompts of the synthesis, one Jinja file per stage",
    "zoo/adapters/": "LoRA adapters for text, code and math, with their model cards",
    "zoo/data/": "Hand-made conversations: training and test rows of four domains",
    "zoo/fuse.yaml": "Recipe that fuses the three adapters",
    "zoo/exams/adapters/": "LoRA adapters that were trained for the exams, with their model cards",
    "zoo/exams/fuse.yaml": "Recipe of the demo: it fuses the adapters of the exams",
    "zoo/exams/data/": "Exam rows for a gate, and rows on which its loss is measured",
}
FOLDERS = {
    "recipes": "Recipes for training, comparison, synthesis and the zoo's specialists",
    "benchmarks": "One script per published number",
    "docs": "The documentation, built by mkdocs",
    "examples": "Programs that use the library",
    "scripts": "Writers of generated pages, checks, training of the zoo's specialists",
    "tests": "Mirrors the package",
}


def comment(file: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not text:
        sys.exit(f"{file}: expected a docstring whose first sentence says what the file is for")
    sentence = re.split(r"(?<=[.?])\s+(?=[A-Z`])|\n\n", text)[0]
    return " ".join(sentence.split()).replace("`", "").removesuffix(".")


def line(depth: int, name: str, text: str) -> str:
    return f"{'  ' * depth + name:<{COLUMN}}{text}" if text else "  " * depth + name


def modules(folder: Path, depth: int) -> Iterator[str]:
    """Lines of a folder's content: packages, then modules, then data files."""
    for package in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield line(depth, f"{package.name}/", comment(package / "__init__.py"))
        yield from modules(package, depth + 1)
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py" or folder == PACKAGE:
            yield line(depth, file.name, comment(file))
    for pattern, text in DATA_FILES.items():
        path = PACKAGE / pattern
        if path.parent == folder and list(folder.glob(path.name)):
            yield line(depth, path.name + "/" * pattern.endswith("/"), text)


def parts() -> str:
    """The package's folders and the repository's, without their files."""
    lines = [line(0, "src/ultrafuser/", "")]
    for path in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        lines.append(line(1, f"{path.name}/", comment(path / "__init__.py")))
    return _block([*lines, *(line(0, f"{name}/", text) for name, text in FOLDERS.items())])


def files() -> str:
    """Every file of the package, of the scripts and of the benchmarks."""
    matched = {file for pattern in DATA_FILES for file in PACKAGE.glob(pattern + "**/*" * pattern.endswith("/"))}
    for file in PACKAGE.rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc") and file not in matched:
            sys.exit(f"{file}: add its folder or kind to DATA_FILES in scripts/tree.py")
    lines = [line(0, "src/ultrafuser/", ""), *modules(PACKAGE, 1)]
    for name in ("benchmarks", "examples", "scripts"):
        lines += [line(0, f"{name}/", FOLDERS[name]), *modules(ROOT / name, 1)]
    return _block(lines)


def _block(lines: list[str]) -> str:
    return "\n".join(["```tree", *lines, "```"])


def main() -> None:
    refresh(ROOT / "README.md", SHORT_START, SHORT_END, parts(), "tree")
    refresh(ROOT / "README.md", FULL_START, FULL_END, files(), "tree")


if __name__ == "__main__":
    main()
