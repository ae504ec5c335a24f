"""A whole tiny tiny_run on disk: three specialists with one tokenizer, rows of three domains, recipes and runs of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tiny_models import tiny
from ultrafuser.progress import Progress
from ultrafuser.recipe import Recipe, load_recipe
from ultrafuser.train.metrics import read_metrics
from ultrafuser.train.run import train

NAMES = ("text", "code", "math")
TEMPLATES = {"text": None, "code": "plain", "math": "inst"}  # None: the tokenizer's own, ChatML
ANSWERS = {"text": "The lazy dog jumps", "code": "def add(a, b): return a", "math": "12345 + 67890 = 80235"}
GATE = {"name": "gate", "steps": 4, "samples_per_domain": 2, "lr": 0.01}
JOINT = {"name": "joint", "steps": 3, "samples_per_domain": 2, "lr": 0.005, "lora": {"r": 2, "alpha": 4}}
TIMES = ("tokens_per_s",)  # keys of a row of metrics that differ from run to run


class TinyRun:
    """Folders of specialists and files of rows, and recipes that name them."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        for seed, name in enumerate(NAMES):
            self.specialist(name, seed=seed)
            self.rows(name, 5)
        self.rows("held-out", 2, domains=NAMES)

    def specialist(self, name: str, kind: str = "llama", seed: int = 0, **changes: Any) -> Path:
        """A tiny model with its tokenizer."""
        folder = self.folder / name
        fields = {"vocab_size": len(self.tokenizer), "max_position_embeddings": 192, "tie_word_embeddings": False}
        tiny(kind, seed, **(fields | changes)).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def rows(self, name: str, count: int, domains: Sequence[str] = (), answer: str | None = None) -> Path:
        """Rows of unequal lengths, `count` of each domain (default: the domain `name`)."""
        file = self.folder / f"{name}.jsonl"
        lines = [
            {
                "id": f"{name}-{domain}-{i}",
                "domain": domain,
                "messages": [
                    {"role": "user", "content": f"how many {domain} {i}?"},
                    {"role": "assistant", "content": answer or " ".join([ANSWERS.get(domain, "ok")] * (1 + i % 3))},
                ],
            }
            for domain in domains or (name,)
            for i in range(count)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return file

    def fields(self, output: Path | str, stages: Sequence[Mapping[str, Any]] = (GATE,), **changes: Any) -> dict:
        """A recipe as a mapping; `changes` replace its fields, and those of `data` one by one."""
        data = {"train": [str(self.folder / f"{name}.jsonl") for name in NAMES], "max_length": 128}
        fields = {
            "specialists": [
                {"name": name, "model": str(self.folder / name)}
                | ({"chat_template": TEMPLATES[name]} if TEMPLATES[name] else {})
                for name in NAMES
            ],
            "gate": {"hidden_size": 16},
            "stages": [dict(stage) for stage in stages],
            "output": str(output),
            "device": "cpu",
        }
        return fields | changes | {"data": data | changes.get("data", {})}

    def recipe(self, output: Path | str, stages: Sequence[Mapping[str, Any]] = (GATE,), **changes: Any) -> Recipe:
        return load_recipe(self.fields(output, stages, **changes))

    def train(
        self,
        output: Path,
        stages: Sequence[Mapping[str, Any]] = (GATE,),
        *,
        resume: bool = False,
        progress: Progress | None = None,
        **changes: Any,
    ) -> Path:
        """Run a recipe and return its output folder."""
        train(self.recipe(output, stages, **changes), resume=resume, progress=progress)
        return output

    def adapter_recipe(self, tmp_path: Path, save_adapter: Callable[..., Path]) -> list[dict[str, Any]]:
        """Specialists for a recipe: three adapters on the base `text`."""
        base = tiny(seed=0, vocab_size=len(self.tokenizer), max_position_embeddings=192, tie_word_embeddings=False)
        return [
            {"name": name, "model": str(self.folder / "text"),
             "adapter": str(save_adapter(base, tmp_path / f"{name}-lora", seed=seed)), "chat_template": "chatml"}
            for seed, name in enumerate(NAMES)
        ]  # fmt: skip


def metrics(output: Path, without: Sequence[str] = TIMES) -> list[dict[str, Any]]:
    """The rows of metrics of a run, without the keys that differ from run to run."""
    return [
        {key: value for key, value in row.items() if key not in without}
        for row in read_metrics(output / "metrics.jsonl")
    ]


def losses(output: Path) -> list[tuple[str, int, dict[str, float]]]:
    """(stage, step, every loss and divergence) of each row of metrics."""
    return [
        (row["stage"], row["step"], {key: value for key, value in row.items() if "loss" in key or key == "kl"})
        for row in metrics(output)
    ]


def trained_weights(output: Path) -> dict[str, Any]:
    """What each finished stage gave, by stage and name."""
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(output.glob("*/finished.safetensors"))
        for name, tensor in load_file(file).items()
    }


class Interruption(Exception):
    """What stops a run in these tests."""


class StopAt(Progress):
    """Stops a run right after an optimizer step, before it is logged and saved."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step, self.label, self.steps_done = f"stage {stage}", step, "", 0

    def start(self, label: str, total: int) -> None:
        self.label, self.steps_done = label, 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps_done += steps
        if self.label == self.stage and self.steps_done >= self.step:
            raise Interruption(f"{self.label}: {self.steps_done}")


class RecordingProgress(Progress):
    """Record the log lines and the started tasks."""

    def __init__(self) -> None:
        self.news: list[str] = []
        self.started: list[tuple[str, int]] = []

    def start(self, label: str, total: int) -> None:
        self.started.append((label, total))

    def log(self, text: str) -> None:
        self.news.append(text)


_WORKSHOPS: list[TinyRun] = []


def shared_tiny_run(folder: Callable[[], Path], tokenizer: PreTrainedTokenizerFast) -> TinyRun:
    """One tiny_run for all the tests of a process, which must not change its folders."""
    if not _WORKSHOPS:
        _WORKSHOPS.append(TinyRun(folder(), tokenizer))
    return _WORKSHOPS[0]
