"""A review of the rows of a data set: it shows rows in order and writes each decision to the store at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows
from ultrafuser.errors import DataError
from ultrafuser.synth.calls.store import CallStore
from ultrafuser.synth.output.card import ROWS
from ultrafuser.synth.output.dataset import DECISIONS, edited
from ultrafuser.synth.pipeline import STORE
from ultrafuser.synth.recipe import SynthRecipe

STATES = ("not reviewed", "all", *(f"{decision}ed" for decision in DECISIONS))
ALL_DOMAINS = "all domains"


class ReviewSession:
    """The rows of a data set, and the decisions on them.

    Attributes:
        rows: in the order of the data set. An edited row is shown as it was edited.
    """

    def __init__(self, rows: Sequence[Row], store: CallStore) -> None:
        self.rows, self.store = list(rows), store
        self.domains = (ALL_DOMAINS, *dict.fromkeys(row.domain for row in rows))

    @classmethod
    def open(cls, recipe: SynthRecipe) -> ReviewSession:
        """The session of a recipe's data set. Close `store` at the end.

        Raises:
            DataError: there is no data set, or no store, yet.
        """
        folder = Path(recipe.output)
        if not (folder / ROWS).is_file():
            raise DataError(f"{folder / ROWS}: no such file; run `ultrafuser synth RECIPE` to its end first")
        return cls(load_rows(str(folder / ROWS)), CallStore(folder / STORE, shared=True))

    def decision(self, row: Row) -> str:
        """`accept`, `edit`, `reject`, or empty: not reviewed yet."""
        review = self.store.reviews.get(row.id)
        return review.decision if review is not None else ""

    def select(self, domain: str = ALL_DOMAINS, state: str = STATES[0]) -> list[int]:
        """Indices of the rows of a domain and review state."""
        states = {row_id: f"{review.decision}ed" for row_id, review in self.store.reviews.all().items()}
        return [
            index
            for index, row in enumerate(self.rows)
            if domain in (ALL_DOMAINS, row.domain) and (state == STATES[1] or states.get(row.id, STATES[0]) == state)
        ]

    def messages(self, index: int) -> list[tuple[str, str]]:
        """The messages of a row, with the edits of a reader."""
        row = self.rows[index]
        review = self.store.reviews.get(row.id)
        if review is not None and review.decision == "edit":
            row = edited(row, review.note)
        return list(row.messages)

    def accept(self, index: int) -> None:
        """Keep a row as it is shown, with an earlier edit."""
        if self.decision(self.rows[index]) != "edit":
            self.store.reviews.set(self.rows[index].id, "accept")

    def reject(self, index: int, note: str = "") -> None:
        """Leave a row out."""
        self.store.reviews.set(self.rows[index].id, "reject", note)

    def edit(self, index: int, contents: Sequence[str]) -> None:
        """Keep a row with other words. A row without changes is accepted.

        Raises:
            DataError: a message is empty, or there are too few or too many.
        """
        row = self.rows[index]
        if len(contents) != len(row.messages):
            raise DataError(f"row {row.id}: got {len(contents)} messages, expected {len(row.messages)}")
        if empty := [role for (role, _), content in zip(row.messages, contents, strict=True) if not content.strip()]:
            raise DataError(f"row {row.id}: the message of the {empty[0]} is empty; write something, or reject the row")
        messages = [[role, content.strip()] for (role, _), content in zip(row.messages, contents, strict=True)]
        if messages == [list(pair) for pair in self.messages(index)]:
            self.accept(index)
        else:
            self.store.reviews.set(row.id, "edit", json.dumps(messages, ensure_ascii=False))

    def summary(self) -> str:
        """Counts of the decisions so far."""
        ids = {row.id for row in self.rows}
        counts = Counter(review.decision for row_id, review in self.store.reviews.all().items() if row_id in ids)
        decisions = ", ".join(f"{counts[decision]} {decision}ed" for decision in DECISIONS)
        return f"{counts.total()} of {len(self.rows)} rows reviewed: {decisions}"
