"""`ultrafuser synth`: the recipe as first word is a run, options before it too; words and JSON on stdout, errors in a line."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fake_writer import FakeClient, Writer, tiny
from ultrafuser import sandbox
from ultrafuser.cli.synth import Overrides, synth_app
from ultrafuser.errors import DataError, RecipeError
from ultrafuser.synth.recipe import dump_synth_recipe

app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(synth_app, name="synth")


@app.callback()
def _options() -> None:
    pass


def invoke(*words):
    return CliRunner().invoke(app, ["synth", *map(str, words)], catch_exceptions=True)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    file = tmp_path / "r.yaml"
    file.write_text(dump_synth_recipe(tiny(f"output={tmp_path / 'out'}")))
    from ultrafuser.synth.calls import clients as clients

    monkeypatch.setattr(clients, "make_clients", lambda models: {model.name: FakeClient(Writer()) for model in models})
    return file


def test_a_recipe_is_run(recipe, tmp_path):
    result = invoke(recipe)
    assert result.exit_code == 0, result.output
    assert "144 rows: math 72, text 72" in result.stdout
    assert (tmp_path / "out" / "data.jsonl").is_file()
    repeated = invoke("run", recipe, "--json")
    assert json.loads(repeated.stdout)["rows"] == {"math": 72, "text": 72}


def test_overrides_and_options_before_the_recipe(recipe):
    result = invoke("--until", "meta_topics", recipe, "complex_share=0")
    assert result.exit_code == 0, result.output
    assert "stopped after meta_topics" in result.stdout


def test_a_dry_run_sends_no_request(recipe, tmp_path):
    result = invoke(recipe, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "responses" in result.stdout and "estimate" in result.stdout
    assert not (tmp_path / "out").exists()
    planned = json.loads(invoke(recipe, "--dry-run", "--json").stdout)
    assert {stage["stage"] for stage in planned} >= {"meta_topics", "responses"}


def test_a_prompt_file_cannot_unpickle_in_a_dry_run(recipe, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = tmp_path / "prompts"
    folder.mkdir()
    pickled = repr(pickle.dumps(Payload(), protocol=0).decode("ascii"))
    call = f"domain.parse_raw({pickled}, content_type='pickle', allow_pickle=True)"
    (folder / "judge.jinja").write_text("{{ " + call + " }}{{ answer }}")
    result = invoke(recipe, f"prompts={folder}", "--dry-run")
    assert isinstance(result.exception, RecipeError)
    assert "judge.jinja: undefined variable: 'dict object' has no attribute 'parse_raw'" in str(result.exception)
    assert not (tmp_path / "ran").exists()


def test_a_dry_run_of_a_part_on_a_machine_without_sandbox_and_test_files(recipe, monkeypatch):
    monkeypatch.setattr(sandbox, "available", lambda: "bubblewrap is not installed")
    overrides = ["domains.math.check=python", "domains.math.tests=true", "filters.decontaminate=[nowhere/test.jsonl]"]
    planned = json.loads(invoke(recipe, "--dry-run", "--json", "--until", "expand", *overrides).stdout)
    assert {(stage["stage"], stage["part"]) for stage in planned} == {
        ("meta_topics", ""), ("sub_topics", ""), ("instructions", ""), ("expand", "strong"), ("expand", "weak"),
    }  # fmt: skip


def test_the_numbers_of_a_dry_run_are_whole_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    prices = ("models.strong.prompt_usd=2.5", "models.strong.completion_usd=10")
    output = invoke(Path(__file__).parents[2] / "recipes" / "ultrachat2.yaml", "--dry-run", *prices).stdout
    assert "173,902,530" in output and "286,984,698" in output and "2,868.08" in output and "…" not in output
    assert max(map(len, output.splitlines())) <= 80
    assert "expand strong" in output and "expand weak" in output


def test_status_prints_the_calls_before_it_derives_the_items(recipe, monkeypatch):
    from ultrafuser.synth import status

    assert invoke(recipe).exit_code == 0
    monkeypatch.setattr(status, "derive", lambda *_, **__: 1 / 0)
    result = invoke("status", recipe)
    assert isinstance(result.exception, ZeroDivisionError)
    assert re.match(r"calls: \d+ answered, 0 under way \(\d+\.\d per minute\), cost: \$0\.0000\n", result.stdout)
    assert not invoke("status", recipe, "--json").stdout


def test_status_and_join(recipe):
    assert invoke(recipe).exit_code == 0
    result = invoke("status", recipe)
    assert result.exit_code == 0, result.output
    assert "near duplicates included: math 72, text 72" in result.stdout and "remaining: about 0 calls" in result.stdout
    assert json.loads(invoke("status", recipe, "--json").stdout)["rows"] == {"math": 72, "text": 72}
    fewer = invoke("join", recipe, "filters.min_answer_chars=82")
    assert fewer.exit_code == 0 and "144 rows" not in fewer.stdout


@pytest.mark.parametrize(
    ("words", "kind", "problem"),
    [
        (["--shard", "2"], RecipeError, "--shard 2: expected I/N such as 1/8"),
        (["--shard", "9/8"], RecipeError, "--shard 9/8"),
        (["--until", "dinner"], RecipeError, "--until dinner: no such stage"),
        (["--dry-run", "--until", "dinner"], RecipeError, "--until dinner: no such stage"),
        (
            ["--dry-run", "--shard", "1/2"],
            RecipeError,
            "--shard does not apply to --dry-run, which estimates a whole run",
        ),
        (["--dry-run", "--budget-usd", "2"], RecipeError, "--budget-usd does not apply to --dry-run"),
        (["--dry-run", "--budget-tokens", "2"], RecipeError, "--budget-tokens does not apply to --dry-run"),
        (["--dry-run", "--retry-failed"], RecipeError, "--retry-failed does not apply to --dry-run"),
        (["domains.law.name=x"], RecipeError, "no item named 'law'"),
        (["colour=red"], RecipeError, "unknown key"),
    ],
)
def test_errors(recipe, words, kind, problem):
    error = invoke(recipe, *words).exception
    assert isinstance(error, kind) and problem in str(error)


def test_a_store_or_recipe_that_is_not_there(recipe, tmp_path):
    error = invoke("join", recipe, tmp_path / "shard.sqlite").exception
    assert isinstance(error, DataError) and "expected the calls.sqlite of a shard" in str(error)
    assert "no such file, expected a YAML recipe" in str(invoke(tmp_path / "no.yaml").exception)


def test_help():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("run", "status", "join", "review"):
        assert command in result.stdout
    assert "`ultrafuser synth RECIPE` is short for `ultrafuser synth run RECIPE`" in result.stdout
    of_run = invoke("run", "--help").stdout
    assert "--budget-usd" in of_run and "stages.gate.lr" not in of_run


def test_the_example_of_an_override_holds_for_a_recipe_of_synth(recipe):
    example = next(iter(Overrides.__metadata__)).help
    for override in re.findall(r"\S+=\S+(?<!\.)", example):
        assert invoke(recipe, "--dry-run", override).exit_code == 0
