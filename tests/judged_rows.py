"""Small local files of AlpacaEval and MT-Bench, and a judge that reads its opinions off the requests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fake_endpoint import Step, fine

REFERENCE = "the reference answer"
# what the judge makes of each: `first` is whichever is shown first, `mumble` no verdict
ALPACA = ("win 0", "win 1", "lose 2", "tie 3", "first 4", "mumble 5")
ALPACA_SCORES = {"0": 1.0, "1": 1.0, "2": 0.0, "3": 0.5, "4": 0.5}  # mean 0.6
# two requests that end in their ratings
TALKS = (("writing", "rate it 9", "mumble"), ("math", "rate it 5", "rate it 3"))
MT_BENCH_SCORES = {"81": 9.0, "82": 4.0}  # mean 6.5; over the rated turns it would be 5.67


def write_judged_files(folder: Path, alpaca: Iterable[str] = ALPACA) -> str:
    """The files of both benchmarks in a folder, which is given back as `data_dir` wants it."""
    folder.mkdir(exist_ok=True)
    rows = [{"dataset": "own", "instruction": request, "output": REFERENCE} for request in alpaca]
    (folder / "alpaca_eval.json").write_text(json.dumps(rows))
    talks = [{"question_id": 81 + i, "category": kind, "turns": turns} for i, (kind, *turns) in enumerate(TALKS)]
    _write_lines(folder / "mt_bench_questions.jsonl", talks)
    references = [{"question_id": 82, "choices": [{"index": 0, "turns": ["truth one", "truth two"]}]}]
    _write_lines(folder / "mt_bench_references.jsonl", references)
    return str(folder)


def write_gsm8k(folder: Path, number: int) -> str:
    """So many sums, `i + 1 = ?`, beside them."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": f"{i} + 1 = ?", "answer": f"So it is.\n#### {i + 1}"} for i in range(number)]
    _write_lines(folder / "gsm8k_test.jsonl", rows)
    return str(folder)


def _write_lines(file: Path, rows: Sequence[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def request_of(prompt: str) -> str:
    """The request that a judge's prompt is about: of a conversation, the last one."""
    return re.findall(r"^=== Request (?:\d+ )?\(\w+\)\n(.*?)\n=== End", prompt, re.S | re.M)[-1]


def answers_in(prompt: str) -> list[str]:
    """The answers between which a judge is to choose, as they are shown."""
    return [
        text for _, text in re.findall(r"^=== Answer \w+ \((\w+)\)\n(.*?)\n=== End of.*?\(\1\)$", prompt, re.S | re.M)
    ]


def mark_of(prompt: str) -> str:
    """The mark that tells one prompt from another, the same answers in another order included."""
    return re.findall(r"^=== End of .*\((\w+)\)$", prompt, re.M)[-1]


def opinion(prompt: str) -> Step:
    """Always the same verdict on the same request; the reasons repeat the prompt's mark."""
    request = request_of(prompt)
    what, last = request.split()[0], request.split()[-1]
    ours, theirs = ("B", "A") if answers_in(prompt)[:1] == [REFERENCE] else ("A", "B")
    verdicts = {"win": ours, "lose": theirs, "tie": "C", "first": "A", "rate": last}
    return fine(f"{mark_of(prompt)} is clear.\n" + (f"[[{verdicts[what]}]]" if what in verdicts else "Hm."))
