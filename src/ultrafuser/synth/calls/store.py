"""Every call to a model in one SQLite file: a stored answer survives a kill and is never requested again.

Before a request is sent, the most that it may cost is set aside in the table `sent`. The answer, its cost and the end of
that reservation are one transaction. If a run is killed, the next one counts what was sent as spent.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ultrafuser.errors import DataError
from ultrafuser.synth.calls.database import Database
from ultrafuser.synth.calls.request import CUT_OFF, Request, Response
from ultrafuser.synth.calls.schema import CALL, Merged, merge

_NANO = 1_000_000_000  # money is counted in whole billionths of a dollar, so that sums are exact
_ADD_LOST = "INSERT INTO lost SELECT key, ceiling FROM sent WHERE ceiling > 0{and_} ON CONFLICT (key) DO UPDATE SET cost = cost + excluded.cost"
_ALL_LOST, _ONE_LOST = _ADD_LOST.format(and_=""), _ADD_LOST.format(and_=" AND key = ?")


@dataclass(frozen=True)
class Count:
    """Calls with the same end. `kind` is the reason without its detail."""

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
    """A reader's decision on a row of the data set."""

    decision: str
    note: str
    at: float


class Reviews:
    """The decisions of readers, by the id of the row."""

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


class Verdicts:
    """Key of an answer with its tests -> why it is rejected. Empty: the tests pass. So code runs once."""

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


