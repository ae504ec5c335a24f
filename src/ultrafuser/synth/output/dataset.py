"""From conversations to the data set: reviews, duplicates, test data, balance. Nothing here makes a request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any

from ultrafuser.data.schema import Row
from ultrafuser.data.tools.decontaminate import ContaminationIndex, Rule
from ultrafuser.data.tools.near_duplicates import NearDuplicateRule, find_clusters
from ultrafuser.data.tools.texts import read_texts
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress
from ultrafuser.synth.calls.store import Review
from ultrafuser.synth.ledger import Ledger
from ultrafuser.synth.recipe import FiltersRecipe, SynthRecipe
from ultrafuser.synth.stages.items import Conversation, Instruction, SubTopic, Topic

DECISIONS = ("accept", "edit", "reject")
MIN_ANSWER_WORDS = 12  # many questions have the same short answer
_TOUCHES = 3  # overlapping test texts per row in the report


@dataclass
class DataSet:
    """The result of a recipe so far.

    Attributes:
        instructions: None: that stage was not reached.
        overlaps: rows that were left out because they share words with test data, and these words.
        stopped_after: the stage that the run was told to stop after. There are no rows then.
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
    recipe: SynthRecipe, conversations: Iterable[Conversation], reviews: Mapping[str, Review], ledger: Ledger
) -> list[Row]:
    """The rows after review, in the order of their ids."""
    rows = []
    for conversation in conversations:
        model = recipe.model(recipe.role("responses", recipe.domain(conversation.domain)))
        row = conversation.row(f"synthetic: {model.served}", model.licence or recipe.licence)
        review = reviews.get(row.id)
        if review is not None:
            reason = "rejected by a reader" if review.decision == "reject" else None
            if not ledger.decide("review", row.domain, reason, conversation.answer):
                continue
            if review.decision == "edit":
                row = edited(row, review.note)
        rows.append(row)
    return sorted(rows, key=lambda row: row.id)


def edited(row: Row, note: str) -> Row:
    """The row with the messages that a reader wrote. Tests of a changed row are dropped: they were for another answer."""
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
    """The first row by id of each set with the same, or nearly the same, instructions or answers."""

    def answer_words(row: Row) -> int:
        return sum(len(content.split()) for role, content in row.messages if role == "assistant")

    reasons: dict[str, str] = {}
    unique = list(rows)
    for on in ("instructions", "answers"):
        compared = [row for row in unique if on == "instructions" or answer_words(row) >= MIN_ANSWER_WORDS]
        for cluster in find_clusters(compared, NearDuplicateRule(threshold=filters.near_duplicates, on=on), progress):
            reasons |= {compared[index].id: f"same {on}" for index in cluster.exact}
            reasons |= {compared[index].id: f"near-duplicate {on}" for index, _ in cluster.near}
        unique = [row for row in unique if row.id not in reasons]
    for row in rows:
        ledger.decide("duplicates", row.domain, reasons.get(row.id), row.messages[0][1])
    return unique


def index_of_tests(filters: FiltersRecipe) -> ContaminationIndex | None:
    """An index of the test texts. None: the recipe names none.

    Raises:
        DataError: a test file is missing, cannot be read, or holds nothing to look for.
    """
    if not filters.decontaminate:
        return None
    texts = (text for path in filters.decontaminate for text in read_texts(path))
    return ContaminationIndex(texts, Rule(ngram=filters.ngram, min_words=min(Rule.min_words, filters.ngram)))


def without_overlaps(
    rows: Sequence[Row], index: ContaminationIndex | None, ledger: Ledger
) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows that share no n-gram with test data, and a report of the other rows."""
    if index is None:
        return list(rows), []
    clean, overlaps = [], []
    for row, touches in index.find_matches(rows):
        reason = f"{touches[0].kind} of test data" if touches else None
        if ledger.decide("decontamination", row.domain, reason, touches[0].words if touches else ""):
            clean.append(row)
        else:
            first_touches = [asdict(touch) for touch in touches[:_TOUCHES]]
            overlaps.append({"id": row.id, "domain": row.domain, "test_texts": len(touches), "touches": first_touches})
    return clean, overlaps


def balanced(rows: Sequence[Row], recipe: SynthRecipe, ledger: Ledger) -> list[Row]:
    """At most `counts.rows` of each domain, taken in turn from each topic, and within a topic from each sub-topic."""
    selected: set[str] = set()
    for domain in recipe.domains:
        domain_rows = [row for row in rows if row.domain == domain.name]
        limit = len(domain_rows) if domain.counts.rows is None else domain.counts.rows
        topics = [_round_robin(_group(topic, "subtopic")) for topic in _group(domain_rows, "topic")]
        selected |= {row.id for row in _round_robin(topics)[:limit]}
    for row in rows:
        if recipe.domain(row.domain).counts.rows is not None:
            ledger.decide("balance", row.domain, None if row.id in selected else "more than wanted of its topic")
    return [row for row in rows if row.id in selected]


def _group(rows: Iterable[Row], field: str) -> list[list[Row]]:
    """Groups of rows with the same value of a field, in the order of the values and ids."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (getattr(row, field), row.id)):
        groups.setdefault(getattr(row, field), []).append(row)
    return list(groups.values())


def _round_robin(groups: Sequence[Sequence[Row]]) -> list[Row]:
    return [row for turn in zip_longest(*groups) for row in turn if row is not None]
