"""Synthesis recipes: what is refused and in which words, defaults that survive a partial block, the recipes that ship."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fake_writer import tiny
from ultrafuser.errors import RecipeError
from ultrafuser.synth.prompts import EXAMPLES, Prompts
from ultrafuser.synth.recipe import LocalModel, ServedModel, dump_synth_recipe, load_synth_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = [ROOT / "recipes" / name for name in ("synth-served.yaml", "synth-tiny.yaml", "ultrachat2.yaml")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_load_and_their_prompts_render(path, tmp_path):
    recipe = load_synth_recipe(path)
    Prompts(recipe.prompts)
    (tmp_path / "again.yaml").write_text(dump_synth_recipe(recipe))
    assert load_synth_recipe(tmp_path / "again.yaml") == recipe


def documented() -> list[str]:
    """Every `ultrafuser synth` of the page, in blocks and in running text, that is about a recipe of ours."""
    page = (ROOT / "docs" / "synthesis.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"(?:^|`)ultrafuser synth ([^`\n]+)", page, re.M)
    return [line for line in lines if any((ROOT / word).is_file() for word in line.split())]


@pytest.mark.parametrize("line", documented())
def test_documented_commands_load_with_their_overrides(line):
    words = shlex.split(line, comments=True)
    [file] = [word for word in words if word.endswith(".yaml")]
    load_synth_recipe(ROOT / file, [word for word in words if re.match(r"[\w.]+=", word)])


def test_the_page_shows_commands():
    assert len(documented()) >= 4 and any("models.text.model=" in line for line in documented())


def test_the_papers_sizes():
    recipe = load_synth_recipe(ROOT / "recipes" / "ultrachat2.yaml")
    sizes = {d.name: (d.counts.meta_topics, d.counts.sub_topics, d.counts.rows) for d in recipe.domains}
    assert sizes == {"text": (30, 1100, 100000), "code": (21, 407, 100000), "math": (21, 80, 110000)}
    assert sum(topics for topics, _, _ in sizes.values()) == 72
    assert sum(topics for _, topics, _ in sizes.values()) == 1587
    assert recipe.complex_share == 0.3
    for domain in recipe.domains:  # enough is asked for
        counts = domain.counts
        assert counts.instructions * (1 + counts.strong + counts.weak) >= counts.rows


def test_a_call_keeps_its_stages_usual_values():
    recipe = tiny(calls={"sub_topics": {"per_call": 5}, "responses": "writer"})
    assert (recipe.calls.sub_topics.per_call, recipe.calls.sub_topics.temperature) == (5, 1.0)
    assert recipe.calls.sub_topics.max_tokens == 2048
    assert (recipe.calls.responses.model, recipe.calls.responses.temperature) == ("writer", 0.7)
    assert tiny("calls.judge.max_tokens=7").calls.judge.temperature == 0.0


def test_models_by_stage_and_domain():
    models = [{"name": name, "endpoint": f"{name}@http://h/v1"} for name in ("cheap", "strong", "maths", "unused")]
    recipe = tiny("domains.math.answer_model=maths", models=models, calls={"responses": "strong", "complex": "cheap"})
    text, math = recipe.domains
    assert recipe.role("meta_topics", text) == "cheap"
    assert recipe.role("responses", text) == "strong"
    assert recipe.role("responses", math) == recipe.role("samples", math) == "maths"
    assert [model.name for model in recipe.used_models()] == ["cheap", "strong", "maths"]


def test_paths_beside_the_file_are_found(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "tests.txt").write_text("a test")
    text = dump_synth_recipe(tiny()).replace("prompts: null", "prompts: mine")
    (tmp_path / "r.yaml").write_text(text.replace("decontaminate: []", "decontaminate: ['*.txt']"))
    recipe = load_synth_recipe(tmp_path / "r.yaml")
    assert recipe.prompts == str(tmp_path / "mine")
    assert recipe.filters.decontaminate == [str(tmp_path / "*.txt")]


MODEL = {"name": "m", "endpoint": "m@http://h/v1"}
DOMAIN = {"name": "d", "description": "Things."}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"models": []}, "'models' is empty"),
        ({"domains": []}, "'domains' is empty"),
        ({"domains": [DOMAIN, DOMAIN]}, "'domains' has two items named 'd'"),
        ({"models": [MODEL, MODEL]}, "'models' has two items named 'm'"),
        ({"models": [{"name": "m"}]}, "models.0.endpoint: missing, expected local or mapping"),
        (
            {"models": [{"name": "m", "endpoint": "local"}]},
            "model 'm': with 'endpoint: local' expected 'model' (a folder",
        ),
        (
            {"models": [{"name": "m", "endpoint": "local", "model": "openai:x@http://h/v1"}]},
            "got openai:x@http://h/v1; a ser",
        ),
        (
            {"models": [MODEL | {"model": "x"}]},
            "'model' is for 'endpoint: local', got x beside the endpoint m@http://h/v1",
        ),
        (
            {"models": [{"name": "m", "endpoint": {"model": "m", "base_url": "nowhere"}}]},
            "endpoint.base_url: got 'nowhere'",
        ),
        (
            {"models": [{"name": "m", "endpoint": {"model": "m", "retry": 2}}]},
            "endpoint.retry: unknown key. Did you mean 'ret",
        ),
        ({"calls": {"judge": "oracle"}}, "calls.judge.model: no model 'oracle'; there are: writer"),
        ({"domains": [DOMAIN | {"answer_model": "oracle"}]}, "domains.d.answer_model: no model 'oracle'"),
        ({"domains": [DOMAIN | {"check": "spelling"}]}, "none or python or math"),
        ({"domains": [DOMAIN | {"samples": 2}]}, "'samples' needs 'check: math'; remove"),
        ({"domains": [DOMAIN | {"tests": True}]}, "'tests' needs 'check: python'; remove"),
        ({"domains": [DOMAIN | {"topics": ["a", "a"]}]}, "the topic 'a' is listed twice"),
        ({"domains": [{"name": "d"}]}, "description: missing"),
        ({"domains": [DOMAIN | {"colour": "red"}]}, "colour: unknown key"),
        ({"filters": {"near_duplicates": 3}}, "near_duplicates"),
        ({"complex_share": 2}, "complex_share"),
        ({"domain": []}, "unknown key. Did you mean 'domains'"),
    ],
)
def test_invalid_recipes_are_refused(fields, problem):
    with pytest.raises(RecipeError) as error:
        tiny(**fields)
    assert problem in str(error.value)


def test_an_override_of_a_domain_that_is_not_there():
    with pytest.raises(RecipeError, match="domains: no item named 'law'"):
        tiny("domains.law.counts.rows=3")


def test_the_pages_example_loads(tmp_path):
    page = (ROOT / "docs" / "synthesis.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (tmp_path / "r.yaml").write_text(example)
    recipe = load_synth_recipe(tmp_path / "r.yaml")
    assert recipe.role("responses", recipe.domain("tax")) == "strong"


def test_the_page_lists_each_prompts_variables():
    page = (ROOT / "docs" / "synthesis.md").read_text(encoding="utf-8")
    for name, example in EXAMPLES.items():
        [line] = re.findall(rf"^\| `{name}\.jinja` \| (.*) \|$", page, re.M)
        assert set(re.findall(r"`(\w+)`", line)) - {"strong", "weak", "user", "assistant"} == set(example) - {"domain"}


def test_a_saved_recipe_with_the_fields_of_the_other_kind_of_model_still_loads():
    """Earlier versions saved every field with every model."""
    served = MODEL | {"model": None, "dtype": "auto", "batch_size": 8, "generation": {}, "chat_template": None}
    local = {"name": "l", "endpoint": "local", "model": "some/model", "structured": False, "tokens_per_minute": None}
    recipe = tiny(models=[served, local])
    assert isinstance(recipe.model("m"), ServedModel) and isinstance(recipe.model("l"), LocalModel)
    assert not {"dtype", "batch_size"} & set(recipe.model("m").model_dump())
