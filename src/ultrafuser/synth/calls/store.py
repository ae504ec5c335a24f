"""Every call to a model in one SQLite file, which several processes may share: what was stored survives a kill.

A call is claimed before it is sent: the claim is a lease that its worker renews while it lives, and it sets aside the
most that the call may cost. The reply, its cost and the end of the claim are one transaction.
"""

from __future__ import annotations

import math
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser.errors import DataError
from ultrafuser.synth.calls.request import CUT_OFF, Request, Response
from ultrafuser.synth.calls.store_tables import CALL, Merged, create_tables, merge

FORMAT = 1  # of the file
BUSY_S = 60.0  # that a process waits for another one's transaction
_MARK = 0x55465359  # "UFSY": application_id of our files
_NANO = 1_000_000_000  # money is counted in whole billionths of a dollar, so that sums are exact
_KEYS_AT_ONCE = 500


@dataclass(frozen=True)
class Claim:
    """What became of the keys that a worker wanted.

    Attributes:
        taken: its own now.
        done: answered already.
        busy: another live worker's.
        dear: left alone, since the budget may not last for them.
    """

    taken: list[str]
    done: list[str]
    busy: list[str]
    dear: list[str]


@dataclass(frozen=True)
class Count:
    """Calls that ended alike; `kind`: of their reason, without its detail."""

    stage: str
    domain: str
    status: str
    kind: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float


@dataclass(frozen=True)
class Review:
    """What a reader decided on a row of the data set."""

    decision: str
    note: str
    at: float


