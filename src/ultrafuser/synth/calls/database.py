"""The SQLite file of a synthesis: how it is opened, locked, read and written, and errors that name it."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from ultrafuser.data.locking import exclusive_lock
from ultrafuser.errors import DataError
from ultrafuser.synth.calls.schema import FORMAT, MARK, create_tables, migrate

BUSY_S = 60.0  # how long a transaction waits for that of another process
_KEYS_PER_QUERY = 500  # SQLite limits the parameters of a statement


class Database:
    """A connection to the file. Several threads may share it.

    Raises:
        DataError: the file is used by another run, is not a store, belongs to another version or recipe, or cannot be
            read or written.
    """

    def __init__(self, file: Path, identity: str | None = None, *, shared: bool = False) -> None:
        """
        Args:
            identity: of the recipe whose calls the file holds. None: the file must exist and may be of any recipe.
            shared: read and review beside a run. Otherwise the file is locked against a second process.
        """
        self.file = file
        self._lock = threading.RLock()
        if identity is None and not file.is_file():
            raise DataError(f"{file}: no such file, expected the calls of a run; start one first")
        with ExitStack() as resources:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                if not shared:
                    resources.enter_context(exclusive_lock(file.parent, "synthesis", f"{file.name}.lock"))
                self.connection = sqlite3.connect(file, BUSY_S, isolation_level=None, check_same_thread=False)
            except (OSError, sqlite3.OperationalError) as error:
                raise DataError(
                    f"{file}: cannot be opened ({error}); expected a folder that can be written to"
                ) from error
            resources.callback(self.connection.close)
            self._prepare(identity)
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Close the file and give up its lock."""
        with self._lock:
            self._resources.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction. It takes the write lock at once, so that two processes cannot block each other.

        Raises:
            DataError: the file cannot be written.
        """
        with self._lock:
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                yield self.connection
                self.connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._error(error) from error
            finally:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """All rows of a query.

        Raises:
            DataError: the file cannot be read.
        """
        with self._lock:
            try:
                with closing(self.connection.execute(sql, values)) as rows:
                    return rows.fetchall()
            except sqlite3.Error as error:
                raise self._error(error) from error

    def read_keys(self, sql: str, keys: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """Key -> the other columns, for the rows that have one of these keys."""
        rows: dict[str, tuple[Any, ...]] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            batch = keys[start : start + _KEYS_PER_QUERY]
            query = f"{sql} WHERE key IN ({', '.join('?' * len(batch))})"
            rows |= {row[0]: row[1:] for row in self.read(query, batch)}
        return rows

    @contextmanager
    def attached(self, other: Path) -> Iterator[None]:
        """A second file as the schema `other`."""
        with self._lock:
            self.connection.execute("ATTACH DATABASE ? AS other", (str(other),))
            try:
                yield
            finally:
                self.connection.execute("DETACH DATABASE other")

    def identity(self) -> str:
        """Identity of the recipe whose calls the file holds."""
        return self.read("SELECT value FROM facts WHERE name = 'identity'")[0][0]

    def _prepare(self, identity: str | None) -> None:
        """Check what the file is, then create or migrate its tables."""
        try:
            queries = ("SELECT count(*) FROM sqlite_master", "PRAGMA user_version", "PRAGMA application_id")
            has_tables, version, mark = (self.connection.execute(query).fetchone()[0] for query in queries)
        except sqlite3.OperationalError as error:
            raise self._error(error) from error
        except sqlite3.DatabaseError as error:
            raise self._not_a_store(str(error)) from error
        # An existing file must be ours, and of a version that can be read.
        if has_tables and mark != MARK:
            raise self._not_a_store("another program's database")
        if has_tables and not 1 <= version <= FORMAT:
            next_step = "upgrade ultrafuser" if version > FORMAT else "move the file away, or use the older ultrafuser"
            raise DataError(f"{self.file}: written in version {version} of the format, expected {FORMAT}; {next_step}")
        if not has_tables and identity is None:
            raise self._not_a_store("an empty file")
        # With WAL readers never wait, and a commit needs no fsync: it survives a kill, though not always a power cut.
        deadline = time.monotonic() + BUSY_S
        while True:  # SQLite does not wait for other processes when it changes this mode
            try:
                self.connection.execute("PRAGMA journal_mode = WAL")
                self.connection.execute("PRAGMA synchronous = NORMAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise self._error(error) from error
                time.sleep(0.05)
        # A reader may do the same at once, so both steps check again inside the transaction.
        with self.transaction() as connection:
            if identity is not None:
                create_tables(connection, identity)
            migrate(connection)
        if identity is not None and (stored := self.identity()) != identity:
            raise DataError(
                f"{self.file}: holds the calls of another recipe ({stored!r}), expected {identity!r}; "
                "choose another output folder, or go back to that recipe"
            )

    def _not_a_store(self, problem: str) -> DataError:
        return DataError(f"{self.file}: not a file of calls ({problem}); move it away, or choose another output folder")

    def _error(self, error: sqlite3.Error) -> DataError:
        text = str(error)
        if "locked" in text:
            next_step = "see what else uses it; it must not lie on a network file system"
        elif "full" in text:
            next_step = "free disk space and run again: stored answers are kept"
        elif "malformed" in text or "not a database" in text:
            next_step = "the file is damaged; `sqlite3 FILE .recover` saves what it can"
        else:
            next_step = (
                "check that the file, its folder and the disk can be written, and run again: stored answers are kept"
            )
        return DataError(f"{self.file}: cannot be used ({text}); {next_step}")
