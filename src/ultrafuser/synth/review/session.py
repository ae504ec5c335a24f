"""What a reader decides on rows: a desk that shows them in order and writes each decision back to the store at once."""

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

SHOWN = ("not reviewed", "all", *(f"{decision}ed" for decision in DECISIONS))
ALL = "all domains"


class Desk:
    """The rows of a data set, and what was decided on them.

    Attributes:
        rows: as the data set has them, in its order; an edited row is shown as it was edited.
    """

    def __init__(self, rows: Sequence[Row], store: CallStore) -> None:
        self.rows, self.store = list(rows), store
        self.domains = (ALL, *dict.fromkeys(row.domain for row in rows))

    @classmethod
    def open(cls, recipe: SynthRecipe) -> Desk:
        """The desk of a recipe's data set.

        Raises:
            DataError: there is no data set, or no store, yet.
        """
        folder = Path(recipe.output)
        if not (folder / ROWS).is_file():
            raise DataError(f"{folder / ROWS}: no such file; run `ultrafuser synth RECIPE` to its end first")
        return cls(load_rows(str(folder / ROWS)), CallStore(folder / STORE, shared=True))

    def decision(self, row: Row) -> str:
        """`accept`, `edit`, `reject`, or empty: not reviewed yet."""
        found = self.store.reviews.get(row.id)
        return found.decision if found is not None else ""

    def why(self, row: Row) -> str:
        """Why a row was rejected, where the reader said so."""
        found = self.store.reviews.get(row.id)
        return found.note if found is not None and found.decision == "reject" else ""

    def shown(self, domain: str = ALL, what: str = SHOWN[0]) -> list[int]:
        """The places of the rows of a domain and state."""
        decided = {id: f"{review.decision}ed" for id, review in self.store.reviews.all().items()}
        return [
            place
            for place, row in enumerate(self.rows)
            if domain in (ALL, row.domain) and (what == SHOWN[1] or decided.get(row.id, SHOWN[0]) == what)
        ]

    def messages(self, place: int) -> list[tuple[str, str]]:
        """The messages of a row, as a reader left them."""
        row = self.rows[place]
        found = self.store.reviews.get(row.id)
        if found is not None and found.decision == "edit":
            row = edited(row, found.note)
        return list(row.messages)

    def accept(self, place: int) -> None:
        """Keep a row as it is shown, an edit of before included."""
        if self.decision(self.rows[place]) != "edit":
            self.store.reviews.set(self.rows[place].id, "accept")

    def reject(self, place: int, why: str = "") -> None:
        """Leave a row out."""
        self.store.reviews.set(self.rows[place].id, "reject", why)

    def edit(self, place: int, contents: Sequence[str]) -> None:
        """Keep a row with other words; where nothing was changed, it is accepted.

        Raises:
            DataError: a message without words, or another number of messages.
        """
        row = self.rows[place]
        if len(contents) != len(row.messages):
            raise DataError(f"row {row.id}: got {len(contents)} messages, expected {len(row.messages)}")
        if empty := [role for (role, _), content in zip(row.messages, contents, strict=True) if not content.strip()]:
            raise DataError(f"row {row.id}: the message of the {empty[0]} is empty; write something, or reject the row")
        messages = [[role, content.strip()] for (role, _), content in zip(row.messages, contents, strict=True)]
        if messages == [list(pair) for pair in self.messages(place)]:
            self.accept(place)
        else:
            self.store.reviews.set(row.id, "edit", json.dumps(messages, ensure_ascii=False))

    def summary(self) -> str:
        """How far the reader is."""
        ids = {row.id for row in self.rows}
        counts = Counter(review.decision for id, review in self.store.reviews.all().items() if id in ids)
        decided = ", ".join(f"{counts[decision]} {decision}ed" for decision in DECISIONS)
        return f"{counts.total()} of {len(self.rows)} rows reviewed: {decided}"
