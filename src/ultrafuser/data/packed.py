"""Many rendered rows: as flat integer arrays in files that are mapped into memory, and with a sample of their response tokens."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from ultrafuser.data.files import disk_errors
from ultrafuser.data.templates import Rendered

_FACTS = "rows.json"  # written last: a folder without it is not whole
_TYPES = {"tokens": np.int32, "labels": np.int32, "runs": np.int32, "counts": np.int32, "ids": np.uint8}


@dataclass(frozen=True)
class PackedChunk:
    """Some rows as arrays. Concatenated, they are those of a file.

    Attributes:
        domains: names of the domains, numbered by their places.
        tokens: the K sequences of each row, one after another. Where all are the same, one of them.
        labels: response tokens.
        runs: (M, 1 + K): lengths and the K first positions of stretches of consecutive response positions.
        counts: (N, 5 + K): of each row the labels, runs, bytes of its id, truncated tokens, its domain, and the lengths
            of its K sequences. The lengths after the first are 0 where all sequences are the same.
        ids: row ids in UTF-8.
    """

    domains: list[str]
    tokens: np.ndarray
    labels: np.ndarray
    runs: np.ndarray
    counts: np.ndarray
    ids: np.ndarray


def pack(rows: Sequence[Rendered], size: int) -> PackedChunk:
    """Rows of K = `size` sequences as arrays."""
    domains: dict[str, int] = {}
    tokens: list[int] = []
    labels: list[int] = []
    runs: list[list[int]] = []
    counts: list[list[int]] = []
    ids = bytearray()
    for row in rows:
        is_shared = all(sequence == row.input_ids[0] for sequence in row.input_ids[1:])
        for sequence in row.input_ids[:1] if is_shared else row.input_ids:
            tokens += sequence
        lengths = [len(sequence) for sequence in row.input_ids]
        if is_shared:
            lengths[1:] = [0] * (len(lengths) - 1)
        labels += row.labels
        row_runs = _runs(row.response_index)
        runs += row_runs
        row_id = row.row_id.encode("utf-8", "surrogatepass")
        ids += row_id
        domain = domains.setdefault(row.domain, len(domains))
        counts.append([len(row.labels), len(row_runs), len(row_id), row.truncated, domain, *lengths])
    return PackedChunk(
        list(domains),
        np.array(tokens, np.int32),
        np.array(labels, np.int32),
        np.array(runs, np.int32).reshape(-1, 1 + size),
        np.array(counts, np.int32).reshape(-1, 5 + size),
        np.frombuffer(bytes(ids), np.uint8),
    )


def _runs(index: Sequence[Sequence[int]]) -> list[list[int]]:
    """(length, K first positions) of the stretches in which every specialist's positions are consecutive."""
    size = len(index[0])
    cuts = {i for positions in index for i, (a, b) in enumerate(pairwise(positions), 1) if b != a + 1}
    return [
        [end - start, *(positions[start] for positions in index)] for start, end in pairwise([0, *sorted(cuts), size])
    ]


class RowTable(Sequence[Rendered]):
    """Rows that are built when they are asked for, and what is known of all of them without building them."""

    digest: bytes

    @property
    def domains(self) -> list[str]:
        """The domain of each row."""
        raise NotImplementedError

    @property
    def lengths(self) -> list[int]:
        """The length of each row's longest sequence, in tokens."""
        raise NotImplementedError

    @property
    def label_counts(self) -> list[int]:
        """The number of each row's response tokens."""
        raise NotImplementedError

    @overload
    def __getitem__(self, i: int) -> Rendered: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Rendered]: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        return self._row(range(len(self))[i])

    def _row(self, i: int) -> Rendered:
        raise NotImplementedError


