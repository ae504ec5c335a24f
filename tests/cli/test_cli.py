"""The command line: its help, its errors, and every command once on tiny models."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import ultrafuser
from tiny_models import save_adapter
from training_fixtures import GATE, NAMES, TinyRun
from ultrafuser.cli import main as cli

COMMANDS = get_command(cli.app).commands  # type: ignore[attr-defined]
NEEDS_MATPLOTLIB = not os.environ.get("CI") and "matplotlib is not installed (extra: report)"


def specialist_options(tiny_run: TinyRun, names: Sequence[str] = NAMES) -> list[str]:
    words = [f"--specialist={name}={tiny_run.folder / name}" for name in names]
    return [*words, "--template=code=plain", "-t", "math=inst"] if set(NAMES) <= set(names) else words


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(run, command):
    result = run(command, "--help")
    assert result.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.out)
    for parameter in COMMANDS[command].params:
        assert parameter.help, f"{command}: {parameter.name} has no help"
        for option in parameter.opts:
            if option.startswith("--"):
                assert option in text, f"{command}: {option}"


def test_the_overview_names_every_command(run):
    text = run("--help").out
    assert set(COMMANDS) == {
        "fuse", "train", "demo", "generate", "chat", "inspect", "info", "eval", "compare", "data", "synth",
        "serve", "playground", "push", "plan",
    }  # fmt: skip
    assert all(command in text for command in COMMANDS)


def test_every_command_prints_json_on_request():
    for name, command in COMMANDS.items():
        if name not in ("chat", "serve", "playground", "data", "synth"):  # groups have tests of their own
            assert any("--json" in parameter.opts for parameter in command.params), name


def test_version_of_the_module():
    process = subprocess.run(
        [sys.executable, "-m", "ultrafuser", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, f"ultrafuser {ultrafuser.__version__}\n", "")


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="session")
def files(tiny_run: TinyRun, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Good and bad files, by the names that the cases below use."""
    directory = tmp_path_factory.mktemp("bad")
    recipe = directory / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_run.fields(directory / "new" / "run", [GATE])))
    from_fused = directory / "from-fused.yaml"
    from_fused.write_text(f"fused: {folder}\n")
    unknown_key = directory / "unknown-key.yaml"
    unknown_key.write_text("specialists: [{name: a, model: b}]\nlearning_rate: 1\n")
    no_yaml = directory / "no.yaml"
    no_yaml.write_text("a: [1\n")
    empty, binary, rows = directory / "empty.txt", directory / "binary.txt", directory / "bad.jsonl"
    empty.write_text("\n \n")
    binary.write_bytes(b"hi \xff\xfe")
    rows.write_text('{"domain": "text", "messages": [{"role": "user", "content": "hi"}]}\n')
    return {
        "recipe": recipe, "from_fused": from_fused, "unknown_key": unknown_key, "no_yaml": no_yaml, "empty": empty, "binary": binary,
        "rows": rows, "folder": folder, "plain": tiny_run.folder / "text", "nowhere": directory / "nowhere", "directory": directory,
        "text": tiny_run.folder / "text", "good_rows": tiny_run.folder / "text.jsonl",
    }  # fmt: skip


