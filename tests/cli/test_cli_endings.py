"""Every command finds an unwritable output before its work, and says in one line how to go on after an interrupt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.main import get_command

from command_results import Result
from disks import UNWRITABLE, file_limit, small_disk, unwritable
from fake_writer import tiny as tiny_synthesis
from tiny_models import shake_gate
from training_fixtures import GATE, JOINT, NAMES, TinyRun
from ultrafuser.cli import main as cli
from ultrafuser.specialists import fuse
from ultrafuser.synth.recipe import dump_synth_recipe

OUTPUTS = {"--output", "--html", "--png", "--report"}


@pytest.fixture(scope="module")
def fused(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = fuse(tiny_run.recipe("unused"))
    folder = tmp_path_factory.mktemp("endings") / "fused"
    shake_gate(model, scale=3.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_yaml(file: Path, fields: Any) -> Path:
    file.write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields))
    return file


class Case(NamedTuple):
    """A command that would fail at its first work, because its input is missing, and one output of it.

    Attributes:
        words: with `OUT` for the output.
        suffix: of the output.
    """

    words: Callable[[TinyRun, Path], list[Any]]
    suffix: str = ""
    folder: bool = False


OUT = "OUT"
MISSING = "/nowhere/model"


def train_words(tiny_run: TinyRun, tmp_path: Path) -> list[Any]:
    fields = tiny_run.fields("unused", specialists=[{"name": name, "model": MISSING} for name in ("a", "b")])
    return ["train", write_yaml(tmp_path / "train.yaml", fields), f"output={OUT}"]


def compare_words(tiny_run: TinyRun, tmp_path: Path) -> list[Any]:
    train = train_words(tiny_run, tmp_path)[1]
    fields = {"recipe": str(train), "test": [str(tiny_run.folder / "held-out.jsonl")], "systems": [{"kind": "base"}]}
    return ["compare", write_yaml(tmp_path / "compare.yaml", fields), f"output={OUT}"]


def synth_words(tiny_run: TinyRun, tmp_path: Path) -> list[Any]:
    return ["synth", write_yaml(tmp_path / "synth.yaml", dump_synth_recipe(tiny_synthesis())), f"output={OUT}"]


def join_words(tiny_run: TinyRun, tmp_path: Path) -> list[Any]:
    (tmp_path / "calls.sqlite").write_text("no store")
    return ["synth", "join", *synth_words(tiny_run, tmp_path)[1:], tmp_path / "calls.sqlite"]


def data_words(*words: str) -> Callable[[TinyRun, Path], list[Any]]:
    return lambda tiny_run, tmp_path: ["data", words[0], "/nowhere/rows.jsonl", *words[1:]]


CASES = {
    ("fuse", "--output"): Case(lambda w, t: ["fuse", "-s", f"a={MISSING}", "-s", f"b={MISSING}", "-o", OUT], folder=True),
    ("train", "output="): Case(train_words, folder=True),
    ("demo", "--output"): Case(lambda w, t: ["demo", "-o", OUT, "--device", "nowhere"], folder=True),
    ("eval", "--output"): Case(
        lambda w, t: ["eval", MISSING, "--tasks", "loss", "--data", w.folder / "text.jsonl", "-o", OUT], folder=True
    ),
    ("compare", "output="): Case(compare_words, folder=True),
    ("inspect", "--html"): Case(lambda w, t: ["inspect", MISSING, "-p", "hi", "--html", OUT], ".html"),
    ("inspect", "--png"): Case(lambda w, t: ["inspect", MISSING, "-p", "hi", "--png", OUT], ".png"),
    ("synth run", "output="): Case(synth_words, folder=True),
    ("synth join", "output="): Case(join_words, folder=True),
    ("data map", "--output"): Case(data_words("map", "-m", MISSING, "--force", "-o", OUT), ".html"),
    ("data map", "--png"): Case(data_words("map", "-m", MISSING, "--force", "-o", "/tmp/unused.html", "--png", OUT), ".png"),
    ("data decontaminate", "--output"): Case(data_words("decontaminate", "-a", "x", "--force", "-o", OUT), ".csv"),
    ("data decontaminate", "--report"): Case(data_words("decontaminate", "-a", "x", "--force", "--report", OUT), ".json"),
    ("data dedup", "--output"): Case(data_words("dedup", "--force", "-o", OUT), ".parquet"),
    ("data dedup", "--report"): Case(data_words("dedup", "--force", "--report", OUT), ".json"),
    ("data split", "--output"): Case(data_words("split", "--force", "-o", OUT), folder=True),
    ("data convert", "--output"): Case(data_words("convert", "--force", "-o", OUT), ".jsonl"),
    ("data exam", "--output"): Case(lambda w, t: ["data", "exam", "math", "--force", "-o", OUT], ".jsonl"),
}  # fmt: skip


def outputs_of(group: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from outputs_of(command, f"{name} ")
        yield from ((f"{prefix}{name}", option) for param in command.params for option in OUTPUTS & set(param.opts))


def test_every_output_has_a_case():
    written = {case for case in CASES if case[1].startswith("--")}
    assert set(outputs_of(get_command(cli.app))) == written


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_an_unwritable_output_is_found_before_the_work(case, kind, run, tiny_run, tmp_path):
    words, suffix, folder = CASES[case]
    with unwritable(kind, tmp_path, suffix=suffix, folder=folder) as (target, _):
        result = run(*(str(word).replace(OUT, str(target)) for word in words(tiny_run, tmp_path)))
    assert result.code == 2, result.err
    [line] = [line for line in result.err.splitlines() if line.startswith("ultrafuser: error: ")]
    assert str(target) in line and "/nowhere" not in line.replace(str(target), ""), line
    assert not line.endswith("."), line


# ---------------------------------------------------------------- interrupts

INTERRUPTED = {
    "fuse": "Nothing was changed. Run the same command again",
    "train": "Run the same command again",
    "plan": "Run the same command again",
    "demo": "Run the same command again, which starts the demo from its beginning",
    "generate": "Answers are printed at the end. Run the same command again",
    "chat": "The chat is not stored. Run the same command again for a new one",
    "inspect": "Nothing was written. Run the same command again",
    "info": "Run the same command again",
    "push": "Nothing was committed. Run the same command again",
    "serve": "The server had not started",
    "playground": "The playground had not started",
    "eval": "Run the same command again, which requests only the missing answers",
    "compare": "Run the same command again, which skips finished systems and resumes the others",
    "data stats": "Run the same command again",
    "data map": "Nothing was written. Run the same command again",
    "data decontaminate": "Nothing was written. Run the same command again",
    "data dedup": "Nothing was written. Run the same command again",
    "data split": "Nothing was written. Run the same command again",
    "data convert": "Nothing was written. Run the same command again",
    "data exam": "Nothing was written. Run the same command again",
    "data validate": "Run the same command again",
    "synth run": "Run the same command again: stored responses are kept, and no request is repeated",
    "synth status": "Run the same command again",
    "synth join": "Run the same command again, which writes the whole data set",
    "synth review": "Decisions are stored. Run the same command again to go on",
}  # fmt: skip


def commands_of(group: Any, prefix: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{name} ")
        else:
            yield f"{prefix}{name}"


def test_every_command_says_how_to_go_on():
    assert set(commands_of(get_command(cli.app))) == set(INTERRUPTED)


def interrupted_words(command: str, tiny_run: TinyRun, fused: Path, tmp_path: Path) -> list[Any]:
    rows = tiny_run.folder / "text.jsonl"
    if command == "data exam":
        return ["data", "exam", "math", "-o", tmp_path / "exam.jsonl"]
    if command.startswith("data "):
        options = {
            "map": ["-m", tiny_run.folder / "text", "-o", tmp_path / "map.html"],
            "decontaminate": ["-a", rows],
            "split": ["-o", tmp_path / "split"],
            "convert": ["-o", tmp_path / "rows.csv"],
        }
        return [*command.split(), rows, *options.get(command.split()[1], [])]
    if command.startswith("synth "):
        words = synth_words(tiny_run, tmp_path)
        return [*command.split(), *(str(word).replace(OUT, str(tmp_path / "synth")) for word in words[1:])]
    return {
        "fuse": ["fuse", "-s", f"a={tiny_run.folder / 'text'}", "-s", f"b={tiny_run.folder / 'code'}", "-o", tmp_path / "f"],
        "train": ["train", write_yaml(tmp_path / "train.yaml", tiny_run.fields(tmp_path / "run"))],
        "plan": ["plan", write_yaml(tmp_path / "plan.yaml", tiny_run.fields(tmp_path / "run"))],
        "demo": ["demo", "-o", tmp_path / "demo"],
        "generate": ["generate", fused, "-p", "hi"],
        "chat": ["chat", fused],
        "inspect": ["inspect", fused, "-p", "hi", "--html", tmp_path / "a.html"],
        "info": ["info", fused],
        "push": ["push", fused, "acme/fused"],
        "serve": ["serve", fused, "--engine", "embedded", "--port", "0"],
        "playground": ["playground", fused, "--port", "0", "--no-browser"],
        "eval": ["eval", fused, "--tasks", "loss", "--data", rows, "-o", tmp_path / "eval"],
        "compare": [str(word).replace(OUT, str(tmp_path / "c")) for word in compare_words(tiny_run, tmp_path)],
    }[command]  # fmt: skip


# Where the work of each command begins.
WORK = {
    "ultrafuser.specialists.fuse": ("fuse",),
    "ultrafuser.train.run.fuse": ("train",),
    "ultrafuser.train.plan.outline": ("plan",),
    "ultrafuser.demo.fuse": ("demo",),
    "ultrafuser.specialists.load": ("generate", "chat", "inspect", "serve", "playground"),
    "ultrafuser.info.describe": ("info",),
    "ultrafuser.publish.prepare": ("push",),
    "ultrafuser.evaluate.run.load_model": ("eval",),
    "ultrafuser.compare.system.start": ("compare",),
    "ultrafuser.data.tools.validate.validate": ("data validate",),
    "ultrafuser.data.sources.scan_file": ("data stats", "data map", "data decontaminate", "data dedup", "data split", "data convert"),
    "ultrafuser.zoo.exams.rows.exam_rows": ("data exam",),
    "ultrafuser.synth.pipeline.check": ("synth run", "synth join"),
    "ultrafuser.synth.status.calls": ("synth status",),
    "ultrafuser.synth.review.session.ReviewSession.open": ("synth review",),
}  # fmt: skip


@pytest.mark.parametrize("command", INTERRUPTED)
def test_an_interrupt_ends_with_the_line_that_says_how_to_go_on(command, run, tiny_run, fused, tmp_path, monkeypatch):
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    [work] = [name for name, commands in WORK.items() if command in commands]
    if command == "synth review":
        pytest.importorskip("gradio")
    monkeypatch.setattr(work, interrupt)
    result = run(*interrupted_words(command, tiny_run, fused, tmp_path))
    assert result.code == 130, result.err
    assert result.err.endswith(f"\nultrafuser: interrupted. {INTERRUPTED[command]}\n")
    assert not [file for file in tmp_path.rglob("*") if file.suffix == ".tmp"]


def test_an_interrupted_training_resumes(run, tiny_run, tmp_path):
    """A real interrupt from the keyboard, which goes to the whole group of processes."""
    recipe = write_yaml(
        tmp_path / "train.yaml", tiny_run.fields(tmp_path / "run", [GATE | {"steps": 5000}], save_every=1)
    )
    command = [sys.executable, "-m", "ultrafuser", "train", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        until = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1] == "ultrafuser: interrupted. Continue with the same command and --resume"
    assert run("train", recipe).code == 2, "there is something to resume"


# ---------------------------------------------------------------- full disks


def one_line(result: Result) -> str:
    assert result.code == 2 and "Traceback" not in result.err, result.err
    return result.err.splitlines()[-1].removeprefix("ultrafuser: error: ")


@pytest.mark.parametrize("size", [4_200, 9_000, 15_000, 25_000, 40_000])
def test_a_disk_that_fills_in_training_is_one_line(size, run, tiny_run, tmp_path):
    """From the first file to the last: rows, metrics, features, checkpoints, weights, the fused folder."""
    fields = tiny_run.fields(tmp_path / "run", [GATE, JOINT], save_every=2, cache_features=True)
    recipe = write_yaml(tmp_path / "train.yaml", fields)
    with file_limit(size):
        result = run("train", recipe)
    line = one_line(result)
    assert str(tmp_path / "run") in line
    assert line.endswith(
        ("Free space or make it writable. Continue with the same command and --resume",
         "Free space or make it writable. Run the same command again",  # nothing was trained yet
         "Remove the cause, and --resume writes them without training",
         "Free space, choose another output, or set cache_features: false, and kl_coef: 0, in a training recipe")
    ), line  # fmt: skip
    resumed = run("train", recipe, *([] if line.endswith("Run the same command again") else ["--resume"]))
    assert resumed.code == 0, resumed.err


def test_a_disk_that_fills_in_eval_is_one_line(run, fused, tiny_run, tmp_path):
    words = ["eval", fused, "--tasks", "loss", "--data", tiny_run.folder / "held-out.jsonl", "-o", tmp_path / "eval"]
    with file_limit(5_000):
        line = one_line(run(*words))
    assert "eval/fused/features" in line and line.endswith("and kl_coef: 0, in a training recipe")
    with small_disk(tmp_path / "disk", size_kb=40) as disk:
        line = one_line(run(*words[:-1], disk / "eval"))
    assert "the disk is full" in line
    assert run(*words).code == 0


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_disk_that_fills_in_inspect_is_one_line(option, run, fused, tmp_path):
    target = tmp_path / f"out{option.replace('--', '.')}"
    target.write_text("old")
    with file_limit(3_000):
        line = one_line(run("inspect", fused, "-p", "hi", "--max-new-tokens", "3", option, target))
    assert line == (
        f"{target}: could not be written: the file is larger than the limit of this process or disk. Nothing was changed. "
        "Free space or choose another output"
    )
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    line = one_line(run("inspect", fused, "-p", "hi", "--max-new-tokens", "3", option, "/dev/full"))
    assert line.startswith("/dev/full: could not be written: the disk is full")
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("size", [1_000, 4_000, 8_000, 20_000])
def test_a_disk_that_fills_in_fuse_is_one_line(size, run, tiny_run, tmp_path):
    words = [f"--specialist={name}={tiny_run.folder / name}" for name in NAMES]
    with file_limit(size):
        result = run("fuse", *words, "-t", "code=plain", "-t", "math=inst", "--copy", "-o", tmp_path / "fused")
    assert one_line(result).startswith(f"{tmp_path / 'fused'}: could not be written: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("size", [200, 3_000])
def test_a_disk_that_fills_in_split_leaves_nothing(size, kind, run, tmp_path):
    """Also when the first parts fit and a later one does not."""
    rows = [
        {"domain": "text", "prompt": f"question {i} " + f"{i * 7919:x} " * 20, "response": f"{i * 104729:x} " * 20}
        for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "split", tmp_path / "rows.jsonl", "--exact-only", "--kind", kind, "-o", tmp_path / "parts"]
    parts = ["-p", "test=0.05", "-p", "validation=0.05", "-p", "train=0.9"]
    with file_limit(size):
        line = one_line(run(*words, *parts))
    assert "parts" in line and "Nothing was changed. Free space or choose another output" in line
    assert [*tmp_path.rglob("*")] == [tmp_path / "rows.jsonl"]
    assert run(*words, *parts).code == 0


@pytest.mark.parametrize("command", [["--version"], ["data", "stats", "ROWS", "--json"]])
def test_a_full_standard_output_is_one_line(command, tiny_run):
    words = [str(tiny_run.folder / "text.jsonl") if word == "ROWS" else word for word in command]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "ultrafuser", *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    last = result.stderr.splitlines()[-1]
    assert (
        last
        == "ultrafuser: error: standard output or another file could not be written: the disk is full. Free space, then run again"
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_a_file_that_may_not_be_read_is_one_line(run, tmp_path):
    if os.geteuid():
        file = tmp_path / "rows.jsonl"
        file.touch(mode=0)
    else:  # root may read every file
        file = tmp_path / ("x" * 300)
    assert str(file) in one_line(run("data", "stats", file))
