"""Comparison recipes: what a line may say, what is refused, and the recipe that ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from ultrafuser.compare.keys import step_key
from ultrafuser.compare.recipe import dump_compare_recipe, load_compare_recipe
from ultrafuser.compare.systems import SystemRecipe
from ultrafuser.errors import RecipeError

ROOT = Path(__file__).parents[2]
ZOO = {"recipe": "package:ultrafuser/zoo/fuse.yaml", "test": ["rows.jsonl"]}


def load(systems, *overrides, **fields):
    return load_compare_recipe(ZOO | {"systems": systems} | fields, overrides)


def test_every_kind_by_its_bare_name():
    kinds = ["base", "specialist", "oracle", "static", "merge", "router", "best_of", "btx", "fused"]
    names = [system.name for system in load(kinds).systems]
    assert names == [
        "base",
        "text",
        "code",
        "math",
        "oracle",
        "uniform-mixing",
        "linear",
        "router",
        "best_of-log_prob",
        "btx",
        "fused",
    ]


def test_the_main_system_is_the_last_fused_one():
    two = [{"kind": "fused", "name": "one"}, {"kind": "fused", "name": "two"}, "base"]
    assert load(two).main == "two"
    assert load(two, main="one").main == "one"
    assert load(["base"]).main is None


def test_an_entry_varies_the_training_recipe():
    recipe = load([{"kind": "fused", "stages": ["gate"], "set": ["balanced=false", "stages.gate.lr=0.5"]}])
    training = recipe.systems[0].training(recipe)
    assert [stage.name for stage in training.stages] == ["gate"]
    assert training.stages[0].lr == 0.5
    assert training.balanced is False
    assert recipe.training().balanced is True


def test_benchmarks_of_some_systems_do_not_change_the_keys_of_others():
    def keys(systems, **fields):
        recipe = load(systems, **fields)
        return [step_key(recipe, recipe.system(name), "measure") for name in ("base", "fused")]

    quiet = [{"kind": "base", "tasks": []}, "fused"]
    assert [load(quiet, tasks=["gsm8k", "mbpp"]).tasks_of(s) for s in load(quiet).systems] == [[], ["gsm8k", "mbpp"]]
    initial, with_tasks = keys(["base", "fused"]), keys(quiet, tasks=["gsm8k"])
    assert (with_tasks[0] == initial[0], with_tasks[1] == initial[1]) == (True, False)
    shorter = keys(quiet, tasks=["gsm8k"], limit=3)
    assert (shorter[0] == initial[0], shorter[1] == with_tasks[1]) == (True, False)


def test_a_dumped_recipe_loads_unchanged(tmp_path):
    recipe = load_compare_recipe(ROOT / "recipes" / "compare" / "zoo.yaml", ["output=elsewhere", "limit=3"])
    (tmp_path / "compare.yaml").write_text(dump_compare_recipe(recipe))
    reloaded = load_compare_recipe(tmp_path / "compare.yaml")
    assert reloaded.model_dump() == recipe.model_dump()
    assert len(reloaded.systems) > 15


@pytest.mark.parametrize(
    ("systems", "fields", "problem"),
    [
        ([], {}, "'systems' is empty"),
        (["fuse"], {}, "fuse"),
        (
            [{"kind": "base", "weight": 1}],
            {},
            "systems.0.weight: unknown key for kind 'base'. 'merge' would take it. Known: kind, name, label",
        ),
        ([{"kind": "tuned"}], {}, "systems.0.specialist: missing, expected text"),
        ([{"kind": "tuned", "specialist": "law"}], {}, "no specialist 'law'. There are: text, code, math"),
        (["fused", "fused"], {}, "two are named 'fused'"),
        (
            [{"kind": "fused", "after": "stage1"}],
            {},
            "'fused' comes after 'stage1', which is no 'fused' system listed before it",
        ),
        (
            [
                {"kind": "fused", "name": "a", "stages": ["gate"]},
                {"kind": "fused", "name": "b", "after": "a", "stages": ["gate"]},
            ],
            {},
            "'b' has no stage left to train after 'a'",
        ),
        (
            [
                {"kind": "fused", "name": "a", "stages": ["gate"]},
                {"kind": "fused", "name": "b", "after": "a", "mixing": "logits"},
            ],
            {},
            "'b' continues 'a', which has fixed 'mixing'",
        ),
        ([{"kind": "tuned", "specialist": "text"}], {"set": ["stages=[gate]"]}, "needs the stages joint"),
        ([{"kind": "specialist", "name": "all"}], {}, "stands for all of them"),
        ([{"kind": "btx", "set": ["balanced=false"]}], {}, "always trained on balanced batches"),
        (["model"], {}, "kind 'model' names no model. Set 'model', or an 'adapter' on the specialists' base"),
        (["base"], {"main": "fused"}, "main: no system 'fused'"),
        ([{"kind": "base", "versus": "text"}], {}, "'base' has versus 'text', which is no system. There are: base"),
        (["base"], {"test": []}, "nothing to measure"),
        ([{"kind": "best_of", "by": "judge"}], {}, "there is no 'judge'"),
        ([{"kind": "fused", "set": ["stages.gate.lr=fast"]}], {}, "stages.gate.lr=fast"),
        ([{"kind": "fused", "set": ["balance=false"]}], {}, "balanced"),
        (
            [{"kind": "fused", "stages": ["joint"]}],
            {"set": ["stages=[gate]"]},
            "needs the stages joint, but the training recipe has gate",
        ),
        (["base"], {"recipe": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ([{"kind": "merge", "density": 2}], {}, "density"),
        (
            [{"kind": "base", "tasks": ["mbpp"]}],
            {"tasks": ["gsm8k"]},
            "system 'base' runs 'mbpp', which is not among the comparison's tasks",
        ),
    ],
)
def test_invalid_entries_are_named(systems, fields, problem):
    with pytest.raises(RecipeError) as error:
        load(systems, **fields)
    assert problem in str(error.value)


def test_a_single_specialist_is_an_error(tmp_path):
    (tmp_path / "one.yaml").write_text("specialists: [{name: a, model: b}]")
    with pytest.raises(RecipeError, match="at least two specialists"):
        load(["base"], recipe=str(tmp_path / "one.yaml"))


def test_comparison_recipes_import_no_torch():
    code = "import sys, ultrafuser.compare.recipe; sys.exit('torch' in sys.modules or 'lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_every_kind_has_a_label_and_a_description():
    kinds = get_args(get_args(SystemRecipe)[0])
    assert len({kind.model_fields["kind"].annotation for kind in kinds}) == len(kinds)
    assert all(kind.kind_label and kind.description.endswith(".") for kind in kinds)
