"""Verdicts on generated code that was run with its tests, in the store, so that code runs once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ultrafuser.synth.calls.database import Database


class Verdicts:
    """Key of an answer with its tests -> why the answer is rejected. Empty: the tests pass."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """The verdicts that are stored for these keys."""
        rows = self._database.read_keys("SELECT key, reason FROM verdicts", list(keys))
        return {key: reason for key, (reason,) in rows.items()}

    def add(self, verdicts: Mapping[str, str]) -> None:
        """Store verdicts. One that is stored already stays."""
        with self._database.transaction() as connection:
            connection.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", verdicts.items())
