"""Rows that say the same: exact duplicates, and near ones by MinHash and locality-sensitive hashing, verified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ultrafuser.data.schema import Row
from ultrafuser.data.tools.ngrams import WordCodes, window_hashes, word_and_sign_tokens
from ultrafuser.data.tools.streaming import stream_rows
from ultrafuser.data.writing import check_targets, row_writer, write_json
from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.progress import Progress

PARTS = {"conversation": ("system", "user", "assistant"), "instructions": ("user",), "answers": ("assistant",)}
_STEP = 200  # rows between two reports of progress


@dataclass(frozen=True)
class NearDuplicateRule:
    """When two rows are near duplicates.

    Attributes:
        threshold: the Jaccard similarity of their shingles from which on they are; None: only exact duplicates count.
        on: the part that is compared: `conversation`, `instructions` (user) or `answers` (assistant).
        shingle: words in a row that make a shingle; a shorter text is one shingle.
        num_perm: permutations of MinHash: more find pairs near the threshold more surely, and take longer.
    """

    threshold: float | None = 0.7
    on: str = "conversation"
    shingle: int = 3
    num_perm: int = 128

    def __post_init__(self) -> None:
        if self.on not in PARTS:
            raise DataError(f"compare on {self.on!r}: expected one of {', '.join(PARTS)}")
        if self.threshold is not None and not 0.1 <= self.threshold <= 1:
            raise DataError(f"a similarity of {self.threshold}: expected 0.1 to 1; 0.7 is usual")


@dataclass
class Cluster:
    """A row that is kept and those that are dropped for it, as places in the list of rows.

    Attributes:
        near: with their similarity to the kept row.
    """

    kept: int
    exact: list[int] = field(default_factory=list)
    near: list[tuple[int, float]] = field(default_factory=list)


class NearDuplicateIndex:
    """Rows by their shingles. Hashing proposes candidates; each is then compared by its true similarity."""

    def __init__(self, likeness: NearDuplicateRule) -> None:
        """
        Raises:
            MissingExtraError: datasketch is not installed.
        """
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise MissingExtraError("datasketch", "data", "finding near duplicates") from error
        assert likeness.threshold is not None
        self.likeness, self._codes = likeness, WordCodes()
        # A candidate too many costs a comparison, one too few a duplicate: hence the weights.
        self._lsh = MinHashLSH(threshold=min(likeness.threshold, 0.95), num_perm=likeness.num_perm, weights=(0.1, 0.9))
        self._empty = MinHash(num_perm=likeness.num_perm, seed=1, hashfunc=int)  # shingles come as hashes
        self._shingles: dict[int, np.ndarray] = {}

    def like(self, row: Row) -> tuple[list[tuple[int, float]], tuple[np.ndarray, Any] | None]:
        """The rows so far that are near duplicates of this one, with their similarity, most similar first.

        Returns:
            those rows, and what `add` needs to add this one; None for a row without words.
        """
        mine = self._shingles_of(row)
        if not len(mine):
            return [], None
        sketch = self._empty.copy()
        sketch.update_batch(mine.tolist())
        found = []
        for other in self._lsh.query(sketch):
            theirs = self._shingles[other]
            shared = len(np.intersect1d(mine, theirs, assume_unique=True))
            similarity = shared / (len(mine) + len(theirs) - shared)
            if similarity >= (self.likeness.threshold or 0):
                found.append((other, similarity))
        return sorted(found, key=lambda pair: (-pair[1], pair[0])), (mine, sketch)

    def add(self, number: int, sketch: tuple[np.ndarray, Any] | None) -> None:
        """Keep a row under its number, from what `like` returned for it."""
        if sketch is not None:
            self._shingles[number], minhash = sketch
            self._lsh.insert(number, minhash, check_duplication=False)

    def _shingles_of(self, row: Row) -> np.ndarray:
        """The set of a row's shingles, as ascending 32-bit hashes."""
        spoken = [word for text in _texts(row, self.likeness.on) for word in word_and_sign_tokens(text)]
        hashes = window_hashes(self._codes.array(spoken), max(1, min(self.likeness.shingle, len(spoken))))
        return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def clusters(rows: Sequence[Row], likeness: NearDuplicateRule, progress: Progress | None = None) -> list[Cluster]:
    """Every row that is kept, with its duplicates.

    Rows are taken in the order of their ids. A row is dropped when it equals a row before it, or is at least `threshold`
    similar to one that is kept; of several, the most similar one. So no two kept rows are near duplicates (as far as
    MinHash finds them), and nothing is dropped for being similar to a row that is itself dropped.

    Raises:
        MissingExtraError: near duplicates are wanted and datasketch is not installed.
    """
    progress = progress or Progress()
    found: dict[int, Cluster] = {}
    index = NearDuplicateIndex(likeness) if likeness.threshold is not None else None
    progress.start("rows compared with each other", len(rows))
    for step, (number, twins) in enumerate(_exact(rows, likeness.on)):
        if step % _STEP == 0 and step:
            progress.advance(_STEP)
        like, sketch = index.like(rows[number]) if index is not None else ([], None)
        if like:
            best, similarity = like[0]
            found[best].near += [(one, similarity) for one in (number, *twins)]
        else:
            found[number] = Cluster(number, exact=twins)
            if index is not None:
                index.add(number, sketch)
    progress.finish()
    return list(found.values())


