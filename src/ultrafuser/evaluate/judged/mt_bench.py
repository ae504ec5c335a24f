"""MT-Bench: a judge rates both answers of 80 two-turn conversations from 1 to 10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser.errors import DataError
from ultrafuser.evaluate.judged.common import (
    JudgedResult,
    answer_chats,
    count,
    mean,
    read_hub,
    read_local,
    text_of,
)
from ultrafuser.evaluate.judged.judge import Judge, Judgement, Turn, rating_question
from ultrafuser.evaluate.sampling import draw_rows
from ultrafuser.progress import Progress

TASK = "mt_bench"
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


def load_rows(data_dir: str | Path | None = None) -> list[MTBenchRow]:
    """The 80 rows, from the two files of FastChat's layout in a folder, or else from the hub.

    Raises:
        DataError: a missing file, or a malformed row.
    """
    if data_dir is None:
        records = read_hub(HUB, "train")
        return [_row(record, "prompt_id", "prompt", f"{HUB}[train][{i}]") for i, record in enumerate(records)]
    references = _references(data_dir)
    return [
        _row(record, "question_id", "turns", f"{data_dir}/{QUESTIONS}:{i}", references)
        for i, record in enumerate(read_local(data_dir, QUESTIONS), 1)
    ]


def _references(data_dir: str | Path) -> dict[str, list[str]]:
    """The reference turns by question."""
    found = {}
    for i, record in enumerate(read_local(data_dir, REFERENCES), 1):
        try:
            found[str(record["question_id"])] = record["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"{data_dir}/{REFERENCES}:{i}: no {error}, expected question_id and choices[0].turns"
            ) from error
    return found


def _row(
    record: Any, id_key: str, turns_key: str, where: str, references: Mapping[str, list[str]] | None = None
) -> MTBenchRow:
    """One row, with the authors' references, or a model's where they gave none.

    Departs from the original, which shows the judge a model's references alone: several are wrong (questions 111, 113,
    114 and 120).
    """
    if not isinstance(record, Mapping) or id_key not in record:
        raise DataError(f"{where}: got {record!r:.80}, expected an object with {id_key!r}")
    row_id, category, turns = str(record[id_key]), text_of(record, "category", where), record.get(turns_key)
    if not isinstance(turns, list) or len(turns) != TURNS or not all(isinstance(turn, str) for turn in turns):
        raise DataError(f"{where}: {turns_key!r} is {turns!r:.80}, expected {TURNS} texts")
    if category not in WITH_REFERENCE:
        return MTBenchRow(row_id, category, tuple(turns))
    sources = [list(record.get("reference") or []), (references or {}).get(row_id, [])]
    found = [next((own[i] for own in sources if i < len(own) and own[i]), None) for i in range(TURNS)]
    return MTBenchRow(row_id, category, tuple(turns), tuple(found))


def evaluate(
    lm: Any,
    judge: Judge,
    rows: Sequence[MTBenchRow],
    *,
    limit: int | None = None,
    seed: int = 0,
    max_tokens: int = 1024,
    progress: Progress | None = None,
) -> JudgedResult:
    """The mean rating over all rated turns.

    The second request is asked with the model's own first answer in the chat, and its rating is for the second answer
    alone. A turn without a readable rating is left out and counted. Answers are greedy, where the original draws some
    categories at temperatures up to 0.7.

    Raises:
        DataError: zero samples.
        EndpointError: the judge cannot be used, or died; its judgements so far are kept.
    """
    rows = draw_rows(rows, limit, seed, TASK)
    chats: list[list[dict[str, str]]] = [[] for _ in rows]
    for number in range(TURNS):
        chats = [[*chat, _message("user", row.turns[number])] for chat, row in zip(chats, rows, strict=True)]
        answers = answer_chats(lm, TASK, chats, max_tokens)
        chats = [[*chat, _message("assistant", answer)] for chat, answer in zip(chats, answers, strict=True)]
    talks = [_talk(row, chat) for row, chat in zip(rows, chats, strict=True)]
    questions = [rating_question(talk[: number + 1]) for talk in talks for number in range(TURNS)]
    judgements = judge.ask_all(questions, what=f"{TASK}: judgements", progress=progress)
    samples = [
        _sample(row, number, talk[number], judgements[i * TURNS + number])
        for i, (row, talk) in enumerate(zip(rows, talks, strict=True))
        for number in range(TURNS)
    ]
    scored = [sample for sample in samples if sample["score"] is not None]
    return JudgedResult(
        TASK,
        "rating",
        mean(sample["score"] for sample in scored),
        {sample["id"]: sample["score"] for sample in scored},
        count(judgements, len(samples) - len(scored)),
        _details(rows, samples, scored),
        samples,
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _talk(row: MTBenchRow, chat: Sequence[dict[str, str]]) -> list[Turn]:
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    return [Turn(*parts) for parts in zip(row.turns, answers, row.references, strict=True)]


def _sample(row: MTBenchRow, number: int, turn: Turn, judgement: Judgement) -> dict[str, Any]:
    return {
        "id": f"{row.id}.{number + 1}",
        "category": row.category,
        "turn": number + 1,
        "question": turn.question,
        "answer": turn.answer,
        "reference": turn.reference,
        "score": None if judgement.verdict is None else float(judgement.verdict),
        "status": judgement.status,
        "judge": judgement.text,
    }


def _details(
    rows: Sequence[MTBenchRow], samples: Sequence[dict[str, Any]], scored: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    def by(key: str) -> dict[str, float | None]:
        groups = dict.fromkeys(str(sample[key]) for sample in samples)
        return {group: mean(one["score"] for one in scored if str(one[key]) == group) for group in groups}

    wanted = [reference for row in rows if row.category in WITH_REFERENCE for reference in row.references]
    return {
        "turns": by("turn"),
        "categories": by("category"),
        "missing_references": sum(reference is None for reference in wanted),
        "answer_characters": mean(len(sample["answer"]) for sample in samples),
    }
