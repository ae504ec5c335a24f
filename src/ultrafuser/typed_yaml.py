"""Read YAML files and command-line overrides into a typed tree of pydantic models, whatever the tree describes.

A YAML scalar stays text until the type of its field is known, so `no` and `2e-5` are never misread.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import core_schema

from ultrafuser.errors import RecipeError


class Scalar(str):
    """The text of a YAML scalar, its value in YAML, and the folder of its file (None: an override)."""

    as_yaml_value: Any
    folder: Path | None


def as_yaml_value(value: Any) -> Any:
    """The value in YAML. Free-form fields need it, since they have no type to coerce by."""
    if isinstance(value, Mapping):
        return {str(key): as_yaml_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_yaml_value(item) for item in value]
    return getattr(value, "as_yaml_value", value)


FreeForm = Annotated[dict[str, Any], BeforeValidator(as_yaml_value)]


class Node(BaseModel):
    """A mapping of the tree. Unknown keys are errors, and a bare string may stand for one of its fields."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
    shorthand: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return _expanded(cls, value)


@dataclass(frozen=True)
class DiscriminatedBy:
    """Marks a union of nodes that one field tells apart: `Annotated[GateStage | JointStage, DiscriminatedBy("name")]`.

    Each node declares the field as a `Literal` of its values. One node may declare it with another type: it takes all
    other values. A bare string picks a node when the field is the nodes' `shorthand`.
    """

    field: str

    def values(self, node: type[Node]) -> tuple[Any, ...]:
        """The values that pick a node. None for the node that takes all others."""
        kinds = _options(child_of(node, self.field))
        return tuple(value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind))

    def pick(self, nodes: Sequence[type[Node]], value: Any) -> type[Node] | None:
        """The node that a mapping, a bare string or an instance belongs to. None if the field is missing or wrong."""
        if isinstance(value, Node):
            return type(value)
        fields = _expanded(nodes[0], value)
        if not isinstance(fields, Mapping) or fields.get(self.field) is None:
            return None
        matches = [node for node in nodes if fields[self.field] in self.values(node)]
        return next(iter(matches or [node for node in nodes if not self.values(node)]), None)

    def __get_pydantic_core_schema__(self, union: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        nodes = nodes_of(union)
        choices = {node.__name__: handler.generate_schema(node) for node in nodes}
        return core_schema.tagged_union_schema(
            choices, lambda value: getattr(self.pick(nodes, value), "__name__", None)
        )


def _expanded(node: type[Node], value: Any) -> Any:
    """A bare string as the mapping that it stands for. Any other value is returned as it is."""
    return {node.shorthand: value} if node.shorthand and isinstance(value, str) else value


# --- YAML text <-> dict, list, None and Scalar.


MAX_CHARS = 250_000  # of a file. PyYAML may read only 40,000 per second
MAX_VALUES = 100_000  # with all aliases. Nine levels of ten aliases each would make a billion
MAX_DEPTH = 50
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does: only true and false are booleans, and 2e-5 is a number."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"[-+]?(?:\d*\.\d+|\d+\.\d*|\d+(?=[eE]))(?:[eE][-+]?\d+)?$", re.ASCII)
_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"(?:~|null|Null|NULL|)$"), None)
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), None)
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"[-+]?(?:0|[1-9]\d*)$", re.ASCII), None)
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, None)
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "str": str,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": int,
    _TAG + "float": float,
}


