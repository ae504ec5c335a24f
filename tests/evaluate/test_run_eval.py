"""`ultrafuser eval` on tiny models: names, files, resuming, and what is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_endpoint import fake_endpoint, fine
from tiny_models import save_adapter, tiny
from ultrafuser.data.schema import parse_row
from ultrafuser.data.sources import write_rows
from ultrafuser.errors import CheckpointError, DataError, RecipeError
from ultrafuser.evaluate import run
from ultrafuser.evaluate.lm.fused import FusionLM
from ultrafuser.evaluate.lm.load import LoadOptions, endpoint_recipe, load_model, name_of
from ultrafuser.evaluate.options import EvalOptions, select_benchmarks
from ultrafuser.evaluate.results import markdown
from ultrafuser.evaluate.run import evaluate_models
from ultrafuser.evaluate.tasks import TaskOptions
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse
from ultrafuser.train.run import save_fused_folder

VOCAB = {"vocab_size": 320, "max_position_embeddings": 512}


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    """checkpoint(name, seed): a tiny model with its tokenizer."""

    def checkpoint(name: str, seed: int = 0) -> Path:
        folder = tmp_path / name
        tiny("llama", seed, **VOCAB).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return checkpoint


@pytest.fixture
def fused(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    specialists = [{"name": name, "model": str(checkpoint(name, seed))} for seed, name in enumerate(("text", "code"))]
    recipe = load_recipe({"specialists": specialists, "stages": ["gate"]})
    model, tokenizer = fuse(recipe)
    return save_fused_folder(model, tokenizer, recipe, tmp_path / "run")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    pairs = {"text": ["why?", "the fox"], "code": ["def?", "return a + b"], "mixed": ["both?", "dog and b"]}
    rows = [
        parse_row({"instruction": f"{q} {i}", "output": f"{a} {i}", "id": f"{domain}{i}"}, "here", domain)
        for domain, (q, a) in pairs.items()
        for i in range(3)
    ]
    write_rows(rows, tmp_path / "rows.jsonl")
    return str(tmp_path / "rows.jsonl")


@pytest.fixture
def data_dir(tmp_path: Path) -> str:
    folder = tmp_path / "data"
    folder.mkdir()
    questions = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(5)]
    (folder / "gsm8k_test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    sat = [{"question": "2x = 4", "options": ["(A)1", "(B)2", "(C)3", "(D)4"], "label": "B"} for _ in range(4)]
    (folder / "sat_math.jsonl").write_text("".join(json.dumps(q) + "\n" for q in sat))
    return str(folder)


def test_the_benchmarks_of_suites_and_tasks():
    assert select_benchmarks(["quick"], ["gsm8k", "loss"], has_judge=False) == (["loss", "gsm8k"], [])
    names, left_out = select_benchmarks(["paper"], [], has_judge=False)
    assert left_out == ["alpaca_eval"]
    assert "truthfulqa" in names
    assert select_benchmarks(["paper"], [], has_judge=True)[1] == []


@pytest.mark.parametrize(
    ("suites", "tasks", "problem"),
    [
        (["papers"], [], "unknown suite 'papers'. There are: quick, paper"),
        ([], [], "nothing to measure"),
        ([], ["mt_bench"], "mt_bench needs a judge. Give --judge"),
        (["mt-bench"], [], "mt_bench needs a judge"),
    ],
)
def test_what_cannot_be_measured_is_named(suites, tasks, problem):
    with pytest.raises(DataError, match=problem):
        select_benchmarks(suites, tasks, has_judge=False)


def test_losses_and_tasks_of_several_models(checkpoint, fused, rows, data_dir, tmp_path):
    options = EvalOptions(
        ["loss", "mixed", "gsm8k", "sat_math"],
        data=[rows],
        limit=2,
        task_options=TaskOptions(data_dir, max_new_tokens=4),
    )
    models = [str(checkpoint("plain", 0)), str(fused)]
    results = evaluate_models(models, options, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    later = evaluate_models(
        [str(fused)], EvalOptions(["sat_math"], limit=3, task_options=TaskOptions(data_dir)), tmp_path / "out"
    )
    assert later["models"]["plain"] == results["models"]["plain"]  # an earlier call's numbers stay
    assert later["models"]["fused"]["tasks"]["sat_math"]["samples"] == 3
    assert later["models"]["fused"]["tasks"]["gsm8k"] == results["models"]["fused"]["tasks"]["gsm8k"]
    assert later["models"]["fused"]["loss"] == results["models"]["fused"]["loss"]
    for name in ("plain", "fused"):
        model_results = results["models"][name]
        assert {domain: cell["samples"] for domain, cell in model_results["loss"].items()} == {
            "text": 2,
            "code": 2,
            "mixed": 2,
        }
        assert model_results["tasks"]["gsm8k"]["samples"] == model_results["tasks"]["sat_math"]["samples"] == 2
        assert 0 <= model_results["tasks"]["sat_math"]["value"] <= 1
        documents = [json.loads(line) for line in (tmp_path / "out" / name / "gsm8k.jsonl").read_text().splitlines()]
        assert [d["exact_match"] for d in documents] and all(d["answer"] for d in documents)
    assert sum(results["models"]["fused"]["gate_weights"]["text"].values()) == pytest.approx(1)
    table = (tmp_path / "out" / "table.md").read_text()
    assert table == markdown(later)
    assert table.count("\n| ") == 2


def test_the_specialist_with_all_the_weight_has_its_own_loss(fused, rows, tmp_path):
    """K = 1 is the plain model: the fused folder's specialist alone and the fused model differ, the same model does not."""
    options = EvalOptions(["loss"], data=[rows])
    plain = str(tmp_path / "text")
    results = evaluate_models([plain, plain], options, tmp_path / "out")
    first, second = results["models"].values()
    assert first["loss"] == second["loss"]
    assert list(results["models"]) == ["text", "text-2"]