class PackedRows(RowTable):
    """Rows in the files of a folder."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            OSError: the folder does not hold whole files.
        """
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        self.folder, self.digest = folder, bytes.fromhex(facts["digest"])
        self._names: list[str] = facts["domains"]
        size: int = facts["specialists"]
        counts = self._mapped("counts").reshape(-1, 5 + size)
        self._counts, self._runs = counts, self._mapped("runs").reshape(-1, 1 + size)
        self._tokens, self._labels, self._ids = (self._mapped(name) for name in ("tokens", "labels", "ids"))
        self._label_ends, self._run_ends, self._id_ends = (_ends(counts[:, column]) for column in range(3))
        self._token_ends = _ends(counts[:, 5:].sum(1, dtype=np.int64))

    def _mapped(self, name: str) -> np.ndarray:
        file = self.folder / f"{name}.bin"
        if not file.stat().st_size:
            return np.empty(0, _TYPES[name])
        return np.memmap(file, _TYPES[name], mode="r")

    @property
    def domains(self) -> list[str]:
        return [self._names[i] for i in self._counts[:, 4].tolist()]

    @property
    def lengths(self) -> list[int]:
        return self._counts[:, 5:].max(1, initial=0).tolist()

    @property
    def label_counts(self) -> list[int]:
        return self._counts[:, 0].tolist()

    def __len__(self) -> int:
        return len(self._counts)

    def _row(self, i: int) -> Rendered:
        counts = self._counts[i].tolist()
        lengths = counts[5:]
        tokens = self._tokens[self._token_ends[i] : self._token_ends[i + 1]].tolist()
        if len(tokens) == lengths[0]:  # all sequences are the same
            sequences = (tuple(tokens),) * len(lengths)
        else:
            sequences = tuple(tuple(tokens[a:b]) for a, b in pairwise([0, *accumulate(lengths)]))
        runs = self._runs[self._run_ends[i] : self._run_ends[i + 1]].tolist()
        return Rendered(
            row_id=self._ids[self._id_ends[i] : self._id_ends[i + 1]].tobytes().decode("utf-8", "surrogatepass"),
            domain=self._names[counts[4]],
            input_ids=sequences,
            response_index=tuple(
                tuple(position for run in runs for position in range(run[1 + k], run[1 + k] + run[0]))
                for k in range(len(lengths))
            ),
            labels=tuple(self._labels[self._label_ends[i] : self._label_ends[i + 1]].tolist()),
            truncated=counts[3],
        )


class SampledRows(RowTable):
    """Rows of which each keeps a random sample of its response tokens. Prompts and sequences stay whole."""

    def __init__(self, rows: Sequence[Rendered], limit: int, seed: int) -> None:
        """
        Args:
            limit: response tokens of a row at most.
        """
        self.rows, self.limit, self.seed = rows, limit, seed

    @property
    def digest(self) -> bytes:  # type: ignore[override]
        """Of the rows and the sample."""
        return hashlib.sha256(digest_of(self.rows) + f"{self.limit}/{self.seed}".encode()).digest()

    @property
    def domains(self) -> list[str]:
        return domains_of(self.rows)

    @property
    def lengths(self) -> list[int]:
        return lengths_of(self.rows)

    @property
    def label_counts(self) -> list[int]:
        return [min(self.limit, number) for number in label_counts_of(self.rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def _row(self, i: int) -> Rendered:
        row = self.rows[i]
        if len(row.labels) <= self.limit:
            return row
        drawn = sorted(random.Random(f"{self.seed}/{i}").sample(range(len(row.labels)), self.limit))
        return replace(
            row,
            response_index=tuple(tuple(positions[r] for r in drawn) for positions in row.response_index),
            labels=tuple(row.labels[r] for r in drawn),
        )


def _ends(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def write_packed(chunks: Iterable[PackedChunk], folder: Path) -> PackedRows:
    """Write chunks into a folder, which replaces what is there.

    Raises:
        DiskError: the disk is full or not writable. Nothing is left.
    """
    shutil.rmtree(folder, ignore_errors=True)
    digests, size, domains = {name: hashlib.sha256() for name in _TYPES}, 0, dict[str, int]()
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True)
            files = {name: (folder / f"{name}.bin").open("wb") for name in _TYPES}
            try:
                for chunk in chunks:
                    numbers = [domains.setdefault(name, len(domains)) for name in chunk.domains]
                    chunk.counts[:, 4] = np.array(numbers, np.int32)[chunk.counts[:, 4]]
                    size = chunk.counts.shape[1] - 5
                    for name, file in files.items():
                        content = getattr(chunk, name).tobytes()
                        digests[name].update(content)
                        file.write(content)
            finally:
                for file in files.values():
                    file.close()
            facts = {"specialists": size, "domains": list(domains)}
            parts = [json.dumps(facts).encode(), *(digest.digest() for digest in digests.values())]
            facts["digest"] = hashlib.sha256(b"".join(parts)).hexdigest()
            (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return PackedRows(folder)


def is_whole(folder: Path) -> bool:
    """Whether the folder holds packed rows."""
    return (folder / _FACTS).is_file()


# ---------------------------------------------------------------- what is asked of all rows at once


def domains_of(rows: Sequence[Rendered]) -> list[str]:
    """The domain of each row."""
    return rows.domains if isinstance(rows, RowTable) else [row.domain for row in rows]


def lengths_of(rows: Sequence[Rendered]) -> list[int]:
    """The length of each row's longest sequence, in tokens."""
    return rows.lengths if isinstance(rows, RowTable) else [row.num_tokens for row in rows]


def label_counts_of(rows: Sequence[Rendered]) -> list[int]:
    """The number of each row's response tokens."""
    return rows.label_counts if isinstance(rows, RowTable) else [len(row.labels) for row in rows]


def digest_of(rows: Sequence[Rendered]) -> bytes:
    """SHA-256 of the rows' ids, tokens and labels."""
    if isinstance(rows, RowTable):
        return rows.digest
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.row_id, row.input_ids, row.labels)).encode())
    return digest.digest()
