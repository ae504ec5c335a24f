"""metrics.jsonl: one row for each logged step and each validation of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ultrafuser.data.writing import atomic_file

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. An empty list if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row. The file and its folder are created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def truncate_metrics(path: Path, step: int, stage: str | None = None) -> None:
    """Drop the rows after a step, of one stage or of all, because these steps will be trained again."""
    if PartialState().is_main_process and path.is_file():
        rows = [row for row in read_metrics(path) if stage not in (None, row["stage"]) or row["step"] <= step]
        with atomic_file(path, force=True) as draft:
            draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
