"""What the judged benchmarks share: reading their rows, getting the answers, and the form of a result."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultrafuser.errors import DataError
from ultrafuser.evaluate.judged.judge import STATUSES, Judgement


@dataclass(frozen=True)
class JudgedResult:
    """What a judged benchmark gives.

    Attributes:
        value: mean of `scores`; None when no sample could be scored.
        scores: score by the sample's id. Samples without a readable verdict are not in it.
        counts: judgements by status (`ok`, `unparsed`, `refused`, `error`), and samples without a score.
        details: the benchmark's own numbers.
        samples: one JSON-able record for each sample: question, answers, verdicts, the judge's words.
    """

    task: str
    metric: str
    value: float | None
    scores: dict[str, float]
    counts: dict[str, int]
    details: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self)


def count(judgements: Iterable[Judgement], unscored: int) -> dict[str, int]:
    """Judgements by status, and samples without a score."""
    found = Counter[str](judgement.status for judgement in judgements)
    return {status: found[status] for status in STATUSES} | {"unscored": unscored}


def mean(values: Iterable[float]) -> float | None:
    """Their mean; None where there are none."""
    own = list(values)
    return sum(own) / len(own) if own else None


def answer_chats(lm: Any, task: str, chats: Sequence[Sequence[Mapping[str, str]]], max_tokens: int) -> list[str]:
    """The model's greedy answer to each chat, through its own lm-eval interface."""
    from lm_eval.api.instance import Instance

    options = {"until": [], "do_sample": False, "max_gen_toks": max_tokens}
    requests = [
        Instance(
            "generate_until", {}, (lm.apply_chat_template([dict(m) for m in chat]), dict(options)), i, (task, i, 1)
        )
        for i, chat in enumerate(chats)
    ]
    return lm.generate_until(requests)


# ---------------------------------------------------------------- rows


def read_local(data_dir: str | Path, name: str) -> list[Any]:
    """The records of one JSON or JSONL file of the data folder.

    Raises:
        DataError: no such file, or not what its name says.
    """
    file = Path(data_dir) / name
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); expected {name} in the folder given by --data-dir, {data_dir}; "
            "leave --data-dir out to load it from the hub"
        ) from error
    try:
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not {file.suffix[1:].upper()}: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{file}: expected a JSON list of rows, got {type(records).__name__}")
    return records


def read_hub(path: str, split: str, **options: Any) -> list[dict[str, Any]]:
    """The records of a data set on the hub.

    Raises:
        DataError: it could not be loaded.
    """
    import datasets

    try:
        return [dict(record) for record in datasets.load_dataset(path, split=split, **options)]
    except (OSError, ValueError, RuntimeError) as error:  # not found, no such split, no network, a script
        what = options.get("data_files", path)
        raise DataError(
            f"{what}: could not be loaded from the hub ({error}); give a folder with the file by --data-dir"
        ) from error


def text_of(record: Any, key: str, where: str) -> str:
    """A field that must be text.

    Raises:
        DataError: it is missing, or no text.
    """
    value = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {type(value).__name__}, expected text")
    return value
