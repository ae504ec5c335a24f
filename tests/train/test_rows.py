"""The rows of a run: what is not used is said, and bad rows stop the run or are listed in its folder."""

from __future__ import annotations

import json

import pytest

from training_fixtures import NAMES, RecordingProgress
from ultrafuser.data.chat_format import BUILTIN
from ultrafuser.data.packed import pack, write_packed
from ultrafuser.data.sources import RowReader
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import DataError
from ultrafuser.recipe import SourceRecipe
from ultrafuser.train import rows as module
from ultrafuser.train.rows import read_sources, share_rows


@pytest.fixture
def folder(tiny_run, tmp_path):
    """Good rows with a column that is not used, a bad row, and a file that is no rows."""
    lines = (tiny_run.folder / "text.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"score": 3})
    lines.insert(2, r'{"domain": "text", "prompt": "what \ud83d ?", "response": "x"}')
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "rows" / "README.md").touch()
    return tmp_path / "rows"


def test_a_bad_row_stops_the_run_before_it_starts(tiny_run, folder, tmp_path):
    with pytest.raises(DataError, match=r"text\.jsonl:3: message 0: holds a lone surrogate.*on_bad_row=skip"):
        tiny_run.train(tmp_path / "run", data={"train": [str(folder)]})
    assert not (tmp_path / "run" / "recipe.yaml").exists() and not list((tmp_path / "run").glob("rows-*"))


def test_skipped_rows_are_listed_in_the_folder_of_the_run(tiny_run, folder, tmp_path):
    progress = RecordingProgress()
    sources = [str(folder), *(str(tiny_run.folder / f"{name}.jsonl") for name in NAMES if name != "text")]
    tiny_run.train(tmp_path / "run", progress=progress, data={"train": sources, "on_bad_row": "skip"})
    [line] = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "where": f"{folder}/text.jsonl:3",
        "problem": "message 0: holds a lone surrogate, half of a character",
    }
    notes = "\n".join(progress.news)
    assert "training rows: columns that are not used: 'score' (1 rows)" in notes
    assert f"training rows: files that are not read: {folder}/README.md" in notes
    assert f"training rows: skipped 1 bad rows of 16, the first one {folder}/text.jsonl:3" in notes


def test_notes_are_about_the_sources_of_their_purpose(folder, tokenizer):
    renderer, progress = Renderer(tokenizer, [BUILTIN["plain"]]), RecordingProgress()
    reader = RowReader("skip")
    for purpose in ("training", "validation"):
        assert len(read_sources([SourceRecipe(path=str(folder))], renderer, progress, purpose, reader)) == 5
    skipped = [line for line in progress.news if "skipped" in line]
    assert [line.split(",")[0] for line in skipped] == [
        "training rows: skipped 1 bad rows of 6",
        "validation rows: skipped 1 bad rows of 6",
    ]
    assert len(reader.bad_rows) == 2


# ---------------------------------------------------------------- rows of several processes


@pytest.mark.parametrize("main, local, sees, expected", [
    (True, True, True, 1),  # one process, or the first of all
    (False, False, True, 0), (False, True, True, 0),  # they map what the first has written
    (False, True, False, 1),  # the first process of a machine that does not see these files
])  # fmt: skip
def test_one_process_of_all_that_see_the_folder_reads(tmp_path, monkeypatch, main, local, sees, expected):
    folder, calls = tmp_path / "rows", []

    def read():
        calls.append(1)
        return write_packed([pack([Rendered("new", "text", ((1, 2),), ((0,),), (2,))], 1)], folder)

    class State:
        is_main_process, is_local_main_process, waits = main, local, 0

        def wait_for_everyone(self):
            self.waits += 1
            if self.waits == 2 and sees and not main:  # the first of all has written by now
                write_packed([pack([Rendered("new", "text", ((1, 2),), ((0,),), (2,))], 1)], folder)

    if local:  # what an earlier run left
        write_packed([pack([Rendered("old", "text", ((1, 2),), ((0,),), (2,))], 1)], folder)
    state = State()
    monkeypatch.setattr(module, "PartialState", lambda: state)
    rows = share_rows(read, folder)
    assert [row.row_id for row in rows] == ["new"] and len(calls) == expected and state.waits == 3