def parse(text: str, source: str, folder: Path | None = None) -> Any:
    """The YAML text as dict, list, None and `Scalar`.

    Raises:
        RecipeError: the text is not YAML, has tags, repeated keys or keys that are not text, or is too large or too deep.
    """
    if len(text) > MAX_CHARS:
        raise RecipeError(f"{source}: more than {MAX_CHARS:,} characters, which no recipe has. Give another file")
    try:
        node = yaml.compose(text, _Loader)
        return None if node is None else _Builder(folder).build(node, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        causes = [getattr(error, "context", None), getattr(error, "problem", None)]
        problem = ", ".join(filter(None, causes)) or str(error).splitlines()[0]
        raise RecipeError(f"{source}: {position}not valid YAML: {problem}") from None


class _Builder:
    """Makes values of nodes, and counts them."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.count = 0

    def build(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> Any:
        """The value of a node inside of others."""
        self.count += 1
        if node in above:
            raise _refusal(node, "an alias inside its own anchor")
        if len(above) >= MAX_DEPTH:
            raise _refusal(node, _TOO_DEEP)
        if self.count > MAX_VALUES:
            raise _refusal(node, f"more than {MAX_VALUES:,} values, each alias counted as what it stands for")
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(item, (*above, node)) for item in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, (*above, node))
        if node.tag == _TAG + "null":
            return None
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            raise _refusal(node, f"the tag {_got(node.tag)} is not supported")
        scalar = Scalar(node.value)
        try:
            scalar.as_yaml_value, scalar.folder = _SCALARS[node.tag](node.value), self.folder
        except ValueError:
            raise _refusal(node, f"{_got(node.value)} is not a number") from None
        return scalar

    def _mapping(self, node: yaml.MappingNode, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal(key, "a key must be text. Put quotes around text that holds braces or brackets")
            if key.value in mapping:
                raise _refusal(key, f"the key {_got(key.value)} is given twice")
            mapping[key.value] = self.build(value, above)
        return mapping


def _refusal(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def dump(tree: Mapping[str, Any]) -> str:
    """YAML text that `parse` reads back to the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


# --- Overrides.


def apply_override(root: type[Node], tree: dict[str, Any], override: str) -> str:
    """Write `a.b.c=VALUE` into the tree. Return the path, with names of list items replaced by indices.

    Raises:
        RecipeError: no `=`, a path that does not exist, or a value that is not YAML.
    """
    source = f"override {override!r}"
    target, equals, text = override.partition("=")
    keys = [key.strip() for key in target.split(".")]
    if not equals or not all(keys):
        raise RecipeError(f"{source}: expected KEY=VALUE, e.g. stages.0.lr=2e-5")
    node: Any = tree
    kind: Any = root
    path: list[str] = []
    for depth, key in enumerate(keys, start=1):
        slot: Any = _index(node, key, f"{source}: {'.'.join(path)}") if isinstance(node, list) else key
        inner = child_of(_narrow(kind, node), slot)
        if inner is None:
            raise RecipeError(f"{source}: {'.'.join([*path, key])}: {_unknown(key, kind, _narrow(kind, node))}")
        path.append(str(slot))
        if depth == len(keys):
            node[slot] = _override_value(inner, text, source)
        else:
            child = node[slot] if isinstance(node, list) else node.get(slot)
            node[slot] = _container(child, inner, f"{source}: {'.'.join(path)}")
            node, kind = node[slot], inner
    return ".".join(path)


def _override_value(kind: Any, text: str, source: str) -> Any:
    """The value of an override. Where text is expected, ` #`, `: ` and the like belong to it, since paths may hold them."""
    is_text = all(option in (str, type(None)) for option in _options(kind))
    if not is_text or text.strip()[:1] in ("", "'", '"', "{", "[") or text.strip() in ("~", "null", "Null", "NULL"):
        return parse(text, source)
    value = Scalar(text.strip())
    value.as_yaml_value, value.folder = str(value), None
    return value


def _container(value: Any, kind: Any, source: str) -> Any:
    """The mapping or list that `value` is, stands for or, when it is absent, would be."""
    for option in _options(kind):
        is_list = get_origin(option) is list
        is_mapping = get_origin(option) is dict or _is_node(option)
        if isinstance(value, dict) and (is_mapping or option is Any):
            return value
        if isinstance(value, list) and (is_list or option is Any):
            return value
        if isinstance(value, str) and _is_node(option) and option.shorthand:
            return {option.shorthand: value}
        if value is None and (is_mapping or is_list or option is Any):
            return [] if is_list else {}
    current = "" if value is None else f" (here {_got(value)})"
    raise RecipeError(f"{source}: expected {in_words(kind)}{current}, so nothing inside it can be set")


def _index(items: list[Any], key: str, source: str) -> int:
    if key.isdecimal():
        if int(key) < len(items):
            return int(key)
        range_text = f"the last index is {len(items) - 1}" if items else "the list is empty"
        raise RecipeError(f"{source}: index {key} is out of range, {range_text}")
    names = [item.get("name") if isinstance(item, dict) else item for item in items]
    if key in names:
        return names.index(key)
    item_names = [name for name in names if isinstance(name, str)]
    raise RecipeError(f"{source}: no item named {key!r}. {_nearest(key, item_names)}. An index from 0 works too")


# --- Types and errors in words.


def explain(root: type[Node], error: ValidationError) -> tuple[str, str]:
    """The dotted path and the problem of the first error. An unknown key goes first, since it causes others."""
    errors = [item for item in error.errors() if item["type"] != "default_factory_not_called"]
    first = min(errors, key=lambda item: item["type"] != "extra_forbidden")
    kind: Any = root
    union: Any = root
    path: list[str] = []
    for key in first["loc"]:
        picked = [node for node in nodes_of(kind) if node.__name__ == key]  # pydantic names the node of a union
        child = picked[0] if picked else child_of(kind, key)
        if child is None:
            continue  # an unknown key, which comes last, or pydantic's name for a member of a union
        if child is Any:
            break
        if picked:
            kind = child
        else:
            path, kind, union = [*path, str(key)], child, child
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        return ".".join([*path, key]), _unknown(key, union, kind)
    if first["type"] == "union_tag_not_found":
        return _explain_discriminator(path, kind, first["input"])
    if first["type"] == "value_error":
        return ".".join(path), str(first["ctx"]["error"])
    problem = "missing" if first["type"] == "missing" else f"got {_got(first['input'])}"
    return ".".join(path), f"{problem}, expected {in_words(kind)}"


def _explain_discriminator(path: list[str], union: Any, value: Any) -> tuple[str, str]:
    """The path and the problem of a value that picks no node of a union."""
    marker = _discriminator(union)
    assert marker is not None  # pydantic has looked for its field
    nodes, name = nodes_of(union), marker.field
    fields = _expanded(nodes[0], value)
    if not isinstance(fields, Mapping):
        return ".".join(path), f"got {_got(value)}, expected {in_words(union)}"
    problem = f"got {_got(fields[name])}" if name in fields else "missing"
    expected = " or ".join(in_words(child_of(node, name)) for node in nodes)
    return ".".join([*path, name]), f"{problem}, expected {expected}"


def labels_of(union: Any, node: type[Node]) -> list[str]:
    """The values that pick a node of a union."""
    marker = _discriminator(union)
    return [str(value) for value in marker.values(node)] if marker is not None and marker.values(node) else ["others"]


def _is_node(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Node)


def _options(kind: Any) -> list[Any]:
    """The members of a union, without annotations."""
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [option for arg in get_args(kind) for option in _options(arg)]
    return [kind]


def nodes_of(kind: Any) -> list[type[Node]]:
    return [option for option in _options(kind) if _is_node(option)]


def _discriminator(kind: Any) -> DiscriminatedBy | None:
    """The marker of a type that is or holds a union of nodes."""
    if get_origin(kind) is Annotated:
        markers = [item for item in get_args(kind)[1:] if isinstance(item, DiscriminatedBy)]
        return markers[0] if markers else _discriminator(get_args(kind)[0])
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    return next(filter(None, map(_discriminator, members)), None)


def _narrow(kind: Any, value: Any) -> Any:
    """The node of a union that a value picks. Any other type is returned as it is."""
    marker = _discriminator(kind)
    return (marker and marker.pick(nodes_of(kind), value)) or kind


def child_of(kind: Any, key: str | int) -> Any:
    """The type at `key` inside `kind`. None if there is none."""
    for option in _options(kind):
        if _is_node(option) and key in option.model_fields:
            return option.model_fields[key].rebuild_annotation()
        if get_origin(option) is list and isinstance(key, int):
            return get_args(option)[0]
        if option is Any or (get_origin(option) is dict and isinstance(key, str)):
            return Any
    return None


_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def in_words(kind: Any, metadata: Sequence[Any] = ()) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return in_words(args[0], args[1:])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(in_words, args)))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is list:
        return "list" if nodes_of(args[0]) else f"list of {in_words(args[0])}"
    if origin is dict or _is_node(kind):
        return "mapping"
    limits = [limit for item in metadata for limit in getattr(item, "metadata", [item])]
    bounds = [f"{sign} {getattr(x, key)}" for x in limits for key, sign in _BOUNDS.items() if hasattr(x, key)]
    return " ".join([_WORDS[kind], " and ".join(bounds)]).strip()


def _got(value: Any) -> str:
    text = "null" if value is None else repr(as_yaml_value(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(key: str, names: Sequence[str]) -> str:
    words = key.lower().split("_")
    initials = "".join(word[:1] for word in words)  # learning_rate: lr
    similar = [name for name in names if name == initials or name in words]
    similar = similar or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return (f"Did you mean {similar[0]!r}? " if similar else "") + f"Known: {', '.join(names) or 'none'}"


def _unknown(key: str, union: Any, kind: Any) -> str:
    """The error text for a key that `kind` does not have. `union`: the nodes among which `kind` was picked."""
    names = [name for node in nodes_of(kind) for name in node.model_fields]
    owners = [label for node in nodes_of(union) if key in node.model_fields for label in labels_of(union, node)]
    if not owners or (marker := _discriminator(union)) is None:
        return f"unknown key. {_nearest(key, names)}"
    picked = " or ".join(map(repr, labels_of(union, kind)))
    return (
        f"unknown key for {marker.field} {picked}. {' and '.join(map(repr, owners))} would take it. "
        f"Known: {', '.join(names)}"
    )
