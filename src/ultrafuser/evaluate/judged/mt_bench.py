"""MT-Bench: a judge rates both answers of 80 two-turn conversations from 1 to 10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ultrafuser.errors import DataError
from ultrafuser.evaluate.judged.judge import Judge, Judgement, Turn, rating_question
from ultrafuser.evaluate.judged.result import JudgedResult, Sample, judged_result, mean
from ultrafuser.evaluate.judged.rows import hub_records, local_records, text_of
from ultrafuser.evaluate.lm.chat import answer_chats
from ultrafuser.evaluate.sampling import draw_rows
from ultrafuser.progress import Progress

TASK = "mt_bench"
MAX_TOKENS = 1024  # of an answer
QUESTIONS, REFERENCES = "mt_bench_questions.jsonl", "mt_bench_references.jsonl"
HUB = "HuggingFaceH4/mt_bench_prompts"
WITH_REFERENCE = ("coding", "math", "reasoning")  # categories in which the judge is given reference answers
TURNS = 2


@dataclass(frozen=True)
class MTBenchRow:
    """One conversation: two requests, and for some categories the references (None: there is none)."""

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str | None, ...] = (None,) * TURNS


class TurnSample(Sample):
    """One turn of a conversation, the model's answer, and the judge's rating."""

    category: str
    turn: int
    question: str
    answer: str
    reference: str | None
    status: str
    judge: str


def load_rows(data_dir: str | Path | None = None) -> list[MTBenchRow]:
    """The 80 rows, from the two files of FastChat's layout in a folder, or else from the hub.

    Raises:
        DataError: a missing file, no rows, or a malformed row.
    """
    if data_dir is None:
        return [_row(record, "prompt_id", "prompt", location) for record, location in hub_records(HUB, "train")]
    references: dict[str, list[str]] = {}
    for record, location in local_records(data_dir, REFERENCES):
        try:
            references[str(record["question_id"])] = record["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(f"{location}: no {error}, expected question_id and choices[0].turns") from error
    records = local_records(data_dir, QUESTIONS)
    rows = [_row(record, "question_id", "turns", location, references) for record, location in records]
    if not rows:
        raise DataError(f"{Path(data_dir) / QUESTIONS}: no rows")
    return rows


def _row(
    record: Any, id_key: str, turns_key: str, location: str, model_references: Mapping[str, list[str]] | None = None
) -> MTBenchRow:
    """One row, with the authors' references, or a model's where they gave none.

    Departs from the original, which shows the judge a model's references alone: several are wrong (questions 111, 113,
    114 and 120).
    """
    if not isinstance(record, Mapping) or id_key not in record:
        raise DataError(f"{location}: got {record!r:.80}, expected an object with {id_key!r}")
    row_id, category, turns = str(record[id_key]), text_of(record, "category", location), record.get(turns_key)
    if not isinstance(turns, list) or len(turns) != TURNS or not all(isinstance(turn, str) for turn in turns):
        raise DataError(f"{location}: {turns_key!r} is {turns!r:.80}, expected {TURNS} texts")
    if category not in WITH_REFERENCE:
        return MTBenchRow(row_id, category, tuple(turns))
    sources = [list(record.get("reference") or []), (model_references or {}).get(row_id, [])]
    references = [next((texts[i] for texts in sources if i < len(texts) and texts[i]), None) for i in range(TURNS)]
    return MTBenchRow(row_id, category, tuple(turns), tuple(references))


def evaluate(
    lm: Any,
    judge: Judge,
    rows: Sequence[MTBenchRow],
    *,
    limit: int | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> JudgedResult:
    """The mean rating over all rated turns.

    The second request is asked with the model's own first answer in the chat, and its rating is for the second answer
    alone. A turn without a readable rating is left out and counted. Answers are greedy, where the original draws some
    categories at temperatures up to 0.7.

    Raises:
        DataError: zero samples.
        EndpointError: the judge cannot be used, or died. Its judgements so far are kept.
    """
    rows = draw_rows(rows, limit, seed, TASK)
    chats: list[list[dict[str, str]]] = [[] for _ in rows]
    for turn in range(TURNS):
        for chat, row in zip(chats, rows, strict=True):
            chat.append({"role": "user", "content": row.turns[turn]})
        for chat, answer in zip(chats, answer_chats(lm, TASK, chats, max_tokens), strict=True):
            chat.append({"role": "assistant", "content": answer})
    talks = [_turns(row, chat) for row, chat in zip(rows, chats, strict=True)]
    questions = [rating_question(talk[: turn + 1]) for talk in talks for turn in range(TURNS)]
    judgements = judge.ask_all(questions, title=f"{TASK}: judgements", progress=progress)
    samples = [
        _sample(row, turn, talk[turn], judgements[i * TURNS + turn])
        for i, (row, talk) in enumerate(zip(rows, talks, strict=True))
        for turn in range(TURNS)
    ]
    return judged_result(TASK, "rating", samples, judgements, _details(rows, samples))


def _turns(row: MTBenchRow, chat: Sequence[dict[str, str]]) -> list[Turn]:
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    return [Turn(*texts) for texts in zip(row.turns, answers, row.references, strict=True)]


def _sample(row: MTBenchRow, index: int, turn: Turn, judgement: Judgement) -> TurnSample:
    return {
        "id": f"{row.id}.{index + 1}",
        "category": row.category,
        "turn": index + 1,
        "question": turn.question,
        "answer": turn.answer,
        "reference": turn.reference,
        "score": None if judgement.verdict is None else float(judgement.verdict),
        "status": judgement.status,
        "judge": judgement.text,
    }


def _details(rows: Sequence[MTBenchRow], samples: Sequence[TurnSample]) -> dict[str, Any]:
    """Mean ratings by turn and category, missing references, and the length of answers."""

    def mean_by(key: Literal["turn", "category"]) -> dict[str, float | None]:
        scores: dict[str, list[float]] = {}
        for sample in samples:
            group = scores.setdefault(str(sample[key]), [])
            if sample["score"] is not None:
                group.append(sample["score"])
        return {name: mean(group) for name, group in scores.items()}

    references = [reference for row in rows if row.category in WITH_REFERENCE for reference in row.references]
    return {
        "turns": mean_by("turn"),
        "categories": mean_by("category"),
        "missing_references": sum(reference is None for reference in references),
        "answer_characters": mean(len(sample["answer"]) for sample in samples),
    }