def test_a_run_again_asks_nothing(checkpoint, rows, data_dir, tmp_path, monkeypatch):
    options = EvalOptions(["gsm8k", "sat_math"], task_options=TaskOptions(data_dir, max_new_tokens=3))
    model = str(checkpoint("plain"))
    first = evaluate_models([model], options, tmp_path / "out")

    def refuse(*args: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(FusionLM, "generate_until", refuse)
    monkeypatch.setattr(FusionLM, "loglikelihood", refuse)
    after = evaluate_models([model], options, tmp_path / "out")
    assert after["models"]["plain"]["tasks"] == first["models"]["plain"]["tasks"]


def test_another_model_in_the_same_place_is_refused(checkpoint, data_dir, tmp_path):
    options = EvalOptions(["sat_math"], task_options=TaskOptions(data_dir))
    model = checkpoint("plain", 0)
    evaluate_models([str(model)], options, tmp_path / "out")
    tiny("llama", 5, **VOCAB).save_pretrained(model)
    with pytest.raises(DataError, match="holds the answers of another model"):
        evaluate_models([str(model)], options, tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "problem"),
    [(["gsm9k"], "unknown task 'gsm9k'. Did you mean 'gsm8k'"), (["math"], "math500.jsonl")],
)
def test_unknown_tasks_and_missing_files_come_before_any_model(names, problem, data_dir, tmp_path):
    with pytest.raises(DataError, match=problem):
        evaluate_models(["/nowhere/at/all"], EvalOptions(names, task_options=TaskOptions(data_dir)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_without_the_domain_asked_for(rows, tmp_path):
    rows = [parse_row({"instruction": "a", "output": "b"}, "here", "text")]
    write_rows(rows, tmp_path / "text.jsonl")
    with pytest.raises(DataError, match="rows of text, none of which `mixed` measures. Request `loss`"):
        run.loss_rows(EvalOptions(["mixed"], data=[str(tmp_path / "text.jsonl")]))


def test_the_zoos_rows_are_the_default():
    domains = [row.domain for row in run.loss_rows(EvalOptions(["loss", "mixed"], limit=2))]
    assert domains == ["text", "text", "code", "code", "math", "math", "mixed", "mixed"]


# ---------------------------------------------------------------- MODEL


def test_base_and_adapter(checkpoint, tmp_path):
    base = checkpoint("base")
    adapter = save_adapter(tiny("llama", 0, **VOCAB), tmp_path / "lora")
    alone, adapted = load_model(str(base)), load_model(f"{base}+{adapter}")
    assert (alone.name, adapted.name) == ("base", "lora")
    assert alone.fingerprint != adapted.fingerprint
    assert adapted.model.groups[0].loras


def test_a_model_without_template_needs_one(checkpoint, tokenizer):
    folder = checkpoint("plain")
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer_config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(DataError, match="no chat template"):
        load_model(str(folder))
    loaded = load_model(str(folder), LoadOptions(chat_template="plain"))
    assert loaded.renderer.chat_templates[0].startswith("{{ bos_token")


def test_a_fused_model_has_templates_of_its_own(fused):
    with pytest.raises(RecipeError, match="Leave --chat-template out"):
        load_model(str(fused), LoadOptions(chat_template="plain"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("runs/demo/fused/", "fused"),
        ("org/name", "name"),
        ("org/base+me/adapter", "adapter"),
        ("openai:org/chat@http://localhost:1/v1", "chat"),
        ("package:module/model.gguf", "model.gguf"),
    ],
)
def test_short_names(text, name):
    assert name_of(text) == name


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError):
        load_model(str(tmp_path / "nothing"))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_model(str(tmp_path / "half"))


@pytest.mark.parametrize(
    ("names", "named"), [(["loss"], []), (["loss", "gsm8k"], ["loss"]), (["gsm8k", "sat_math"], ["sat_math"])]
)
def test_what_an_endpoint_cannot_tell_is_an_error_before_any_model(names, named, checkpoint, data_dir, tmp_path):
    models = [str(checkpoint("plain")), "openai:m@http://127.0.0.1:9/v1"]
    unseen = (named or names)[0]
    with pytest.raises(DataError, match=f"cannot score given text, which {unseen} needs. Give the model"):
        evaluate_models(models, EvalOptions(names, named, task_options=TaskOptions(data_dir)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_endpoint_leaves_out_what_a_suite_asks_too_much(checkpoint, rows, data_dir, tmp_path):
    pytest.importorskip("aiohttp")
    with fake_endpoint() as server:
        server.reply = lambda _: fine("#### 3")
        options = EvalOptions(
            ["loss", "gsm8k", "sat_math"], data=[rows], limit=3, task_options=TaskOptions(data_dir, max_new_tokens=4)
        )
        text = f"far=openai:m@{server.url}"
        results = evaluate_models([str(checkpoint("plain")), text], options, tmp_path / "out")["models"]
    assert set(results["plain"]["tasks"]) == {"gsm8k", "sat_math"} and set(results["plain"]["loss"]) == {"text", "code"}
    assert set(results["far"]["tasks"]) == {"gsm8k"} and "loss" not in results["far"]


def test_half_a_character_in_an_answer_is_no_end(data_dir, tmp_path):
    pytest.importorskip("aiohttp")
    with fake_endpoint() as server:
        server.reply = lambda _: fine("\ud83d 3")
        options = EvalOptions(["gsm8k"], limit=2, task_options=TaskOptions(data_dir))
        evaluate_models([f"openai:m@{server.url}"], options, tmp_path / "out")
    lines = (tmp_path / "out" / "m" / "gsm8k.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == [["\ufffd 3"]] * 2


def test_models_get_the_names_that_they_are_given(checkpoint, rows, tmp_path):
    model = str(checkpoint("fused"))
    options = EvalOptions(["loss"], data=[rows], limit=1)
    results = evaluate_models([model, f"mine={model}", model], options, tmp_path / "out")
    assert list(results["models"]) == ["fused", "mine", "fused-2"]
    with pytest.raises(DataError, match="two models are named 'mine'"):
        evaluate_models([f"mine={model}", f"mine={model}"], options, tmp_path / "out")


def test_a_folder_of_something_else_and_two_at_once_are_refused(checkpoint, rows, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    models, options, out = [str(checkpoint("plain"))], EvalOptions(["loss"], data=[rows], limit=1), tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text('{"systems": {}}')
    with pytest.raises(DataError, match="results.json: not the results of an evaluation. Choose another --output"):
        evaluate_models(models, options, out)
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another evaluation is running in this folder"):
            evaluate_models(models, options, out)


def test_an_endpoint_may_be_a_file(tmp_path):
    (tmp_path / "judge.yaml").write_text("{model: m, base_url: http://h/v1, max_tokens: 4096, temperature: null}")
    recipe = endpoint_recipe(str(tmp_path / "judge.yaml"))
    assert (recipe.model, recipe.max_tokens, recipe.temperature) == ("m", 4096, None)
    (tmp_path / "judge.yaml").write_text("{model: m, retry: 3}")
    with pytest.raises(RecipeError, match="judge.yaml: retry: unknown key. Did you mean 'retries'"):
        endpoint_recipe(f"openai:{tmp_path}/judge.yaml")
