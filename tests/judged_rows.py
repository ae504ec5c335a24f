"""Small local files of AlpacaEval and MT-Bench, and a judge whose verdict is written in the request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fake_endpoint import Step, fine

REFERENCE = "the reference answer"
# The verdict on each: `first` prefers whichever is shown first, `mumble` gives no verdict.
ALPACA = ("win 0", "win 1", "lose 2", "tie 3", "first 4", "mumble 5")
ALPACA_SCORES = {"0": 1.0, "1": 1.0, "2": 0.0, "3": 0.5, "4": 0.5}  # mean 0.6
# Two requests each, which end in their ratings.
TALKS = (("writing", "rate it 9", "mumble"), ("math", "rate it 5", "rate it 3"))
MT_BENCH_SCORES = {"81": 9.0, "82": 4.0}  # mean 6.5. Over the rated turns it would be 5.67


def write_judged_files(folder: Path, alpaca: Iterable[str] = ALPACA) -> str:
    """Write the files of both benchmarks into a folder. Returns it as `data_dir`."""
    folder.mkdir(exist_ok=True)
    rows = [{"dataset": "own", "instruction": request, "output": REFERENCE} for request in alpaca]
    (folder / "alpaca_eval.json").write_text(json.dumps(rows))
    talks = [{"question_id": 81 + i, "category": kind, "turns": turns} for i, (kind, *turns) in enumerate(TALKS)]
    _write_lines(folder / "mt_bench_questions.jsonl", talks)
    references = [{"question_id": 82, "choices": [{"index": 0, "turns": ["truth one", "truth two"]}]}]
    _write_lines(folder / "mt_bench_references.jsonl", references)
    return str(folder)


def write_gsm8k(folder: Path, count: int) -> str:
    """A file of so many sums, `i + 1 = ?`, in the folder."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": f"{i} + 1 = ?", "answer": f"So it is.\n#### {i + 1}"} for i in range(count)]
    _write_lines(folder / "gsm8k_test.jsonl", rows)
    return str(folder)


def _write_lines(file: Path, rows: Sequence[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def request_of(prompt: str) -> str:
    """The request in a judge's prompt. Of a conversation, the last one."""
    return re.findall(r"^=== Request (?:\d+ )?\(\w+\)\n(.*?)\n=== End", prompt, re.S | re.M)[-1]


def answers_in(prompt: str) -> list[str]:
    """The answers that a judge chooses from, in the order shown."""
    return [
        text for _, text in re.findall(r"^=== Answer \w+ \((\w+)\)\n(.*?)\n=== End of.*?\(\1\)$", prompt, re.S | re.M)
    ]


def mark_of(prompt: str) -> str:
    """The mark that tells one prompt from another, also the same answers in another order."""
    return re.findall(r"^=== End of .*\((\w+)\)$", prompt, re.M)[-1]


def opinion(prompt: str) -> Step:
    """Always the same verdict on the same request. The reasons repeat the prompt's mark."""
    request = request_of(prompt)
    action, last_word = request.split()[0], request.split()[-1]
    ours_label, reference_label = ("B", "A") if answers_in(prompt)[:1] == [REFERENCE] else ("A", "B")
    verdicts = {"win": ours_label, "lose": reference_label, "tie": "C", "first": "A", "rate": last_word}
    return fine(f"{mark_of(prompt)} is clear.\n" + (f"[[{verdicts[action]}]]" if action in verdicts else "Hm."))
