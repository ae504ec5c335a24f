"""From conversations to the data set: decisions of readers, duplicates, test data, balance. Nothing here asks a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any, Protocol, TypeVar

from ultrafuser.data.schema import Row
from ultrafuser.data.tools.decontaminate import ContaminationIndex, Rule
from ultrafuser.data.tools.near_duplicates import NearDuplicateRule, find_clusters
from ultrafuser.data.tools.texts import read_texts
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress
from ultrafuser.synth.ledger import Ledger
from ultrafuser.synth.recipe import FiltersRecipe, SynthRecipe
from ultrafuser.synth.stages.items import Conversation, Instruction, SubTopic, Topic

DECISIONS = ("accept", "edit", "reject")
MIN_ANSWER_WORDS = 12  # many questions have the same short answer
_TOUCHES = 3  # test texts that the report names for a row
T = TypeVar("T")


class Decision(Protocol):
    """What a reader decided on a row; `reviews.Review` is one."""

    @property
    def decision(self) -> str: ...

    @property
    def note(self) -> str: ...


@dataclass
class DataSet:
    """What came of a recipe so far.

    Attributes:
        instructions: as far as they have come; None: not reached.
        overlaps: rows that were left out for sharing words with test data, and what they share.
        stopped_after: the last stage, where the run was to go no further; there are no rows then.
    """

    ledger: Ledger
    topics: dict[str, list[Topic]] = field(default_factory=dict)
    sub_topics: dict[str, list[SubTopic]] = field(default_factory=dict)
    instructions: list[Instruction] | None = None
    conversations: list[Conversation] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    overlaps: list[dict[str, Any]] = field(default_factory=list)
    stopped_after: str | None = None


def as_rows(
    recipe: SynthRecipe, conversations: Iterable[Conversation], reviews: Mapping[str, Decision], ledger: Ledger
) -> list[Row]:
    """The rows, in the order of their ids, as readers left them."""
    rows = []
    for one in conversations:
        model = recipe.model(recipe.role("responses", recipe.domain(one.domain)))
        row = one.row(f"synthetic: {model.served}", model.licence or recipe.licence)
        decided = reviews.get(row.id)
        if decided is not None:
            if not ledger.decide(
                "review", row.domain, "rejected by a reader" if decided.decision == "reject" else None, one.answer
            ):
                continue
            if decided.decision == "edit":
                row = edited(row, decided.note)
        rows.append(row)
    return sorted(rows, key=lambda row: row.id)


def edited(row: Row, note: str) -> Row:
    """A row with the messages that a reader wrote; its tests were for another answer, so they go where that changed."""
    try:
        messages = tuple((str(role), str(content)) for role, content in json.loads(note))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"row {row.id}: the edit in the store is not a list of [role, content] ({error}); review the row again"
        ) from error
    return replace(row, messages=messages, tests=row.tests if messages == row.messages else None)


def without_duplicates(
    rows: Sequence[Row], filters: FiltersRecipe, ledger: Ledger, progress: Progress | None = None
) -> list[Row]:
    """One row of each set of those with the same, or almost the same, instructions or answers: the first by id."""
    reasons: dict[str, str] = {}
    kept = list(rows)
    for on in ("instructions", "answers"):
        own = [row for row in kept if on == "instructions" or _answer_words(row) >= MIN_ANSWER_WORDS]
        for one in find_clusters(own, NearDuplicateRule(threshold=filters.near_duplicates, on=on), progress):
            reasons |= {own[number].id: f"same {on}" for number in one.exact}
            reasons |= {own[number].id: f"near-duplicate {on}" for number, _ in one.near}
        kept = [row for row in kept if row.id not in reasons]
    for row in rows:
        ledger.decide("duplicates", row.domain, reasons.get(row.id), row.messages[0][1])
    return kept


def _answer_words(row: Row) -> int:
    return sum(len(content.split()) for role, content in row.messages if role == "assistant")


def index_of_tests(filters: FiltersRecipe) -> ContaminationIndex | None:
    """The test texts, read before anything is asked; None where none are named.

    Raises:
        DataError: a test file that is missing, cannot be read, or holds nothing to look for.
    """
    if not filters.decontaminate:
        return None
    texts = (text for path in filters.decontaminate for text in read_texts(path))
    return ContaminationIndex(texts, Rule(ngram=filters.ngram, min_words=min(Rule.min_words, filters.ngram)))


def without_overlaps(
    rows: Sequence[Row], index: ContaminationIndex | None, ledger: Ledger
) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows that share no n-gram with test data, and a report of the others."""
    if index is None:
        return list(rows), []
    kept, overlaps = [], []
    for row, touches in index.find_matches(rows):
        reason = f"{touches[0].kind} of test data" if touches else None
        if ledger.decide("decontamination", row.domain, reason, touches[0].words if touches else ""):
            kept.append(row)
        else:
            shown = [asdict(touch) for touch in touches[:_TOUCHES]]
            overlaps.append({"id": row.id, "domain": row.domain, "test_texts": len(touches), "touches": shown})
    return kept, overlaps


def balanced(rows: Sequence[Row], recipe: SynthRecipe, ledger: Ledger) -> list[Row]:
    """At most `counts.rows` of each domain: in turn from every topic, within a topic in turn from every sub-topic."""
    chosen: set[str] = set()
    for domain in recipe.domains:
        own = [row for row in rows if row.domain == domain.name]
        most = len(own) if domain.counts.rows is None else domain.counts.rows
        chosen |= {row.id for row in list(_in_turn(own))[:most]}
    for row in rows:
        if recipe.domain(row.domain).counts.rows is not None:
            ledger.decide("balance", row.domain, None if row.id in chosen else "more than wanted of its topic")
    return [row for row in rows if row.id in chosen]


def _in_turn(rows: Sequence[Row]) -> Iterator[Row]:
    topics = [
        list(_round_robin(_groups(own, lambda row: row.subtopic))) for own in _groups(rows, lambda row: row.topic)
    ]
    return _round_robin(topics)


def _groups(rows: Iterable[Row], key: Callable[[Row], str]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (key(row), row.id)):
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _round_robin(groups: Sequence[Sequence[T]]) -> Iterator[T]:
    nothing = object()
    for turn in zip_longest(*groups, fillvalue=nothing):
        yield from (one for one in turn if one is not nothing)  # type: ignore[misc]