class CallStore:
    """Replies, failures, claims and reviews. One object may be used from several threads.

    Raises:
        DataError: the file is no store, of another version or recipe, or cannot be read or written.
    """

    def __init__(self, file: Path, identity: str | None = None) -> None:
        """
        Args:
            identity: of the recipe whose calls these are; None: whichever there is, in a file that must exist.
        """
        self.file = file
        self._lock = threading.RLock()
        self._db = self._connect(new=identity is not None)
        try:
            self._prepare(identity)
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> CallStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # ---------------------------------------------------------------- replies

    def outcome(self, key: str) -> Response | None:
        """What came of a question; None: it was not answered yet."""
        sql = "SELECT status, text, reason, prompt_tokens, completion_tokens, cost FROM calls WHERE key = ?"
        found = self._read(sql, (key,))
        if not found:
            return None
        status, text, reason, prompt_tokens, completion_tokens, cost = found[0]
        return Response(status, text, reason, prompt_tokens, completion_tokens, cost / _NANO)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those without an outcome, in their order."""
        wanted = list(keys)
        done = self._known("SELECT key FROM calls", wanted)
        return [key for key in wanted if key not in done]

    def claim(
        self, ceilings: Mapping[str, float], worker: str, lease_s: float, budget_usd: float | None = None
    ) -> Claim:
        """Take calls for a worker, in order, as far as the budget lasts.

        Args:
            ceilings: key -> dollars that the call may cost at most; they are set aside until it ends.
            budget_usd: that the whole file may cost, what is set aside included; None: no limit.
        """
        now, keys = time.time(), list(ceilings)
        out = Claim([], [], [], [])
        with self._writing() as db:
            done = self._known("SELECT key FROM calls", keys)
            held = self._known("SELECT key, worker, expires FROM leases", keys)
            left = self._left(budget_usd)
            for number, key in enumerate(keys):
                if key in done:
                    out.done.append(key)
                elif key in held and held[key][0] != worker and _is_live(held[key][0], held[key][1], now):
                    out.busy.append(key)
                elif (cost := _at_most(ceilings[key])) > left:
                    out.dear.extend(keys[number:])
                    break
                else:
                    left -= cost
                    out.taken.append(key)
                    db.execute(  # what a dead worker had set aside may have been billed
                        "INSERT INTO leases VALUES (?, ?, ?, ?, 0) ON CONFLICT (key) DO UPDATE SET "
                        "worker = excluded.worker, expires = excluded.expires, lost = lost + reserved, reserved = excluded.reserved",
                        (key, worker, now + lease_s, cost),
                    )
        return out

    def renew(self, worker: str, lease_s: float) -> None:
        """Keep a worker's claims for another while."""
        with self._writing() as db:
            db.execute("UPDATE leases SET expires = ? WHERE worker = ?", (time.time() + lease_s, worker))

    def ask_again(self, key: str, worker: str, ceiling_usd: float, budget_usd: float | None = None) -> bool:
        """Count a try that broke off as spent, and set the same aside for the next one.

        Returns:
            False where the budget may not last for it, or the claim is lost: the key is free again.
        """
        with self._writing() as db:
            db.execute(
                "UPDATE leases SET lost = lost + reserved, reserved = 0 WHERE key = ? AND worker = ?", (key, worker)
            )
            cost = _at_most(ceiling_usd)
            if cost > self._left(budget_usd):
                db.execute("UPDATE leases SET worker = '', expires = 0 WHERE key = ? AND worker = ?", (key, worker))
                return False
            again = db.execute("UPDATE leases SET reserved = ? WHERE key = ? AND worker = ?", (cost, key, worker))
            return again.rowcount == 1

    def finish(self, request: Request, outcome: Response, worker: str = "") -> None:
        """Keep what came of a question, and end the claim on it. An outcome that is there already stays."""
        cost = round(outcome.cost_usd * _NANO)
        text, reason = _storable(outcome.text), _storable(outcome.reason)
        with self._writing() as db:
            own = "FROM leases WHERE key = ? AND worker = ?"
            if found := db.execute(f"SELECT lost {own}", (request.key, worker)).fetchone():
                cost += found[0]
                db.execute(f"DELETE {own}", (request.key, worker))
            db.execute(
                f"INSERT INTO calls ({CALL}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET cost = cost + excluded.cost",
                (request.key, request.stage, request.domain, request.item, request.role, request.sample, outcome.status, reason,
                 outcome.prompt_tokens, outcome.completion_tokens, cost, worker, time.time(), text),
            )  # fmt: skip

    def forget_failures(self) -> int:
        """Have calls asked again that failed or were cut off; what they cost stays spent. How many there were."""
        which, values = "status = 'failed' OR reason = ?", (CUT_OFF,)
        with self._writing() as db:
            db.execute(
                f"INSERT INTO dropped SELECT worker, key, cost FROM calls WHERE {which} "
                "ON CONFLICT (worker, key) DO UPDATE SET cost = cost + excluded.cost",
                values,
            )
            return db.execute(f"DELETE FROM calls WHERE {which}", values).rowcount

    def release(self, worker: str, sent: Container[str] | None = None) -> None:
        """Give up a worker's claims.

        Args:
            sent: keys of the calls that were sent, which may be billed, so that what was set aside for them counts as
                spent; None: all were.
        """
        with self._writing() as db:
            own = db.execute("SELECT key FROM leases WHERE worker = ?", (worker,)).fetchall()
            unsent = [key for key in own if sent is not None and key[0] not in sent]
            db.executemany("UPDATE leases SET reserved = 0 WHERE key = ?", unsent)
            db.execute(
                "UPDATE leases SET worker = '', expires = 0, lost = lost + reserved, reserved = 0 WHERE worker = ?",
                (worker,),
            )
            db.execute("DELETE FROM leases WHERE expires = 0 AND lost = 0")

    def under_way(self) -> int:
        """Claims of live workers, whichever process they run in."""
        now = time.time()
        claims = self._read("SELECT worker, expires FROM leases")
        return sum(_is_live(worker, expires, now) for worker, expires in claims)

    # ---------------------------------------------------------------- sums

    def spent_usd(self) -> float:
        """Dollars spent: replies, and tries that broke off and may have been billed."""
        return self._read("SELECT spent FROM money")[0][0] / _NANO

    def reserved_usd(self) -> float:
        """Dollars set aside for calls under way."""
        return self._read("SELECT reserved FROM money")[0][0] / _NANO

    def tokens(self) -> int:
        """Tokens read and written by the calls that are stored."""
        return self._read("SELECT tokens FROM money")[0][0]

    def counts(self) -> list[Count]:
        """Calls by stage, domain and how they ended."""
        kind_of = "CASE instr(reason, ':') WHEN 0 THEN reason ELSE substr(reason, 1, instr(reason, ':') - 1) END"
        sums = "count(*), sum(prompt_tokens), sum(completion_tokens), sum(cost)"
        groups = "GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"
        rows = self._read(f"SELECT stage, domain, status, {kind_of}, {sums} FROM calls {groups}")
        return [
            Count(stage, domain, status, kind, calls, prompt_tokens, completion_tokens, cost / _NANO)
            for stage, domain, status, kind, calls, prompt_tokens, completion_tokens, cost in rows
        ]

    def pace(self, window_s: float = 600.0) -> float | None:
        """Calls answered a second, over the last while; None where there were none."""
        now = time.time()
        calls, first = self._read("SELECT count(*), min(at) FROM calls WHERE at > ?", (now - window_s,))[0]
        return calls / max(now - first, 1.0) if calls else None

    # ---------------------------------------------------------------- reviews

    def review(self, row_id: str) -> Review | None:
        """What was decided on a row; None: nothing yet."""
        found = self._read("SELECT decision, note, at FROM reviews WHERE row = ?", (row_id,))
        return Review(*found[0]) if found else None

    def reviews(self) -> dict[str, Review]:
        """All decisions, by row."""
        found = self._read("SELECT row, decision, note, at FROM reviews ORDER BY row")
        return {row: Review(*rest) for row, *rest in found}

    def set_review(self, row_id: str, decision: str, note: str = "") -> None:
        """Keep a decision, in place of an earlier one."""
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO reviews VALUES (?, ?, ?, ?)", (row_id, decision, note, time.time()))

    # ---------------------------------------------------------------- verdicts on code

    def verdicts(self, keys: Iterable[str]) -> dict[str, str]:
        """Key -> why code is left out, empty where its tests pass; of those that were run."""
        found = self._known("SELECT key, reason FROM verdicts", list(keys))
        return {key: reason for key, (reason,) in found.items()}

    def keep_verdicts(self, verdicts: Mapping[str, str]) -> None:
        """Keep what came of running tests; a verdict that is there already stays."""
        with self._writing() as db:
            db.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", verdicts.items())

    # ---------------------------------------------------------------- joining files

    def merge(self, other: Path) -> Merged:
        """Take over all that another file of this recipe holds; doing so again, or in another order, changes nothing.

        Where both have an answer, one that is no failure stays, and of two such the first in alphabetical order.

        Raises:
            DataError: not a store of the same version and recipe, or in use.
        """
        with CallStore(other) as theirs:
            if theirs.identity() != self.identity():
                raise DataError(f"{other}: holds the calls of the recipe {theirs.identity()!r}, expected "
                                f"{self.identity()!r} as in {self.file}; join files of one recipe")  # fmt: skip
            if busy := theirs.under_way():
                raise DataError(f"{other}: {busy} calls are under way in it, expected a file that no run uses; wait for "
                                "the run to end, or stop it")  # fmt: skip
        with self._lock:
            self._db.execute("ATTACH DATABASE ? AS other", (str(other),))
            try:
                with self._writing() as db:
                    return merge(db)
            finally:
                self._db.execute("DETACH DATABASE other")

    def identity(self) -> str:
        """Of the recipe whose calls these are."""
        return self._read("SELECT value FROM facts WHERE name = 'identity'")[0][0]

    # ---------------------------------------------------------------- the file

    def _connect(self, new: bool) -> sqlite3.Connection:
        if not new and not self.file.is_file():
            raise DataError(f"{self.file}: no such file, expected the calls of a run; start one first")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            return sqlite3.connect(self.file, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.OperationalError) as error:
            raise DataError(
                f"{self.file}: cannot be opened ({error}); expected a place that can be written to"
            ) from error

    def _prepare(self, identity: str | None) -> None:
        try:
            # the tables first: whoever makes them sets the rest in the same transaction
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            version, mark = self._pragma("user_version"), self._pragma("application_id")
        except sqlite3.OperationalError as error:
            raise self._error(error) from error
        except sqlite3.DatabaseError as error:
            raise self._foreign(str(error)) from error
        if tables and mark != _MARK:
            raise self._foreign("another program's database")
        if tables and version != FORMAT:
            next_step = "upgrade ultrafuser" if version > FORMAT else "move the file away, or use the older ultrafuser"
            raise DataError(f"{self.file}: written in version {version} of the format, expected {FORMAT}; {next_step}")
        if not tables and identity is None:
            raise self._foreign("an empty file")
        self._use_wal()
        if identity is not None:
            self._create(identity)
            if (before := self.identity()) != identity:
                raise DataError(f"{self.file}: holds the calls of another recipe ({before!r}), expected {identity!r}; "
                                "choose another output folder, or go back to that recipe")  # fmt: skip

    def _create(self, identity: str) -> None:
        """The tables, unless they are there: another process may be doing the same."""
        with self._writing() as db:
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return
            create_tables(db)
            db.execute("INSERT INTO facts VALUES ('identity', ?)", (identity,))
            db.execute(f"PRAGMA application_id = {_MARK}")
            db.execute(f"PRAGMA user_version = {FORMAT}")

    def _use_wal(self) -> None:
        """Readers never wait, and a commit needs no fsync: it survives a kill, though not always a power cut."""
        until = time.monotonic() + BUSY_S
        while True:  # the change of mode does not wait for other processes by itself
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise self._error(error) from error
                time.sleep(0.05)

    def _pragma(self, name: str) -> int:
        return self._db.execute(f"PRAGMA {name}").fetchone()[0]

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, begun with the lock that it needs in the end, so that no two processes block each other."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._error(error) from error
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            try:
                with closing(self._db.execute(sql, values)) as rows:
                    return rows.fetchall()
            except sqlite3.Error as error:
                raise self._error(error) from error

    def _known(self, sql: str, keys: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """Key -> the other columns, of the rows with one of these keys."""
        found: dict[str, tuple[Any, ...]] = {}
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            part = keys[start : start + _KEYS_AT_ONCE]
            rows = self._read(f"{sql} WHERE key IN ({', '.join('?' * len(part))})", part)
            found |= {row[0]: row[1:] for row in rows}
        return found

    def _left(self, budget_usd: float | None) -> float:
        if budget_usd is None:
            return math.inf
        spent, reserved = self._read("SELECT spent, reserved FROM money")[0]
        return math.floor(budget_usd * _NANO) - spent - reserved

    def _foreign(self, problem: str) -> DataError:
        return DataError(f"{self.file}: not a file of calls ({problem}); move it away, or choose another output folder")

    def _error(self, error: sqlite3.Error) -> DataError:
        text = str(error)
        if "locked" in text:
            next_step = "see what else uses it; it must not lie on a network file system"
        elif "full" in text:
            next_step = "make room on the disk and run again: all that was stored is kept"
        elif "malformed" in text or "not a database" in text:
            next_step = "the file is damaged; `sqlite3 FILE .recover` saves what it can"
        else:
            next_step = "see that file, folder and disk can be written to, and run again: all that was stored is kept"
        return DataError(f"{self.file}: cannot be used ({text}); {next_step}")


def new_worker() -> str:
    """A name that no other worker has, and from which others on this machine see whether its process lives."""
    return f"{_machine()}|{os.getpid()}|{uuid.uuid4().hex[:12]}"


def _machine() -> str:
    """Where process ids mean the same: containers of one host have the same name, perhaps, but not the same ids."""
    try:
        ids = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        ids = 0
    return f"{socket.gethostname()}|{ids}"


def _is_live(worker: str, expires: float, now: float) -> bool:
    """Whether a claim still holds: neither given up nor run out, and its process not known to be dead."""
    if expires <= now:
        return False
    machine, _, rest = worker.rpartition("|")[0].rpartition("|")
    if machine != _machine() or not rest.isdecimal() or os.name != "posix":
        return True
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's: it lives
        return True
    return True


def _at_most(usd: float) -> int:
    return math.ceil(usd * _NANO)


def _storable(text: str) -> str:
    """The text without halves of characters, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
