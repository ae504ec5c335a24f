"""Small and large YAML that would take minutes or gigabytes is refused in a second, by every reader of a recipe."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ultrafuser import typed_yaml
from ultrafuser.compare.recipe import load_compare_recipe
from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.errors import RecipeError
from ultrafuser.recipe import load_node, load_recipe
from ultrafuser.synth.recipe import load_synth_recipe

READERS = {
    "train": load_recipe,
    "compare": load_compare_recipe,
    "synth": load_synth_recipe,
    "judge": lambda file: load_node(EndpointRecipe, file),
}
VALUES = "more than 100,000 values, each alias counted as what it stands for"
DEPTH = "nested more than 50 levels deep"


def levels(first: str, further: str, count: int) -> str:
    """Lines in which each anchor's value has the anchor above several times, written as @."""
    lines = [f"a{n}: &a{n} " + further.replace("@", f"*a{n - 1}") for n in range(1, count)]
    return "\n".join([f"a0: &a0 {first}", *lines])


HOSTILE = {
    "aliases, nine deep": (levels("[x]", f"[{', '.join('@' * 10)}]", 9), VALUES),
    "aliases of mappings": (levels("{x: 1, y: 2}", "{x: @, y: @}", 45), VALUES),
    "one list many times": (f"a: &a [{'x, ' * 1000}]\nb: [{'*a, ' * 1000}]", VALUES),
    "aliases, each a little deeper": (levels("x", "[[[[@]]]]", 20), DEPTH),
    "an alias in itself": ("a: &a [*a]", "an alias inside its own anchor"),
    "brackets": ("a: " + "[" * 3000, DEPTH),
    "closed brackets": ("a: " + "[" * 50 + "]" * 50, DEPTH),
    "braces": ("{a: " * 3000, DEPTH),
    "dashes": ("- " * 3000, DEPTH),
    "indentation": ("".join(" " * level + "a:\n" for level in range(300)), DEPTH),
    "a huge file": ("#" * 250_001, "more than 250,000 characters, which no recipe has"),
    "a long key twice": (f"{'k' * 100}: 1\n{'k' * 100}: 2", "the key 'kkk.*\\.\\.\\. is given twice"),
    "a long tag": ("!" + "t" * 10_000 + " x", "the tag .*\\.\\.\\. is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_yaml_is_refused_at_once(tmp_path: Path, kind, reader):
    text, problem = HOSTILE[kind]
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    begin = time.process_time()
    with pytest.raises(RecipeError, match=f"^{file}: .*{problem}") as error:
        READERS[reader](file)
    assert time.process_time() - begin < 5 and len(str(error.value)) < 500


def test_overrides_have_the_same_limits():
    for kind in ("aliases, nine deep", "brackets"):
        text, problem = HOSTILE[kind]
        with pytest.raises(RecipeError, match=problem):
            load_recipe({}, [f"data={text if kind == 'brackets' else '{' + text.replace(chr(10), ', ') + '}'}"])


def test_a_device_is_not_read_to_its_end():
    with pytest.raises(RecipeError, match="/dev/zero: more than 250,000 characters"):
        load_recipe("/dev/zero")


def test_ordinary_aliases_and_depth_are_read():
    assert typed_yaml.parse("a: &a {x: [1, 2]}\nb: *a\nc: [*a, *a]", "text") == {
        "a": {"x": ["1", "2"]},
        "b": {"x": ["1", "2"]},
        "c": [{"x": ["1", "2"]}] * 2,
    }
    assert typed_yaml.parse("[" * 49 + "]" * 49, "text")
    assert len(typed_yaml.parse("[" + "x, " * 80_000 + "]", "text")) == 80_000