def connected(rows: Sequence[Row], likeness: NearDuplicateRule, progress: Progress | None = None) -> list[list[int]]:
    """All rows, in groups of which no row has a duplicate in another group: chains of near duplicates stay together.

    Raises:
        MissingExtraError: near duplicates are wanted and datasketch is not installed.
    """
    progress = progress or Progress()
    parent = list(range(len(rows)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    index = NearDuplicateIndex(likeness) if likeness.threshold is not None else None
    progress.start("rows compared with each other", len(rows))
    for step, (number, twins) in enumerate(_exact(rows, likeness.on)):
        if step % _STEP == 0 and step:
            progress.advance(_STEP)
        for twin in twins:
            parent[root(twin)] = root(number)
        if index is not None:
            like, sketch = index.like(rows[number])
            for other, _ in like:
                parent[root(number)] = root(other)
            index.add(number, sketch)
    progress.finish()
    groups: dict[int, list[int]] = {}
    for number in range(len(rows)):
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())


def _exact(rows: Sequence[Row], on: str) -> Iterator[tuple[int, list[int]]]:
    """The first row by id of every set of equal ones, and the others; ties of ids in the order of the list."""
    twins: dict[bytes, list[int]] = {}
    for number in sorted(range(len(rows)), key=lambda number: (rows[number].id, number)):
        key = "\x1e".join(" ".join(word_and_sign_tokens(text)) or text for text in _texts(rows[number], on))
        twins.setdefault(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest(), []).append(number)
    for first, *others in twins.values():
        yield first, others


def _texts(row: Row, on: str) -> list[str]:
    return [content for role, content in row.messages if role in PARTS[on]]


# ---------------------------------------------------------------- the command


def deduplicate(
    sources: Sequence[str],
    output: Path | None,
    *,
    likeness: NearDuplicateRule | None = None,
    domain: str | None = None,
    report: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Copy the first row by id of every cluster of duplicates; rows keep their order.

    Args:
        sources: rows, as in `load_rows`.
        output: the file to write; None: only report.
        report: where the report goes as JSON, if anywhere.

    Returns:
        the report: counts, and every cluster of more than one row by ids.

    Raises:
        DataError: rows that cannot be read, an output that cannot be written or is there already.
        MissingExtraError: near duplicates are wanted and datasketch is not installed.
    """
    likeness = likeness or NearDuplicateRule()
    check_targets(output, report, force=force)
    rows = list(stream_rows(sources, domain=domain, progress=progress, what="rows read"))
    found = clusters(rows, likeness, progress)
    exact, near = sum(len(one.exact) for one in found), sum(len(one.near) for one in found)
    summary: dict[str, Any] = {
        "rows": len(rows),
        "kept": len(found),
        "exact_duplicates": exact,
        "near_duplicates": near,
        "rule": {"threshold": likeness.threshold, "on": likeness.on, "shingle": likeness.shingle},
        "clusters": [_named(one, rows) for one in found if one.exact or one.near],
    }
    if output is not None:
        kept = {one.kept for one in found}
        with row_writer(output, force=force) as write:
            for number, row in enumerate(rows):
                if number in kept:
                    write(row)
    if report is not None:
        write_json(report, summary, force=force)
    return summary


def _named(cluster: Cluster, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "kept": rows[cluster.kept].id,
        "domain": rows[cluster.kept].domain,
        "exact": [rows[number].id for number in cluster.exact],
        "near": [{"id": rows[number].id, "similarity": round(value, 4)} for number, value in cluster.near],
    }