BAD = {
    "unknown recipe key": ("train {unknown_key}", "learning_rate: unknown key"),
    "no yaml": ("train {no_yaml}", "line 2, column 1: not valid YAML"),
    "no recipe": ("train {nowhere}", "no such file, expected a YAML recipe"),
    "override without value": ("train {recipe} stages.gate.lr", "expected KEY=VALUE"),
    "override of an unknown key": ("train {recipe} stages.gate.rate=1", "rate: unknown key"),
    "override of a wrong type": ("train {recipe} stages.gate.steps=many", "expected whole number > 0"),
    "nothing to resume": ("train {recipe} --resume", "no run to resume there"),
    "an unknown tracker": ("train {recipe} report_to=[abacus]", "report_to: abacus: abacus is not supported"),
    "a device that is not there": ("train {recipe} device=warp", "device 'warp' cannot be used here"),
    "fuse without anything": ("fuse", "no specialists. List at least one"),
    "fuse both ways": ("fuse {recipe} --specialist a=b", "give a recipe or --specialist and --template options, not both"),
    "fuse with an idle template": ("fuse {recipe} --template text=plain", "not both"),
    "specialist without model": ("fuse --specialist text", "--specialist 'text': expected NAME=MODEL or NAME=BASE+ADAPTER"),
    "specialist with empty model": ("fuse --specialist text=", "expected NAME=MODEL or NAME=BASE+ADAPTER"),
    "specialist twice": ("fuse -s a={text} -s a={text}", "another specialist is named 'a'"),
    "template of nobody": ("fuse -s a={text} -t b=plain", "expected NAME=TEMPLATE with a NAME from --specialist"),
    "template without text": ("fuse -s a={text} -t a", "expected NAME=TEMPLATE"),
    "template unknown": ("fuse -s a={text} -t a=poem", "chat template 'poem' is neither built in"),
    "unknown mixing": ("fuse -s a={text} --mixing both", "expected logits or probabilities"),
    "specialist missing": ("fuse -s a={nowhere}", "its source {nowhere} is gone"),
    "specialist not on the hub": ("fuse -s a=nobody/nothing-at-all", "no model in nobody/nothing-at-all"),
    "specialist name": ("fuse -s 1/2={text}", "expected a letter followed by letters"),
    "fuse a fused folder": ("fuse {from_fused}", "`fuse` needs specialists"),
    "info on nothing": ("info {nowhere}", "no such folder"),
    "info on an ordinary model": ("info {plain}", "model_type is 'llama', expected 'ultrafuser'"),
    "generate from nothing": ("generate {nowhere} -p hi", "no such folder"),
    "generate from an ordinary model": ("generate {plain} -p hi", "expected 'ultrafuser'"),
    "generate from an unknown hub id": ("generate nobody/nothing-at-all -p hi", "the hub did not give it"),
    "prompt and file": ("generate {folder} -p hi --file {recipe}", "give --prompt or --file, not both"),
    "empty prompt": ("generate {folder} -p ''", "--prompt: holds no prompt"),
    "empty stdin": ("generate {folder}", "standard input: holds no prompt"),
    "empty file": ("generate {folder} --file {empty}", "empty.txt: holds no prompt"),
    "file that is no text": ("generate {folder} --file {binary}", "binary.txt: not UTF-8 at byte 3"),
    "file missing": ("generate {folder} --file {nowhere}", "no such file, expected a text file with one prompt per line"),
    "rows missing": ("generate {folder} --file {nowhere}.jsonl", "no such file"),
    "unknown dtype": ("generate {folder} -p hi --dtype int3", "--dtype 'int3': expected one of auto, float32"),
    "unknown device": ("generate {folder} -p hi --device warp", "device 'warp' cannot be used here"),
    "prompt too long": ("generate {folder} -p " + "fox" * 400, "do not fit into its context of 192"),
    "prompt that is not UTF-8": ("generate {folder} -p a\udcff", "prompt 'a\\udcff': not UTF-8, or half of a character"),
    "system that is not UTF-8": ("generate {folder} -p a --system b\udcff", "--system 'b\\udcff': not UTF-8"),
    "half a character to inspect": ("inspect {folder} -p a\ud83d", "prompt 'a\\ud83d': not UTF-8, or half of"),
    "response that is not UTF-8": ("inspect {folder} -p a --response b\udcff", "--response 'b\\udcff': not UTF-8"),
    "chat that is not UTF-8": ("chat {folder} --system b\udcff", "--system 'b\\udcff': not UTF-8"),
    "chat with nothing": ("chat {nowhere}", "no such folder"),
    "inspect nothing": ("inspect {folder}", "inspect needs either --prompt or --file"),
    "inspect both": ("inspect {folder} -p hi --file {good_rows}", "inspect needs either --prompt or --file"),
    "response of several": ("inspect {folder} -p a -p b --response c", "--response needs exactly one --prompt"),
    "response of a file": ("inspect {folder} --file {good_rows} --response c", "--response needs exactly one --prompt"),
    "empty response": ("inspect {folder} -p a --response ''", "there is no answer to inspect"),
    "bad rows": ("inspect {folder} --file {rows}", "bad.jsonl:1: roles must alternate"),
    "bad rows only": ("inspect {folder} --file {rows} --on-bad-row skip", "no rows, all 1 are bad"),
    "bad rows of generate": ("generate {folder} --file {rows}", "bad.jsonl:1: roles must alternate"),
    "bad rows of eval": ("eval {folder} --data {rows}", "bad.jsonl:1: roles must alternate"),
    "an unknown way with bad rows": ("generate {folder} --file {rows} --on-bad-row fix", "expected one of stop, skip"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_exit_code_2_and_one_clear_line(run, files, case):
    words, message = BAD[case]
    words = [word.format(**files).strip("'") for word in words.split(" ")]
    result = run(*words, stdin="")
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("ultrafuser: error: ") and result.err.count("\n") == 1, result.err
    assert message.format(**files) in result.err
    assert not (files["directory"] / "new").exists() and not Path("fused").exists()


def test_an_evaluation_that_is_refused_leaves_no_folder(run, files, tmp_path):
    for model, device in (files["folder"], "warp"), (files["nowhere"], "cpu"):
        words = ["eval", model, "--data", files["good_rows"], "--device", device, "--output", tmp_path / "new" / "eval"]
        assert run(*words).code == 2
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [["generate"], ["info", "x", "--wat"], ["generate", "x", "--batch-size", "0"], ["wat"]]
)
def test_unknown_words_give_exit_code_2(run, words):
    result = run(*words)
    assert result.code == 2 and result.out == "" and result.err


def test_a_traceback_is_shown_on_request(run, monkeypatch):
    monkeypatch.setenv("ULTRAFUSER_DEBUG", "1")
    with pytest.raises(ultrafuser.UltraFuserError):
        run("info", "/nowhere/at/all")


# ---------------------------------------------------------------- fuse and info


def test_fuse_from_options_then_info(run, tiny_run, tmp_path):
    output = tmp_path / "fused"
    made = run("fuse", *specialist_options(tiny_run), "-o", output, "--mixing", "logits", "--json")
    assert made.code == 0 and made.json()["mixing"] == "logits"
    assert {"README.md", "recipe.yaml", "config.json", "tokenizer.json"} <= {file.name for file in output.iterdir()}
    info = run("info", output, "--json", "--verify").json()
    assert info == made.json() | {"verified": True}
    assert [specialist["name"] for specialist in info["specialists"]] == list(NAMES)
    text = run("info", output, "--verify").out
    assert all(name in text for name in NAMES) and "all checksums match" in text
    copied = tmp_path / "copied"
    assert run("fuse", output / "recipe.yaml", "-o", copied, "--copy").code == 0
    assert (copied / "specialists" / "text" / "model.safetensors").is_file()
    assert "## Training" not in (copied / "README.md").read_text()


def test_fuse_from_a_recipe_with_overrides(run, tiny_run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_run.fields(tmp_path / "run")))
    result = run(
        "fuse", recipe, "gate.hidden_size=8", "specialists.text.domain=prose", "-o", tmp_path / "f", "--json"
    ).json()
    assert result["gate_hidden_size"] == 8 and result["specialists"][0]["domain"] == "prose"


