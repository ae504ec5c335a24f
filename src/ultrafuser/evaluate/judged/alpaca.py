"""AlpacaEval: how often a judge prefers the model's answer to a reference answer, asked in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser.errors import DataError
from ultrafuser.evaluate.judged.judge import Judge, Judgement, pair_question
from ultrafuser.evaluate.judged.result import JudgedResult, Sample, judged_result, mean
from ultrafuser.evaluate.judged.rows import hub_records, local_records, text_of
from ultrafuser.evaluate.lm.chat import answer_chats
from ultrafuser.evaluate.sampling import draw_rows
from ultrafuser.progress import Progress

TASK = "alpaca_eval"
MAX_TOKENS = 1024  # of an answer
FILE = "alpaca_eval.json"
# The repository keeps its files behind a loading script, which datasets no longer runs: read the file itself.
HUB_FILE = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"
MODEL_FIRST = {"A": 1.0, "B": 0.0, "C": 0.5}
MODEL_SECOND = {"A": 0.0, "B": 1.0, "C": 0.5}


@dataclass(frozen=True)
class AlpacaRow:
    """One instruction and the reference answer (of text-davinci-003)."""

    id: str
    group: str
    instruction: str
    reference: str


class PairSample(Sample):
    """One instruction, both answers, and the judge's two verdicts: the model's answer shown first, then second."""

    group: str
    instruction: str
    answer: str
    reference: str
    consistent: bool | None  # whether the two orders agree. None: a verdict is missing
    status: list[str]
    verdicts: list[str | None]
    judge: list[str]


def load_rows(data_dir: str | Path | None = None) -> list[AlpacaRow]:
    """The 805 rows, from `alpaca_eval.json` in a folder, or else from the hub.

    Raises:
        DataError: a missing file, no rows, or a row without its texts.
    """
    records = hub_records("json", "train", data_files=HUB_FILE) if data_dir is None else local_records(data_dir, FILE)
    rows = []
    for i, (record, location) in enumerate(records):
        instruction, reference = (text_of(record, key, location) for key in ("instruction", "output"))
        rows.append(AlpacaRow(str(i), str(record.get("dataset") or ""), instruction, reference))
    if not rows:
        raise DataError(f"{FILE if data_dir is None else Path(data_dir) / FILE}: no rows")
    return rows


def evaluate(
    lm: Any,
    judge: Judge,
    rows: Sequence[AlpacaRow],
    *,
    limit: int | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> JudgedResult:
    """The win rate of an lm-eval model against the references.

    Every answer is judged twice, shown first and shown second. A win counts 1, a tie 0.5, and a sample's score is the
    mean of the two. A sample that lacks one of its two verdicts is left out and counted.

    Raises:
        DataError: zero samples.
        EndpointError: the judge cannot be used, or died. Its judgements so far are kept.
    """
    rows = draw_rows(rows, limit, seed, TASK)
    answers = answer_chats(lm, TASK, [[{"role": "user", "content": row.instruction}] for row in rows], max_tokens)
    pairs = list(zip(rows, answers, strict=True))
    questions = [pair_question(row.instruction, answer, row.reference) for row, answer in pairs]
    questions += [pair_question(row.instruction, row.reference, answer) for row, answer in pairs]
    judgements = judge.ask_all(questions, title=f"{TASK}: judgements", progress=progress)
    first, second = judgements[: len(rows)], judgements[len(rows) :]
    samples = [_sample(*pair, *verdicts) for pair, *verdicts in zip(pairs, first, second, strict=True)]
    return judged_result(TASK, "win_rate", samples, judgements, _details(samples))


def _sample(row: AlpacaRow, answer: str, first: Judgement, second: Judgement) -> PairSample:
    scores = None
    if first.verdict is not None and second.verdict is not None:
        scores = [MODEL_FIRST[first.verdict], MODEL_SECOND[second.verdict]]
    return {
        "id": row.id,
        "group": row.group,
        "instruction": row.instruction,
        "answer": answer,
        "reference": row.reference,
        "score": mean(scores) if scores else None,
        "consistent": scores[0] == scores[1] if scores else None,
        "status": [first.status, second.status],
        "verdicts": [first.verdict, second.verdict],
        "judge": [first.text, second.text],
    }


def _details(samples: Sequence[PairSample]) -> dict[str, Any]:
    """Over the scored samples: how often the order decided, and lengths, since judges favour long answers."""
    scored = [sample for sample in samples if sample["score"] is not None]
    verdicts = [sample["verdicts"] for sample in scored]
    return {
        "inconsistent": sum(not sample["consistent"] for sample in scored),
        "win_rate_shown_first": mean(MODEL_FIRST[str(first)] for first, _ in verdicts),
        "win_rate_shown_second": mean(MODEL_SECOND[str(second)] for _, second in verdicts),
        "answer_characters": mean(len(sample["answer"]) for sample in scored),
        "reference_characters": mean(len(sample["reference"]) for sample in scored),
    }
