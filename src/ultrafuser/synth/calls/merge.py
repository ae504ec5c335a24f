"""Merging the store of one shard into another store."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from ultrafuser.synth.calls.schema import CALL


@dataclass(frozen=True)
class Merged:
    """Calls that a merged file added, and calls that both files had asked."""

    added: int
    duplicates: int


# Calls that both files asked on their own. A call with the same `run` is a copy, not a second request.
_BOTH = "other.calls AS theirs JOIN main.calls AS ours ON theirs.key = ours.key AND theirs.run <> ours.run"
# `ok` sorts after `failed`. Of two answers the first in alphabetical order stays, so that the order of files is irrelevant.
_THEIRS_IS_BETTER = "(theirs.status > ours.status OR theirs.status = ours.status AND (theirs.text, theirs.reason) < (ours.text, ours.reason))"


def merge(connection: sqlite3.Connection) -> Merged:
    """Take the schema `other` over into `main`, inside a transaction. Repeating it changes nothing."""
    duplicates = connection.execute(f"SELECT count(*) FROM {_BOTH}").fetchone()[0]
    calls_before = connection.execute("SELECT count(*) FROM main.calls").fetchone()[0]
    # 1. Of two answers to one request the worse one is dropped. Its cost still counts.
    drop = f"INSERT OR IGNORE INTO main.dropped SELECT {{0}}.run, {{0}}.key, {{0}}.cost FROM {_BOTH} WHERE "
    connection.execute(drop.format("theirs") + f"NOT {_THEIRS_IS_BETTER}")
    connection.execute(drop.format("ours") + _THEIRS_IS_BETTER)
    connection.execute(f"DELETE FROM main.calls WHERE key IN (SELECT ours.key FROM {_BOTH} WHERE {_THEIRS_IS_BETTER})")
    # 2. Calls that are missing here are added. A copy of a call keeps the higher cost of the two.
    connection.execute(
        f"INSERT INTO main.calls ({CALL}) SELECT {CALL} FROM other.calls WHERE true "
        "ON CONFLICT (key) DO UPDATE SET cost = max(cost, excluded.cost) WHERE run = excluded.run"
    )
    # 3. Costs without an answer: answers dropped there, and tries that broke off.
    connection.execute("INSERT OR IGNORE INTO main.dropped SELECT run, key, cost FROM other.dropped")
    connection.execute(
        "INSERT INTO main.lost SELECT key, cost FROM other.lost WHERE true "
        "ON CONFLICT (key) DO UPDATE SET cost = max(cost, excluded.cost)"
    )
    # 4. Verdicts: where two differ, the same one stays whichever file comes first.
    connection.execute(
        "INSERT INTO main.verdicts SELECT key, reason FROM other.verdicts WHERE true "
        "ON CONFLICT (key) DO UPDATE SET reason = min(reason, excluded.reason)"
    )
    # 5. Reviews: the later decision stays.
    connection.execute(
        "INSERT INTO main.reviews SELECT row, decision, note, at FROM other.reviews WHERE true ON CONFLICT (row) "
        "DO UPDATE SET decision = excluded.decision, note = excluded.note, at = excluded.at WHERE excluded.at > at"
    )
    calls_after = connection.execute("SELECT count(*) FROM main.calls").fetchone()[0]
    return Merged(calls_after - calls_before, duplicates)
