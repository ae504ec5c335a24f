"""Count what a data set holds, by domain: the columns of the paper's table 15, and turns, sources and licences."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypedDict

from ultrafuser.data.schema import Row
from ultrafuser.errors import CheckpointError, DataError
from ultrafuser.model.errors import LOAD_ERRORS, reason

if TYPE_CHECKING:
    from typing_extensions import NotRequired

_BATCH_ROWS = 200


class TokenStatistics(TypedDict):
    """Tokens per conversation, and totals."""

    mean: float
    median: float
    longest: int
    total: int
    answers_total: int


class DomainStatistics(TypedDict):
    """What one domain holds. `tokens` is there only with a tokenizer."""

    conversations: int
    repeated_ids: int
    topics: int
    subtopics: int
    mean_turns: float
    with_system_message: int
    sources: dict[str, int]
    licences: dict[str, int]
    tokens: NotRequired[TokenStatistics]


class DataStatistics(TypedDict):
    """What a data set holds, by domain and in all."""

    domains: dict[str, DomainStatistics]
    all: DomainStatistics


@dataclass
class _Counts:
    """Running counts of one domain."""

    ids: set[str] = field(default_factory=set)
    topics: set[str] = field(default_factory=set)
    subtopics: set[tuple[str, str]] = field(default_factory=set)
    turns: int = 0
    systems: int = 0
    conversations: int = 0
    tokens: list[int] = field(default_factory=list)
    answer_tokens: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row, lengths: Sequence[int] | None) -> None:
        self.conversations += 1
        self.ids.add(row.id)
        if row.topic:
            self.topics.add(row.topic)
        if row.subtopic:
            self.subtopics.add((row.topic, row.subtopic))
        roles = [role for role, _ in row.messages]
        self.turns += roles.count("assistant")
        self.systems += roles.count("system")
        self.sources[row.source] += 1
        self.licences[row.licence] += 1
        if lengths is not None:
            self.tokens.append(sum(lengths))
            self.answer_tokens += sum(n for role, n in zip(roles, lengths, strict=True) if role == "assistant")

    def to_dict(self) -> DomainStatistics:
        counts: DomainStatistics = {
            "conversations": self.conversations,
            "repeated_ids": self.conversations - len(self.ids),
            "topics": len(self.topics),
            "subtopics": len(self.subtopics),
            "mean_turns": self.turns / self.conversations,
            "with_system_message": self.systems,
            "sources": dict(sorted(self.sources.items(), key=lambda item: (-item[1], item[0]))),
            "licences": dict(sorted(self.licences.items(), key=lambda item: (-item[1], item[0]))),
        }
        if self.tokens:
            counts["tokens"] = {
                "mean": sum(self.tokens) / len(self.tokens),
                "median": statistics.median(self.tokens),
                "longest": max(self.tokens),
                "total": sum(self.tokens),
                "answers_total": self.answer_tokens,
            }
        return counts


def data_statistics(rows: Iterable[Row], tokenizer: Any = None) -> DataStatistics:
    """Counts of each domain (`domains`, in alphabetical order) and of all rows (`all`).

    Sub-topics are counted within their topic, and empty ones are skipped. A turn is a question and its answer. Tokens are
    counted in the content of the messages, without a template. The tokens of answers are also counted separately.

    Args:
        tokenizer: a transformers tokenizer. None: tokens are not counted.

    Raises:
        DataError: no rows.
    """
    counts: dict[str, _Counts] = {}
    total = _Counts()
    for row, lengths in _with_lengths(rows, tokenizer):
        counts.setdefault(row.domain, _Counts()).add(row, lengths)
        total.add(row, lengths)
    if not total.conversations:
        raise DataError("there are no rows to count")
    return {"domains": {domain: counts[domain].to_dict() for domain in sorted(counts)}, "all": total.to_dict()}


def _with_lengths(rows: Iterable[Row], tokenizer: Any) -> Iterator[tuple[Row, list[int] | None]]:
    if tokenizer is None:
        yield from ((row, None) for row in rows)
        return
    stream = iter(rows)
    while batch := list(islice(stream, _BATCH_ROWS)):
        texts = [content for row in batch for _, content in row.messages]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        lengths = iter([len(ids) for ids in encoded])
        for row in batch:
            yield row, list(islice(lengths, len(row.messages)))


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer by hub id or folder. A fused folder has one.

    Raises:
        CheckpointError: no tokenizer was found.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        message = f"{source}: no tokenizer there: {reason(error)}. Give a hub id or a folder that has one"
        raise CheckpointError(message) from error