class CallStore:
    """Responses and their cost, with `reviews` and `verdicts` beside them. Several threads may share one object.

    Raises:
        DataError: as for `Database`.
    """

    def __init__(self, file: Path, identity: str | None = None, *, shared: bool = False) -> None:
        """
        Args:
            identity: of the recipe whose calls these are. None: the file must exist and may be of any recipe.
            shared: read and review beside a run. Otherwise the file is locked: a second process is refused.
        """
        self.file = file
        self._database = Database(file, identity, shared=shared)
        self.reviews, self.verdicts = Reviews(self._database), Verdicts(self._database)
        self._run = uuid.uuid4().hex  # stored with each call, to tell a copied call from a second request
        if not shared and self.under_way():
            self.release()  # a killed run had sent these, and they may be billed

    def __enter__(self) -> CallStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def identity(self) -> str:
        """Identity of the recipe whose calls these are."""
        return self._database.identity()

    # ---------------------------------------------------------------- responses

    def response(self, key: str) -> Response | None:
        """The response to a request. None: not answered yet."""
        sql = "SELECT status, text, reason, prompt_tokens, completion_tokens, cost / 1e9 FROM calls WHERE key = ?"
        rows = self._database.read(sql, (key,))
        return Response(*rows[0]) if rows else None

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without a response, in their order."""
        keys = list(keys)
        answered = self._database.read_keys("SELECT key FROM calls", keys)
        return [key for key in keys if key not in answered]

    def finish(self, request: Request, response: Response) -> None:
        """Store a response and end its reservation. A response that is stored already stays; both costs count."""
        cost = round(response.cost_usd * _NANO)
        # UTF-8 cannot hold lone surrogates.
        text, reason = (value.encode("utf-8", "replace").decode() for value in (response.text, response.reason))
        with self._database.transaction() as connection:
            # Tries that broke off belong to the cost of the call.
            if lost := connection.execute("SELECT cost FROM lost WHERE key = ?", (request.key,)).fetchone():
                cost += lost[0]
                connection.execute("DELETE FROM lost WHERE key = ?", (request.key,))
            connection.execute("DELETE FROM sent WHERE key = ?", (request.key,))
            row = [request.key, request.stage, request.domain, request.item, request.role, request.sample]
            row += [response.status, reason, response.prompt_tokens, response.completion_tokens]
            row += [cost, self._run, time.time(), text]
            connection.execute(
                f"INSERT INTO calls ({CALL}) VALUES ({', '.join('?' * len(row))}) "
                "ON CONFLICT (key) DO UPDATE SET cost = cost + excluded.cost",
                row,
            )

    def forget_failures(self) -> int:
        """Remove failed and truncated responses, so that they are requested again. Returns how many there were."""
        condition, values = "status = 'failed' OR reason = ?", (CUT_OFF,)
        with self._database.transaction() as connection:
            # Their cost stays spent.
            connection.execute(
                f"INSERT INTO dropped SELECT run, key, cost FROM calls WHERE {condition} "
                "ON CONFLICT (run, key) DO UPDATE SET cost = cost + excluded.cost",
                values,
            )
            return connection.execute(f"DELETE FROM calls WHERE {condition}", values).rowcount

    def merge(self, other: Path) -> Merged:
        """Take over everything in another file of this recipe. The order of files and repetitions do not matter.

        If both have a response, a success wins over a failure, and of two successes the first in alphabetical order.

        Raises:
            DataError: the file is not a store of this recipe, or a run is using it.
        """
        with CallStore(other) as store:
            if store.identity() != self.identity():
                raise DataError(
                    f"{other}: holds the calls of the recipe {store.identity()!r}, expected {self.identity()!r} as in "
                    f"{self.file}; join files of one recipe"
                )
            with self._database.attached(other), self._database.transaction() as connection:
                return merge(connection)

    # ---------------------------------------------------------------- money

    def reserve(self, ceilings: Mapping[str, float], budget_usd: float | None = None) -> list[str]:
        """Set money aside for requests that are about to be sent, in order, while the budget lasts.

        Args:
            ceilings: key -> dollars that the request may cost at most.
            budget_usd: limit of all calls in the file, reservations included. None: no limit.

        Returns:
            The keys that money was set aside for.
        """
        reserved = []
        with self._database.transaction() as connection:
            budget = self._remaining(budget_usd)
            for key, usd in ceilings.items():
                cost = math.ceil(usd * _NANO)
                if cost > budget:
                    break
                budget -= cost
                reserved.append((key, cost))
            # A request that was reserved before and brought no answer may have been billed.
            connection.executemany(_ONE_LOST, [(key,) for key, _ in reserved])
            connection.executemany(
                "INSERT INTO sent VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET ceiling = excluded.ceiling", reserved
            )
        return [key for key, _ in reserved]

    def reserve_retry(self, key: str, ceiling_usd: float, budget_usd: float | None = None) -> bool:
        """Count a try that broke off as spent, and set the same aside for the next one.

        Returns:
            False if the budget may not last for it, or nothing was reserved. The reservation has ended then.
        """
        with self._database.transaction() as connection:
            connection.execute(_ONE_LOST, (key,))
            reserved = connection.execute("DELETE FROM sent WHERE key = ?", (key,)).rowcount == 1
            cost = math.ceil(ceiling_usd * _NANO)
            if not reserved or cost > self._remaining(budget_usd):
                return False
            connection.execute("INSERT INTO sent VALUES (?, ?)", (key, cost))
            return True

    def release(self, billed: Container[str] | None = None) -> None:
        """End all reservations.

        Args:
            billed: keys of requests that were sent and may be billed, so that their ceiling counts as spent. None: all.
        """
        with self._database.transaction() as connection:
            if billed is not None:
                keys = connection.execute("SELECT key FROM sent").fetchall()
                unsent = [(key,) for (key,) in keys if key not in billed]
                connection.executemany("DELETE FROM sent WHERE key = ?", unsent)
            connection.execute(_ALL_LOST)
            connection.execute("DELETE FROM sent")

    def under_way(self) -> int:
        """Requests with a reservation. Those of a killed run count until the next one starts."""
        return self._database.read("SELECT count(*) FROM sent")[0][0]

    def spent_usd(self) -> float:
        """Dollars spent on responses, and on tries that broke off and may have been billed."""
        return self._database.read("SELECT spent FROM money")[0][0] / _NANO

    def reserved_usd(self) -> float:
        """Dollars set aside for requests under way."""
        return self._database.read("SELECT reserved FROM money")[0][0] / _NANO

    def _remaining(self, budget_usd: float | None) -> float:
        """Billionths of a dollar that a budget has left."""
        if budget_usd is None:
            return math.inf
        spent, reserved = self._database.read("SELECT spent, reserved FROM money")[0]
        return math.floor(budget_usd * _NANO) - spent - reserved

    # ---------------------------------------------------------------- statistics

    def tokens(self) -> int:
        """Tokens read and written by the stored calls."""
        return self._database.read("SELECT tokens FROM money")[0][0]

    def counts(self) -> list[Count]:
        """Calls by stage, domain, status and kind of reason."""
        # The kind of `context overflow: 9000 tokens` is `context overflow`.
        kind = "CASE instr(reason, ':') WHEN 0 THEN reason ELSE substr(reason, 1, instr(reason, ':') - 1) END"
        rows = self._database.read(
            f"SELECT stage, domain, status, {kind}, count(*), sum(prompt_tokens), sum(completion_tokens), sum(cost) / 1e9 "
            "FROM calls GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"
        )
        return [Count(*row) for row in rows]

    def calls_per_second(self, window_s: float = 600.0) -> float | None:
        """Mean rate of responses over the last seconds. None: there were none."""
        now = time.time()
        calls, first = self._database.read("SELECT count(*), min(at) FROM calls WHERE at > ?", (now - window_s,))[0]
        return calls / max(now - first, 1.0) if calls else None