def test_fuse_adapters_on_one_base(run, tiny_run, tmp_path):
    adapters = tiny_run.adapter_recipe(tmp_path, save_adapter)
    words = [f"--specialist={item['name']}={item['model']}+{item['adapter']}" for item in adapters]
    result = run("fuse", *words, "-o", tmp_path / "fused", "--json").json()
    assert result["specialists"][0]["shares_base_with"] == ["code", "math"]
    assert "shared base, loaded once: code, math, text\n" in run("info", tmp_path / "fused").out


def test_a_folder_with_a_plus_in_its_name_is_a_folder(run, tiny_run, tmp_path):
    (tmp_path / "c++").symlink_to(tiny_run.folder / "code")
    result = run("fuse", "-s", f"code={tmp_path / 'c++'}", "-o", tmp_path / "fused", "--json")
    assert result.code == 0, result.err


# ---------------------------------------------------------------- generate


def test_generate_gives_text_or_json(run, folder):
    options = ["--max-new-tokens", "6", "--device", "cpu"]
    single = run("generate", folder, "-p", "how many foxes?", *options)
    assert single.code == 0 and single.out.strip()
    both = run("generate", folder, "-p", "how many foxes?", "-p", "hi", "--json", *options).json()
    assert [item["prompt"] for item in both] == ["how many foxes?", "hi"]
    assert both[0]["answer"] == single.out.removesuffix("\n")
    text = run("generate", folder, "-p", "how many foxes?", "-p", "hi", *options).out
    assert text == "".join(f"> {item['prompt']}\n{item['answer']}\n\n" for item in both)


