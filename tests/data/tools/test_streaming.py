"""Streamed rows equal loaded rows, and the progress adds up."""

from __future__ import annotations

import json

import pytest

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows
from ultrafuser.data.tools.streaming import estimate_rows, stream_rows
from ultrafuser.data.writing import row_writer
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress


class Recorded(Progress):
    """Keeps the reports."""

    def __init__(self) -> None:
        self.total, self.steps, self.finished = -1, 0, False

    def start(self, label: str, total: int) -> None:
        self.total = total

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps += steps

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def sources(tmp_path):
    rows = [Row(str(n), "text", (("user", f"Q{n}"), ("assistant", f"A{n}"))) for n in range(1203)]
    paths = []
    for suffix in (".jsonl", ".csv", ".parquet"):
        with row_writer(tmp_path / f"rows{suffix}") as write:
            for row in rows:
                write(row)
        paths.append(str(tmp_path / f"rows{suffix}"))
    return paths


def test_all_rows_in_order_with_progress(sources):
    progress = Recorded()
    rows = list(stream_rows(sources, progress=progress))
    assert rows == [row for source in sources for row in load_rows(source)]
    assert progress.steps == len(rows) == 3609 and progress.finished
    assert progress.total == 3610  # the header of the CSV file is a line too
    assert {row.domain for row in stream_rows(sources[:1], domain="code")} == {"code"}


def test_stopping_early_ends_the_bar(sources):
    progress = Recorded()
    rows = stream_rows(sources, progress=progress)
    next(rows)
    rows.close()
    assert progress.finished


def test_mistakes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "response": "A", "domain": "text"}) + "\n{}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no known layout"):
        list(stream_rows([str(path)]))
    path.write_text("")
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows"):
        list(stream_rows([str(path)]))
    with pytest.raises(DataError, match="no such file"):
        list(stream_rows([str(tmp_path / "none.jsonl")]))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more")
    assert estimate_rows([str(tmp_path / "bad.parquet")]) == 0
