"""metrics.jsonl: one row for each logged step and each validation of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ultrafuser.data.files import disk_errors, write_text
from ultrafuser.errors import TrainingError

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. An empty list if there is no file. A last line that is torn is left out.

    Raises:
        TrainingError: another line is not a row.
    """
    if not path.is_file():
        return []
    rows = []
    lines = path.read_bytes().rstrip().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            row = None
        if isinstance(row, dict) and {"stage", "step"} <= row.keys():
            rows.append(row)
        elif number < len(lines):  # a process that dies, or a disk that is full, tears the last line alone
            raise TrainingError(
                f"{path}:{number}: not a row of metrics, expected a JSON object with stage and step. Correct or delete the "
                "line, then continue with --resume"
            )
    return rows


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row. The file and its folder are created if needed.

    Raises:
        DiskError: the disk is full, or not writable.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def truncate_metrics(path: Path, step: int | None = None, stage: str | None = None) -> None:
    """Drop a torn last line, and the rows after a step, of one stage or of all, because these steps are trained again."""
    if PartialState().is_main_process and path.is_file():
        rows = [
            row
            for row in read_metrics(path)
            if step is None or stage not in (None, row["stage"]) or row["step"] <= step
        ]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