def test_generate_drafts_without_another_answer(run, folder):
    options = ["-p", "how many foxes?", "--max-new-tokens", "12", "--device", "cpu"]
    plain = run("generate", folder, *options)
    assert run("generate", folder, "--speculative", "auto", *options).out == plain.out
    refused = run("generate", folder, "--speculative", "fast", *options)
    assert refused.code == 2 and "--speculative" in refused.err and "auto, ngram" in refused.err


def test_generate_reads_files_and_standard_input_and_batches_change_nothing(run, folder, tiny_run, tmp_path):
    prompts = ["hi", "how many foxes are there?", "1 + 1"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    options = ["--max-new-tokens", "5", "--json"]
    from_file = run("generate", folder, "--file", file, *options).json()
    from_stdin = run("generate", folder, "--batch-size", "2", *options, stdin=file.read_text()).json()
    assert [item["prompt"] for item in from_file] == prompts
    assert from_file == from_stdin
    rows = run("generate", folder, "--file", tiny_run.folder / "math.jsonl", *options).json()
    assert [item["prompt"] for item in rows] == [f"how many math {i}?" for i in range(5)]


def test_generate_skips_bad_rows_on_request(run, folder, files, tiny_run, tmp_path):
    good = (tiny_run.folder / "math.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(files["rows"].read_text() + good)
    words = ["generate", folder, "--max-new-tokens", "2", "--json", "--file"]
    result = run(*words, tmp_path / "rows.jsonl", "--on-bad-row", "skip")
    assert result.json() == run(*words, tiny_run.folder / "math.jsonl").json()
    assert f"skipped 1 bad rows of 6, the first one {tmp_path}/rows.jsonl:1: roles must alternate" in " ".join(
        result.err.split()
    )


def test_standard_input_is_not_read_if_there_is_a_prompt(run, folder, monkeypatch):
    class Untouchable(io.StringIO):
        def read(self, *args: Any) -> str:
            raise AssertionError("standard input must not be read: it may never end")

        readline = read

    monkeypatch.setattr(sys, "stdin", Untouchable())
    assert run("generate", folder, "-p", "hi", "--max-new-tokens", "2").code == 0


def test_no_prompt_on_a_terminal_is_an_error(run, folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    result = run("generate", folder)
    assert result.code == 2 and "no prompt. Give --prompt TEXT, --file FILE, or text on standard input" in result.err


def test_sampling_is_seeded_and_beams_run(run, folder):
    words = ["generate", folder, "-p", "hi", "--max-new-tokens", "12", "--json"]
    hot = [run(*words, "--temperature", "2", "--seed", seed).out for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert run(*words, "--num-beams", "3").code == 0
    assert run(*words, "--system", "Be brief.").out != run(*words).out


def test_a_lower_precision_on_request(run, folder):
    assert run("generate", folder, "-p", "hi", "--max-new-tokens", "2", "--dtype", "bfloat16").code == 0


def test_standard_input_that_is_not_utf8_is_refused(run, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\xff\n"), "utf-8"))
    result = run("generate", folder)
    assert result.code == 2 and "prompt 'hi\\udcff': not UTF-8" in result.err and result.err.count("\n") == 1


# ---------------------------------------------------------------- inspect


def test_inspect_shows_text_weights_html_and_png(run, folder, tmp_path):
    pytest.importorskip("matplotlib") if NEEDS_MATPLOTLIB else None
    html, png = tmp_path / "new" / "page.html", tmp_path / "new" / "figure.png"
    words = ["inspect", folder, "-p", "how many foxes?", "--max-new-tokens", "6"]
    result = run(*words, "--weights", "--html", html, "--png", png)
    assert result.code == 0, result.err
    assert all(name in result.out for name in NAMES)
    assert "<html" in html.read_text() and "how many foxes?" in html.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert re.search(r"0?\.\d\d", result.out), "weights on request"


def test_inspect_weighs_a_given_response(run, folder):
    result = run("inspect", folder, "-p", "how many?", "--response", "12345 + 67890", "--json").json()
    [trace] = result["traces"]
    assert "".join(trace["tokens"]) == "12345 + 67890" and result["mean_weights"] == {}
    assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in trace["weights"])


def test_inspect_gives_means_by_domain_of_a_file(run, folder, tiny_run, tmp_path):
    pytest.importorskip("matplotlib") if NEEDS_MATPLOTLIB else None
    file, png, html = tiny_run.folder / "held-out.jsonl", tmp_path / "means.png", tmp_path / "rows.html"
    result = run("inspect", folder, "--file", file, "--json", "--png", png, "--html", html).json()
    assert set(result["mean_weights"]) == set(NAMES) and len(result["traces"]) == 6
    for domain, row in result["mean_weights"].items():
        weights = [w for trace in result["traces"] if trace["domain"] == domain for w in trace["weights"]]
        assert list(row.values()) == pytest.approx([sum(col) / len(weights) for col in zip(*weights, strict=True)])
    assert png.read_bytes().startswith(b"\x89PNG") and html.read_text().count("<section") >= 1
    text = run("inspect", folder, "--file", file).out
    assert "mean gate weight by domain" in text and "math" in text
    limited = run("inspect", folder, "--file", file, "--domain", "mixed", "--limit", "2", "--json").json()
    assert list(limited["mean_weights"]) == ["mixed"] and len(limited["traces"]) == 2


# ---------------------------------------------------------------- train


def test_a_sweep_prints_the_lowest_loss_first(run, folder, tiny_run, tmp_path):
    data = {"validation": [str(tiny_run.folder / "held-out.jsonl")]}
    fields = tiny_run.fields(tmp_path / "runs", [GATE | {"calibrate": False}], fused=str(folder), data=data)
    fields.pop("specialists")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    words = ["train", recipe, "--sweep", "stages.gate.lr=1e-6,1e-2", "--sweep", "seed=0,1"]
    made = run(*words)
    assert made.code == 0, made.err
    loss = {
        (run["overrides"][0][-4:], run["overrides"][1]): run["loss"]["mean"]
        for run in json.loads((tmp_path / "runs" / "sweep.json").read_text())
    }
    best = min(loss, key=loss.__getitem__)
    assert best[0] == "1e-2"
    lines = [
        line for line in made.out.splitlines() if line.strip().startswith("stages.gate.lr=") and "over" not in line
    ]
    assert [line.split()[1] for line in lines if line.split()[0].endswith("1e-2")] == [
        seed for lr, seed in sorted(loss, key=loss.__getitem__) if lr == "1e-2"
    ]
    assert lines[0].split()[-1] == f"{loss[best]:.4f}"
    assert made.out.count("over 2 seeds") == 2
    assert f"next: ultrafuser chat {tmp_path / 'runs'}/stages.gate.lr=1e-2,{best[1]}/fused" in made.out
    assert run(*words).code == 2
    again = run(*words, "--resume", "--json")
    assert [each["loss"]["mean"] for each in again.json()] == list(loss.values())


def test_train_starts_from_a_fused_folder_and_the_result_generates(run, folder, tiny_run, tmp_path):
    fields = tiny_run.fields(tmp_path / "unused", [GATE], fused=str(folder))
    fields.pop("specialists")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    output = tmp_path / "run"
    made = run("train", recipe, f"output={output}", "stages.gate.steps=2", "--json")
    assert made.code == 0, made.err
    result = made.json()
    assert result["folder"] == str(output / "fused") and result["last_metrics"]["gate"]["step"] == 2
    assert "stage gate: done" in made.err
    repeated = run("train", recipe, f"output={output}", "stages.gate.steps=2")
    assert repeated.code == 2 and "holds a run already. Continue it with --resume" in repeated.err
    resumed = run("train", recipe, f"output={output}", "stages.gate.steps=2", "--resume")
    assert resumed.code == 0 and "finished before" in resumed.err
    assert f"next: ultrafuser chat {output / 'fused'}" in resumed.out
    assert run("generate", output / "fused", "-p", "hi", "--max-new-tokens", "2").code == 0
    assert run("info", output / "fused", "--json").json()["has_recipe"]
