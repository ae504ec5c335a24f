"""Decisions of readers on the rows of a data set, in the store."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ultrafuser.synth.calls.database import Database


@dataclass(frozen=True)
class Review:
    """A reader's decision on a row of the data set."""

    decision: str
    note: str
    at: float


class Reviews:
    """The decisions in a store, by the id of the row."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, row_id: str) -> Review | None:
        """The decision on a row. None: not reviewed."""
        rows = self._database.read("SELECT decision, note, at FROM reviews WHERE row = ?", (row_id,))
        return Review(*rows[0]) if rows else None

    def all(self) -> dict[str, Review]:
        """Every decision, by row id."""
        rows = self._database.read("SELECT row, decision, note, at FROM reviews ORDER BY row")
        return {row_id: Review(*columns) for row_id, *columns in rows}

    def set(self, row_id: str, decision: str, note: str = "") -> None:
        """Store a decision. It replaces an earlier one on the same row."""
        with self._database.transaction() as connection:
            values = (row_id, decision, note, time.time())
            connection.execute("INSERT OR REPLACE INTO reviews VALUES (?, ?, ?, ?)", values)
