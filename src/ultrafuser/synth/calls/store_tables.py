"""The tables of the store of calls: how they are made, how sums are kept, and how one file takes over another's."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

CALL = (
    "key, stage, domain, item, role, sample, status, reason, prompt_tokens, completion_tokens, cost, worker, at, text"
)
_TABLES = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE calls (key TEXT PRIMARY KEY, stage TEXT, domain TEXT, item TEXT, role TEXT, sample INTEGER,"
    " status TEXT, reason TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, cost INTEGER, worker TEXT, at REAL, text TEXT)",
    "CREATE INDEX calls_by_stage ON calls (stage, domain, status)",
    "CREATE INDEX calls_by_time ON calls (at)",
    # expires 0: nobody's; lost: cost of tries that broke off and may have been billed all the same
    "CREATE TABLE leases (key TEXT PRIMARY KEY, worker TEXT, expires REAL, reserved INTEGER, lost INTEGER)",
    # replies that another file had a better one for, or the same one earlier: paid for, too
    "CREATE TABLE dropped (worker TEXT, key TEXT, cost INTEGER, PRIMARY KEY (worker, key))",
    "CREATE TABLE verdicts (key TEXT PRIMARY KEY, reason TEXT)",  # of code with its tests; empty: they pass
    "CREATE TABLE reviews (row TEXT PRIMARY KEY, decision TEXT, note TEXT, at REAL)",
    "CREATE TABLE money (spent INTEGER, reserved INTEGER, tokens INTEGER)",
    "INSERT INTO money VALUES (0, 0, 0)",
)
# what a row of each table adds to the sums: spent, reserved, tokens
_SUMS = {
    "calls": ("{0}.cost", "0", "({0}.prompt_tokens + {0}.completion_tokens)"),
    "dropped": ("{0}.cost", "0", "0"),
    "leases": ("{0}.lost", "{0}.reserved", "0"),
}


@dataclass(frozen=True)
class Merged:
    """What another file brought: calls that were missing here, and calls that both had asked."""

    added: int
    twice: int


def create_tables(db: sqlite3.Connection) -> None:
    """All tables, and triggers that keep the sums right whatever changes; inside a transaction."""
    for statement in _TABLES:
        db.execute(statement)
    for table, (spent, reserved, tokens) in _SUMS.items():
        for event, sign in (("INSERT", "+NEW"), ("DELETE", "-OLD"), ("UPDATE", "+NEW-OLD")):
            db.execute(
                f"CREATE TRIGGER {table}_{event} AFTER {event} ON {table} BEGIN UPDATE money SET "
                f"spent = spent {_signed(spent, sign)}, reserved = reserved {_signed(reserved, sign)}, "
                f"tokens = tokens {_signed(tokens, sign)}; END"
            )


def merge(db: sqlite3.Connection) -> Merged:
    """`other` into `main`, inside a transaction."""
    both = "other.calls AS theirs JOIN main.calls AS ours ON theirs.key = ours.key AND theirs.worker <> ours.worker"
    better = (
        "(theirs.status > ours.status OR theirs.status = ours.status AND "
        "(theirs.text, theirs.reason) < (ours.text, ours.reason))"
    )
    drop = "INSERT OR IGNORE INTO main.dropped SELECT {0}.worker, {0}.key, {0}.cost FROM " + both + " WHERE "
    twice = db.execute(f"SELECT count(*) FROM {both}").fetchone()[0]
    before = db.execute("SELECT count(*) FROM main.calls").fetchone()[0]
    db.execute(drop.format("theirs") + f"NOT {better}")
    db.execute(drop.format("ours") + better)
    db.execute(f"DELETE FROM main.calls WHERE key IN (SELECT ours.key FROM {both} WHERE {better})")
    db.execute(  # what is in both files because one was copied
        f"INSERT INTO main.calls ({CALL}) SELECT {CALL} FROM other.calls WHERE true "
        "ON CONFLICT (key) DO UPDATE SET cost = max(cost, excluded.cost) WHERE worker = excluded.worker"
    )
    db.execute("INSERT OR IGNORE INTO main.dropped SELECT worker, key, cost FROM other.dropped")
    db.execute(  # where two differ, the same one stays whichever file comes first
        "INSERT INTO main.verdicts SELECT key, reason FROM other.verdicts WHERE true "
        "ON CONFLICT (key) DO UPDATE SET reason = min(reason, excluded.reason)"
    )
    db.execute(
        "INSERT INTO main.leases SELECT key, '', 0, 0, reserved + lost FROM other.leases WHERE reserved + lost > 0 "
        "ON CONFLICT (key) DO UPDATE SET lost = max(lost, excluded.lost)"
    )
    db.execute(
        "INSERT INTO main.reviews SELECT row, decision, note, at FROM other.reviews WHERE true ON CONFLICT (row) "
        "DO UPDATE SET decision = excluded.decision, note = excluded.note, at = excluded.at WHERE excluded.at > at"
    )
    return Merged(db.execute("SELECT count(*) FROM main.calls").fetchone()[0] - before, twice)


def _signed(column: str, sign: str) -> str:
    """`{0}.cost` and `+NEW-OLD` -> `+ NEW.cost - OLD.cost`."""
    parts = sign.replace("+", " +").replace("-", " -").split()
    return " ".join(f"{part[0]} {column.format(part[1:])}" for part in parts)
