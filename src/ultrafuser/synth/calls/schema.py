"""The tables of a store: their creation and migration, the triggers that sum up money, and the merging of two stores."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

FORMAT = 2  # version of the file
MARK = 0x55465359  # "UFSY": application_id of our files

CALL = "key, stage, domain, item, role, sample, status, reason, prompt_tokens, completion_tokens, cost, run, at, text"
_MONEY_TABLES = (
    # Requests without an answer so far, and the most that each may cost. A run that starts moves them to `lost`.
    "CREATE TABLE sent (key TEXT PRIMARY KEY, ceiling INTEGER)",
    # Tries that brought no answer and may have been billed all the same, until their request is answered.
    "CREATE TABLE lost (key TEXT PRIMARY KEY, cost INTEGER)",
)
_TABLES = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE calls (key TEXT PRIMARY KEY, stage TEXT, domain TEXT, item TEXT, role TEXT, sample INTEGER,"
    " status TEXT, reason TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, cost INTEGER, run TEXT, at REAL, text TEXT)",
    "CREATE INDEX calls_by_stage ON calls (stage, domain, status)",
    "CREATE INDEX calls_by_time ON calls (at)",
    # Answers that were paid for and are not used: a merged file had a better one, or they are asked again.
    "CREATE TABLE dropped (run TEXT, key TEXT, cost INTEGER, PRIMARY KEY (run, key))",
    # Results of running code with its tests. Empty: they pass.
    "CREATE TABLE verdicts (key TEXT PRIMARY KEY, reason TEXT)",
    "CREATE TABLE reviews (row TEXT PRIMARY KEY, decision TEXT, note TEXT, at REAL)",
    "CREATE TABLE money (spent INTEGER, reserved INTEGER, tokens INTEGER)",
    "INSERT INTO money VALUES (0, 0, 0)",
)
# What one row of each table adds to the sums: spent, reserved, tokens.
_SUMS = {
    "calls": ("{0}.cost", "0", "({0}.prompt_tokens + {0}.completion_tokens)"),
    "dropped": ("{0}.cost", "0", "0"),
    "sent": ("0", "{0}.ceiling", "0"),
    "lost": ("{0}.cost", "0", "0"),
}


def create_tables(connection: sqlite3.Connection, identity: str) -> None:
    """All tables of a new file. Does nothing if another process was first. Call it inside a transaction."""
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return
    for statement in (*_TABLES, *_MONEY_TABLES):
        connection.execute(statement)
    for table in _SUMS:
        _keep_sums(connection, table)
    connection.execute("INSERT INTO facts VALUES ('identity', ?)", (identity,))
    connection.execute(f"PRAGMA application_id = {MARK}")
    connection.execute(f"PRAGMA user_version = {FORMAT}")


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a file of version 1 to this version. Call it inside a transaction."""
    if connection.execute("PRAGMA user_version").fetchone()[0] != 1:
        return
    # Version 1 had leases that several processes held on calls, with the columns `reserved` and `lost`.
    for statement in _MONEY_TABLES:
        connection.execute(statement)
    for table in ("sent", "lost"):
        _keep_sums(connection, table)
    # The process that held a lease is gone: what it reserved may have been billed.
    connection.execute("INSERT INTO lost SELECT key, reserved + lost FROM leases WHERE reserved + lost > 0")
    # Deleting row by row runs the triggers, which take the leases out of the sums.
    connection.execute("DELETE FROM leases")
    connection.execute("DROP TABLE leases")
    for table in ("calls", "dropped"):
        connection.execute(f"ALTER TABLE {table} RENAME COLUMN worker TO run")
    connection.execute(f"PRAGMA user_version = {FORMAT}")


def _keep_sums(connection: sqlite3.Connection, table: str) -> None:
    """Triggers that add each change of a table to the sums in `money`."""
    spent, reserved, tokens = _SUMS[table]
    for event, change in (("INSERT", "+ {NEW}"), ("DELETE", "- {OLD}"), ("UPDATE", "+ {NEW} - {OLD}")):
        terms = [change.format(NEW=sums.format("NEW"), OLD=sums.format("OLD")) for sums in (spent, reserved, tokens)]
        connection.execute(
            f"CREATE TRIGGER {table}_{event} AFTER {event} ON {table} BEGIN UPDATE money SET "
            f"spent = spent {terms[0]}, reserved = reserved {terms[1]}, tokens = tokens {terms[2]}; END"
        )


# ---------------------------------------------------------------- merging


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
