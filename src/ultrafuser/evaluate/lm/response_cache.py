"""Saves every answer of a model as soon as it arrives, so a run that was killed resumes with the missing ones."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ultrafuser.errors import DataError
from ultrafuser.progress import Progress


class ResponseCache:
    """JSON values by kind and key in one SQLite file. A value survives a kill once `put` has returned.

    Args:
        owner: fingerprint of the model (or judge) whose answers these are.

    Raises:
        DataError: the file belongs to another model, or is not a response cache.
    """

    def __init__(self, file: Path, owner: str) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(file, isolation_level=None)  # each statement is its own transaction
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (kind TEXT, key TEXT, value TEXT, PRIMARY KEY (kind, key))"
            )
            self._db.execute("INSERT OR IGNORE INTO answers VALUES ('owner', '', ?)", (json.dumps(owner),))
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"{file}: no response cache can be opened there ({error}). Move the file, or choose another --output"
            ) from error
        if (saved_owner := self.get("owner", "")) != owner:
            raise DataError(
                f"{file}: holds the answers of another model ({saved_owner}), expected {owner}. Give this model another "
                "name as NAME=MODEL, choose another --output, or delete the file if the model was changed on purpose"
            )

    def get(self, kind: str, key: str) -> Any | None:
        """The value, or None where there is none."""
        row = self._db.execute("SELECT value FROM answers WHERE kind = ? AND key = ?", (kind, key)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, kind: str, key: str, value: Any) -> None:
        """Save a value. An existing one stays as it is."""
        try:
            self._db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (kind, key, json.dumps(value)))
        except sqlite3.OperationalError as error:
            raise DataError(
                f"{self.file}: the answer could not be saved ({error}), earlier ones are. Free disk space and run again"
            ) from error

    def values(self, kind: str) -> list[Any]:
        """All values of a kind."""
        return [json.loads(value) for (value,) in self._db.execute("SELECT value FROM answers WHERE kind = ?", (kind,))]

    def close(self) -> None:
        """Close the file."""
        self._db.close()


class CachedLM(LM):
    """Any lm-eval model with a cache: saved answers are read, the others are asked for and saved at once.

    Equal requests (the repeats of pass@k) are counted, so that sampled answers stay different. A sampled answer belongs
    to its seed. lm-eval's own `CachingLM` skips sampled requests, and saves only after a whole batch.
    """

    def __init__(self, lm: LM, store: ResponseCache, progress: Progress | None = None, seed: int = 0) -> None:
        super().__init__()
        self.lm, self.store, self.progress, self.seed = lm, store, progress or Progress(), seed

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(float(log_p), bool(greedy)) for log_p, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answer("generate_until", requests)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.lm.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.lm.chat_template(chat_template)

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer_name

    def _answer(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        keys = _keys(kind, [request.args for request in requests], self.seed)
        missing = [i for i, key in enumerate(keys) if self.store.get(kind, key) is None]
        if missing:
            title = {"generate_until": "answers", "loglikelihood": "options scored"}.get(kind, kind)
            cached = f" ({len(keys) - len(missing)} cached)" if len(missing) < len(keys) else ""
            self.progress.start(title + cached, len(missing))
            self.lm.set_cache_hook(_SavingHook(self, kind, {keys[i]: requests[i].args for i in missing}))
            if isinstance(getattr(self.lm, "draws", None), int):
                self.lm.draws = len(self.store.values(kind))
            answers = getattr(self.lm, kind)([requests[i] for i in missing])
            for i, answer in zip(missing, answers, strict=True):  # those that the model did not report as it went
                self.store.put(kind, keys[i], answer)
            self.progress.finish()
        return [self.store.get(kind, key) for key in keys]


class _SavingHook:
    """lm-eval's cache hook: the model calls it with every finished request."""

    def __init__(self, owner: CachedLM, kind: str, requests: Mapping[str, tuple]) -> None:
        self.owner, self.kind = owner, kind
        self.waiting: dict[str, deque[str]] = {}  # by hash, the keys of equal requests
        for key, args in requests.items():
            self.waiting.setdefault(_hash(kind, args), deque()).append(key)

    def add_partial(self, kind: str, args: Iterable[Any], answer: Any) -> None:
        keys = self.waiting.get(_hash(kind, tuple(args)))
        if kind == self.kind and keys:
            self.owner.store.put(kind, keys.popleft(), answer)
            self.owner.progress.advance()


def _hash(kind: str, args: tuple) -> str:
    return hashlib.sha256(json.dumps([kind, *args], sort_keys=True).encode()).hexdigest()


def _keys(kind: str, args: Sequence[tuple], seed: int) -> list[str]:
    """One key per request. It ends in the index among equal requests, and in the seed where the answer is sampled."""
    seen: Counter[str] = Counter()
    keys = []
    for arg in args:
        key = _hash(kind, arg)
        sampled = kind == "generate_until" and arg[1].get("do_sample")
        keys.append(f"{key}-{seen[key]}" + (f"-{seed}" if sampled else ""))
        seen[key] += 1
    return keys
