"""Write the tables of recipe fields into the documentation. With --check, fail when one is out of date."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from marked_page import between, refresh
from ultrafuser.compare.recipe import CompareRecipe
from ultrafuser.recipe import Recipe
from ultrafuser.synth.recipe import SynthRecipe
from ultrafuser.typed_yaml import Node, child_of, in_words, labels_of, nodes_of

DOCS = Path(__file__).parents[1] / "docs"
PAGES: dict[Path, type[Node]] = {
    DOCS / "recipes.md": Recipe,
    DOCS / "comparing.md": CompareRecipe,
    DOCS / "synthesis.md": SynthRecipe,
}
START, END = "<!-- fields:start -->", "<!-- fields:end -->"


class FieldRow(NamedTuple):
    """One field of a tree, as the documentation shows it."""

    path: str
    kind: str
    default: str
    description: str


def describe(kind: Any, prefix: str = "", values: Node | None = None) -> Iterator[FieldRow]:
    """Every field of a node, or of a union of nodes, and of all nodes below. `values`: a node that holds the defaults."""
    nodes = nodes_of(kind)
    for name in dict.fromkeys(name for node in nodes for name in node.model_fields):
        fields = {node: node.model_fields[name] for node in nodes if name in node.model_fields}
        kinds = [field.rebuild_annotation() for field in fields.values()]
        defaults = {
            node: _default(field) if values is None else getattr(values, name) for node, field in fields.items()
        }
        yield FieldRow(
            path=prefix + name,
            kind=" or ".join(dict.fromkeys(word for kind in kinds for word in in_words(kind).split(" or "))),
            default=_merged_defaults(kind, {node: _default_in_words(value) for node, value in defaults.items()}),
            description=_merged_descriptions(kind, {node: field.description or "" for node, field in fields.items()}),
        )
        for inner, default in zip(kinds, defaults.values(), strict=True):
            item = child_of(inner, 0)  # None: not a list
            inner = inner if item is None else item
            if nodes_of(inner):
                values_below = default if type(default) in nodes_of(inner) else None
                yield from describe(inner, prefix + name + ("." if item is None else "[]."), values_below)
                break


def _merged_defaults(union: Any, defaults: Mapping[type[Node], str]) -> str:
    """One default if all nodes share it, otherwise the default of each node."""
    if len(set(defaults.values())) == 1:
        return next(iter(defaults.values()))
    return ", ".join(f"{'/'.join(labels_of(union, node))}: {default}" for node, default in defaults.items())


def _merged_descriptions(union: Any, descriptions: Mapping[type[Node], str]) -> str:
    """One description if all nodes of a union share it, otherwise each one after the nodes it applies to."""
    texts = list(dict.fromkeys(descriptions.values()))
    if len(texts) == 1 and len(descriptions) == len(nodes_of(union)):
        return texts[0]
    owners = {text: [node for node in descriptions if descriptions[node] == text] for text in texts}
    return " ".join(
        ", ".join(f"`{label}`" for node in nodes for label in labels_of(union, node)) + f": {text}"
        for text, nodes in owners.items()
    )


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return "required"
    if field.default_factory_takes_validated_data:  # it depends on other fields: its docstring says how
        return field.default_factory.__doc__ or ""
    return field.get_default(call_default_factory=True)


def _default_in_words(default: Any) -> str:
    if isinstance(default, Node):
        return "its fields' own"
    if isinstance(default, list):
        return f"[{', '.join(item.name for item in default)}]"
    if default is None or isinstance(default, bool):
        return "null" if default is None else str(default).lower()
    return str(default)


def table(root: type[Node]) -> str:
    rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    for path, kind, default, text in describe(root):
        meaning = text.replace("|", "\\|")  # a bar would end the cell
        rows.append(f"| `{path}` | {kind} | {default} | {meaning} |")
    return "\n".join(rows)


def render(text: str, root: type[Node], page: Path) -> str:
    return between(text, START, END, table(root), page)


def main() -> None:
    for page, root in PAGES.items():
        refresh(page, START, END, table(root), "recipe_docs")


if __name__ == "__main__":
    main()
