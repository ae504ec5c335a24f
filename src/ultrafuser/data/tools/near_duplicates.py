"""Find exact duplicates, and near duplicates by MinHash, each verified by its true similarity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import RowReader
from ultrafuser.data.tools.ngrams import WordCodes, window_hashes, word_and_sign_tokens
from ultrafuser.data.tools.streaming import stream_rows
from ultrafuser.data.writing import check_targets, row_writers
from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.progress import Progress

COMPARED_ROLES = {
    "conversation": ("system", "user", "assistant", "tool"),
    "instructions": ("user",),
    "answers": ("assistant",),
}
_NUM_PERM = 128  # permutations of MinHash. More find more of the pairs near the threshold, and take longer
_REPORT_EVERY = 200  # rows between two reports of progress


class NearDuplicate(TypedDict):
    """A row that is dropped, and its similarity to the kept row."""

    id: str
    similarity: float


class ClusterReport(TypedDict):
    """A cluster of more than one row, by ids."""

    kept: str
    domain: str
    exact: list[str]
    near: list[NearDuplicate]


class DuplicateReport(TypedDict):
    """How many rows were read, kept and dropped, and every cluster of duplicates."""

    rows: int
    kept: int
    exact_duplicates: int
    near_duplicates: int
    rule: dict[str, Any]  # the fields of a NearDuplicateRule
    clusters: list[ClusterReport]


@dataclass(frozen=True)
class NearDuplicateRule:
    """When two rows are near duplicates.

    Attributes:
        threshold: the lowest Jaccard similarity of the shingles of near duplicates. None: find exact duplicates only.
        on: the messages to compare: `conversation`, `instructions` (user) or `answers` (assistant).
        shingle: consecutive words that make a shingle. A shorter text is one shingle.
    """

    threshold: float | None = 0.7
    on: str = "conversation"
    shingle: int = 3

    def __post_init__(self) -> None:
        if self.on not in COMPARED_ROLES:
            raise DataError(f"compare on {self.on!r}: expected one of {', '.join(COMPARED_ROLES)}")
        if self.threshold is not None and not 0.1 <= self.threshold <= 1:
            raise DataError(f"a similarity of {self.threshold}: expected 0.1 to 1. 0.7 is usual")


@dataclass
class Cluster:
    """The row that is kept of some duplicates, and the rows that are dropped for it, by their index.

    Attributes:
        near: (index, similarity to the kept row) pairs.
    """

    kept: int
    exact: list[int] = field(default_factory=list)
    near: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Sketch:
    """A row as the index stores it: the sorted hashes of its shingles, and their MinHash."""

    shingles: np.ndarray
    minhash: Any


class NearDuplicateIndex:
    """Rows by their shingles. Hashing proposes candidates. Each is then compared by its true similarity."""

    def __init__(self, rule: NearDuplicateRule) -> None:
        """
        Raises:
            MissingExtraError: the rule asks for near duplicates and datasketch is not installed.
        """
        self.rule, self._codes = rule, WordCodes()
        self._shingles: dict[int, np.ndarray] = {}
        if rule.threshold is None:
            return
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise MissingExtraError("datasketch", "data", "finding near duplicates") from error
        # A false candidate costs one comparison, a missed one costs a duplicate: hence the weights.
        self._lsh = MinHashLSH(threshold=min(rule.threshold, 0.95), num_perm=_NUM_PERM, weights=(0.1, 0.9))
        self._empty = MinHash(num_perm=_NUM_PERM, seed=1, hashfunc=int)  # shingles come as hashes

    def find_similar(self, row: Row) -> tuple[list[tuple[int, float]], Sketch | None]:
        """The near duplicates of a row among the indexed rows, with their similarity, most similar first.

        Returns:
            (index, similarity) pairs, and the sketch that `add` takes. None for a row without words or an exact rule.
        """
        threshold = self.rule.threshold
        if threshold is None:
            return [], None
        tokens = [token for text in _texts(row, self.rule.on) for token in word_and_sign_tokens(text)]
        if not tokens:
            return [], None
        # The set of the row's shingles, as ascending 32-bit hashes.
        hashes = window_hashes(self._codes.array(tokens), max(1, min(self.rule.shingle, len(tokens))))
        shingles = np.unique((hashes >> np.uint64(32)).astype(np.uint32))
        minhash = self._empty.copy()
        minhash.update_batch(shingles.tolist())
        matches = []
        for index in self._lsh.query(minhash):
            candidate = self._shingles[index]
            shared = len(np.intersect1d(shingles, candidate, assume_unique=True))
            similarity = shared / (len(shingles) + len(candidate) - shared)
            if similarity >= threshold:
                matches.append((index, similarity))
        return sorted(matches, key=lambda pair: (-pair[1], pair[0])), Sketch(shingles, minhash)

    def add(self, index: int, sketch: Sketch | None) -> None:
        """Index a row, by the sketch that `find_similar` returned for it."""
        if sketch is not None:
            self._shingles[index] = sketch.shingles
            self._lsh.insert(index, sketch.minhash, check_duplication=False)


def find_clusters(rows: Sequence[Row], rule: NearDuplicateRule, progress: Progress | None = None) -> list[Cluster]:
    """Every row to keep, with its duplicates.

    Rows are taken in the order of their ids. A row is dropped if it equals an earlier row, or if its similarity to a kept
    row reaches `threshold`. It then joins the cluster of the most similar one. So no two kept rows are near duplicates (as
    far as MinHash finds them), and no row is dropped for its similarity to a dropped row.

    Raises:
        MissingExtraError: the rule asks for near duplicates and datasketch is not installed.
    """
    clusters: dict[int, Cluster] = {}
    rows_by_shingle = NearDuplicateIndex(rule)
    for index, copies in _exact_duplicates(rows, rule.on, progress):
        matches, sketch = rows_by_shingle.find_similar(rows[index])
        if matches:
            best, similarity = matches[0]
            clusters[best].near += [(duplicate, similarity) for duplicate in (index, *copies)]
        else:
            clusters[index] = Cluster(index, exact=copies)
            rows_by_shingle.add(index, sketch)
    return list(clusters.values())


def find_groups(rows: Sequence[Row], rule: NearDuplicateRule, progress: Progress | None = None) -> list[list[int]]:
    """All rows in groups, so that no row has a duplicate in another group. A chain of near duplicates is one group.

    Raises:
        MissingExtraError: the rule asks for near duplicates and datasketch is not installed.
    """
    parent = list(range(len(rows)))  # a union-find forest

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    rows_by_shingle = NearDuplicateIndex(rule)
    for index, copies in _exact_duplicates(rows, rule.on, progress):
        for copy in copies:
            parent[root(copy)] = root(index)
        matches, sketch = rows_by_shingle.find_similar(rows[index])
        for match, _ in matches:
            parent[root(index)] = root(match)
        rows_by_shingle.add(index, sketch)
    groups: dict[int, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def _exact_duplicates(rows: Sequence[Row], on: str, progress: Progress | None) -> Iterator[tuple[int, list[int]]]:
    """The first row by id of every set of equal rows, and the rest of the set. Equal ids keep the order of the list."""
    equal_rows: dict[bytes, list[int]] = {}
    for index in sorted(range(len(rows)), key=lambda index: (rows[index].id, index)):
        # Rows are equal when their words and signs are. A text without any counts as it stands.
        key = "\x1e".join(" ".join(word_and_sign_tokens(text)) or text for text in _texts(rows[index], on))
        equal_rows.setdefault(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest(), []).append(index)
    progress = progress or Progress()
    progress.start("rows compared with each other", len(rows))
    for step, (first, *copies) in enumerate(equal_rows.values()):
        if step % _REPORT_EVERY == 0 and step:
            progress.advance(_REPORT_EVERY)
        yield first, copies
    progress.finish()


def _texts(row: Row, on: str) -> list[str]:
    return [content for role, content in row.messages if role in COMPARED_ROLES[on]]


# ---------------------------------------------------------------- the command


def deduplicate(
    sources: Sequence[str],
    output: Path | None,
    *,
    rule: NearDuplicateRule | None = None,
    domain: str | None = None,
    report: Path | None = None,
    force: bool = False,
    reader: RowReader | None = None,
    progress: Progress | None = None,
) -> DuplicateReport:
    """Copy the first row by id of every cluster of duplicates. Rows keep their order.

    Args:
        sources: rows, as in `load_rows`.
        output: the file to write. None: only report.
        report: the file for the report as JSON. None: none.
        reader: as in `stream_rows`.

    Raises:
        DataError: unreadable rows, or an output that exists or cannot be written.
        MissingExtraError: the rule asks for near duplicates and datasketch is not installed.
    """
    rule = rule or NearDuplicateRule()
    check_targets(output, report, force=force)
    rows = list(stream_rows(sources, domain=domain, reader=reader, progress=progress, label="rows read"))
    clusters = find_clusters(rows, rule, progress)
    summary: DuplicateReport = {
        "rows": len(rows),
        "kept": len(clusters),
        "exact_duplicates": sum(len(cluster.exact) for cluster in clusters),
        "near_duplicates": sum(len(cluster.near) for cluster in clusters),
        "rule": asdict(rule),
        "clusters": [_cluster_by_ids(cluster, rows) for cluster in clusters if cluster.exact or cluster.near],
    }
    with row_writers([output] if output else [], report, force=force) as (writers, write_report):
        for write in writers:
            for index in sorted(cluster.kept for cluster in clusters):
                write(rows[index])
        write_report(summary)
    return summary


def _cluster_by_ids(cluster: Cluster, rows: Sequence[Row]) -> ClusterReport:
    return {
        "kept": rows[cluster.kept].id,
        "domain": rows[cluster.kept].domain,
        "exact": [rows[index].id for index in cluster.exact],
        "near": [{"id": rows[index].id, "similarity": round(similarity, 4)} for index, similarity in cluster.near],
    }
