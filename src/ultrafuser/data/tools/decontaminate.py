"""Drop training rows that share words with test data, by the paper's 13-gram rule. Every hit is verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import TypedDict

import numpy as np

from ultrafuser.data.row_files import find_files
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import RowReader, unread_note
from ultrafuser.data.tools.ngrams import signed_words, window_hashes, word_and_sign_tokens
from ultrafuser.data.tools.streaming import stream_rows
from ultrafuser.data.tools.texts import TEXT_SUFFIXES, Text, read_texts
from ultrafuser.data.writing import check_targets, row_writers
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress

_BATCH_ROWS = 500
_MAX_MATCHES_SHOWN = 5  # test texts listed for a dropped row. All are counted
_MAX_TEXTS_PER_RUN = 64  # test texts looked up for one run of words. Only boilerplate is in more
_MIN_TEXT_WORDS = 3  # shorter test texts ("B", "Yes") are ignored


@dataclass(frozen=True)
class Rule:
    """When a row is contaminated by a test text.

    Attributes:
        ngram: consecutive words that a conversation and a long test text must share, with the signs between them.
        min_words: a conversation must hold all of a test text of `min_words` to `ngram - 1` words. A shorter test text
            counts only if it is a whole user message.
    """

    ngram: int = 13  # the paper, appendix F
    min_words: int = 8  # GPT-3's lower bound for short test texts, arXiv 2005.14165, appendix C

    def __post_init__(self) -> None:
        if not _MIN_TEXT_WORDS <= self.min_words <= self.ngram:
            raise DataError(
                f"got n-grams of {self.ngram} words and a minimum of {self.min_words} words for whole texts, expected "
                f"{_MIN_TEXT_WORDS} <= min_words <= ngram"
            )


@dataclass(frozen=True)
class Match:
    """The words that a row shares with a test text: the location of the text, the kind of match, the normalised words."""

    test: str
    field: str
    kind: str
    words: str


@dataclass
class _GramTable:
    """All runs of `size` words of the test texts: their hashes in order, and the position of each run."""

    size: int
    hashes: np.ndarray  # (N,) uint64, ascending
    starts: np.ndarray  # (N,) position of the run in the words of all test texts
    prefixes: np.ndarray  # (2^bits,) bool: whether any hash starts with these bits
    shift: np.uint64


class ContaminationIndex:
    """The texts of test files, indexed by their words.

    A hash only proposes candidates. Each candidate is then compared word by word, so there are no false hits. The signs
    before a word belong to it, so `5 + 3` is not `5 - 3`. Those before the first word of a run do not count.
    """

    def __init__(self, texts: Iterable[Text], rule: Rule | None = None) -> None:
        """
        Raises:
            DataError: all texts are too short to look for.
        """
        self.rule = rule or Rule()
        self.texts: list[Text] = []
        self._kinds: list[str] = []
        self.counts: Counter[str] = Counter()
        self._ids: dict[str, int] = {}  # word with its signs -> id, from 1 on. 0 is any word that no test text has
        self._messages: dict[tuple[str, ...], list[int]] = {}
        flat: list[int] = []  # ids of the words with their signs of all test texts, one after the other
        flat_bare: list[int] = []  # ids of the words without signs
        text_starts: list[int] = []
        gram_starts: dict[int, list[int]] = {}
        for text in texts:
            text_words = signed_words(text.text)
            kind = self._kind(len(text_words))
            self.counts[kind] += 1
            if kind == "ignored":
                continue
            index = len(self.texts)
            self.texts.append(text)
            self._kinds.append(kind)
            text_starts.append(len(flat))
            if kind == "message":  # compared as a whole, by the dictionary
                self._messages.setdefault(tuple(word_and_sign_tokens(text.text)), []).append(index)
                continue
            size = min(self.rule.ngram, len(text_words))
            gram_starts.setdefault(size, []).extend(range(len(flat), len(flat) + len(text_words) - size + 1))
            flat += [self._ids.setdefault(signs + word, len(self._ids) + 1) for signs, word in text_words]
            flat_bare += [self._ids.setdefault(word, len(self._ids) + 1) for _, word in text_words]
        if not self.texts:
            raise DataError(f"the test files hold no text of {_MIN_TEXT_WORDS} words or more, expected at least one")
        self._flat, self._flat_bare = np.array(flat, np.int64), np.array(flat_bare, np.int64)
        self._text_starts = np.array(text_starts, np.int64)
        draws = np.random.default_rng(0).integers(0, 1 << 63, len(self._ids) + 1, np.uint64)
        self._codes = draws * np.uint64(2) + np.uint64(1)  # a random odd code for each word
        self._tables = [self._table(size, np.array(starts, np.int64)) for size, starts in sorted(gram_starts.items())]

    def _kind(self, length: int) -> str:
        if length >= self.rule.ngram:
            return "ngram"
        if length >= self.rule.min_words:
            return "whole"
        return "message" if length >= _MIN_TEXT_WORDS else "ignored"

    def _table(self, size: int, starts: np.ndarray) -> _GramTable:
        hashes = self._run_hashes(self._flat, self._flat_bare, size)[starts]
        order = np.argsort(hashes, kind="stable")
        bits = min(26, max(16, int(16 * len(hashes)).bit_length()))  # about one in 16 other runs passes by chance
        shift = np.uint64(64 - bits)
        prefixes = np.zeros(1 << bits, bool)
        prefixes[hashes >> shift] = True
        return _GramTable(size, hashes[order], starts[order], prefixes, shift)

    def _run_hashes(self, ids: np.ndarray, bare_ids: np.ndarray, size: int) -> np.ndarray:
        """A hash of every run of words, (T,) -> (T - size + 1,). The signs before the first word of a run do not count."""
        hashes = window_hashes(self._codes[ids], size)
        # the code of the first word has the factor B^0 in the hash of a window
        return hashes - self._codes[ids[: len(hashes)]] + self._codes[bare_ids[: len(hashes)]]

    def find_matches(self, rows: Iterable[Row]) -> Iterator[tuple[Row, list[Match]]]:
        """Every row with its matches, in the order of the test texts. A clean row has none."""
        names = {"ngram": f"{self.rule.ngram}-gram", "whole": "whole text", "message": "whole message"}
        stream = iter(rows)
        while batch := list(islice(stream, _BATCH_ROWS)):
            for row, shared in zip(batch, self._search(batch), strict=True):
                matches = []
                for index, words_of_match in sorted(shared.items()):
                    text, kind = self.texts[index], names[self._kinds[index]]
                    matches.append(Match(text.location, text.field, kind, " ".join(words_of_match)))
                yield row, matches

    def _search(self, batch: Sequence[Row]) -> list[dict[int, tuple[str, ...]]]:
        """For each row, the words that it shares with each test text, by the index of the text."""
        shared: list[dict[int, tuple[str, ...]]] = [{} for _ in batch]
        batch_words: list[tuple[str, str]] = []  # (signs, word)
        row_starts = []
        for row, row_shared in zip(batch, shared, strict=True):
            row_starts.append(len(batch_words))
            for role, content in row.messages:
                message = signed_words(content)
                batch_words += message
                if role == "user" and len(message) < self.rule.min_words:
                    tokens = tuple(word_and_sign_tokens(content))
                    row_shared |= {index: tokens for index in self._messages.get(tokens, ())}
            batch_words.append(("", ""))  # not a word, so no run goes on into the next row
        texts = [signs + word for signs, word in batch_words]
        ids = np.fromiter(map(self._ids.get, texts, repeat(0)), np.int64, len(texts))
        bare_ids = ids.copy()
        for position, (signs, word) in enumerate(batch_words):
            if signs:
                bare_ids[position] = self._ids.get(word, 0)
        for table in self._tables:
            windows, positions = self._hits(table, ids, bare_ids)
            # the row of each hit, and the test text of each hit
            row_indices = np.searchsorted(row_starts, windows, "right") - 1
            text_indices = np.searchsorted(self._text_starts, positions, "right") - 1
            for window, row_index, index in zip(
                windows.tolist(), row_indices.tolist(), text_indices.tolist(), strict=True
            ):
                if index not in shared[row_index]:
                    (_, first), *others = batch_words[window : window + table.size]
                    shared[row_index][index] = (first, *(token for pair in others for token in pair if token))
        return shared

    def _hits(self, table: _GramTable, ids: np.ndarray, bare_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of equal runs of words: in `ids`, and in the words of the test texts. Each pair is verified."""
        # 1. Hash every window, and keep those whose first bits some test run has.
        hashes = self._run_hashes(ids, bare_ids, table.size)
        windows = np.flatnonzero(table.prefixes[hashes >> table.shift])
        # 2. Look up the range of equal hashes in the sorted table.
        first = np.searchsorted(table.hashes, hashes[windows], "left")
        count = np.minimum(np.searchsorted(table.hashes, hashes[windows], "right") - first, _MAX_TEXTS_PER_RUN)
        windows, first, count = windows[count > 0], first[count > 0], count[count > 0]
        # 3. One entry for each pair: several test texts may hold the same run.
        pair = np.repeat(np.arange(len(windows)), count)
        offset = np.arange(len(pair)) - np.repeat(np.cumsum(count) - count, count)
        windows, positions = windows[pair], table.starts[first[pair] + offset]
        # 4. Compare the words themselves.
        span = np.arange(1, table.size)
        same = (ids[windows[:, None] + span] == self._flat[positions[:, None] + span]).all(axis=1)
        same &= bare_ids[windows] == self._flat_bare[positions]
        return windows[same], positions[same]


class RuleReport(TypedDict):
    """The rule and the test files as the report shows them."""

    ngram: int
    min_words: int
    tests: list[str]


class DroppedRow(TypedDict):
    """A dropped row, the number of matching test texts, and the first matches."""

    id: str
    domain: str
    source: str
    test_texts: int
    touches: list[dict[str, str]]


@dataclass
class Report:
    """How many rows were read, kept and dropped, and why."""

    rule: RuleReport
    test_texts: dict[str, int]
    rows: int = 0
    kept: int = 0
    dropped: int = 0
    dropped_by_domain: dict[str, int] = field(default_factory=dict)
    dropped_by_test: dict[str, int] = field(default_factory=dict)
    dropped_rows: list[DroppedRow] = field(default_factory=list)


def decontaminate(
    sources: Sequence[str],
    tests: Sequence[str],
    output: Path | None,
    *,
    fields: Sequence[str] = (),
    rule: Rule | None = None,
    domain: str | None = None,
    report: Path | None = None,
    force: bool = False,
    reader: RowReader | None = None,
    progress: Progress | None = None,
) -> Report:
    """Copy the rows that match no test text.

    Args:
        sources: rows, as in `load_rows`.
        tests: test files, as in `read_texts`.
        output: the file to write. None: only report.
        fields: top-level fields of the test files to read. Empty: all.
        report: the file for the report as JSON. None: none.
        reader: as in `stream_rows`.

    Raises:
        DataError: unreadable rows or tests, or an output that exists or cannot be written.
    """
    check_targets(output, report, force=force)
    progress = progress or Progress()
    if unread := [file for path in tests for file in find_files(path, suffixes=TEXT_SUFFIXES).unread]:
        progress.log(f"test data: {unread_note(unread)}")
    index = ContaminationIndex((text for path in tests for text in read_texts(path, fields)), rule)
    counts = {kind: index.counts[kind] for kind in ("ngram", "whole", "message", "ignored")}
    result = Report({"ngram": index.rule.ngram, "min_words": index.rule.min_words, "tests": list(tests)}, counts)
    domains: Counter[str] = Counter()
    test_files: Counter[str] = Counter()
    rows = stream_rows(sources, domain=domain, reader=reader, progress=progress, label="rows compared with the tests")
    with row_writers([output] if output else [], report, force=force) as (writers, write_report):
        for row, matches in index.find_matches(rows):
            result.rows += 1
            if not matches:
                result.kept += 1
                for write in writers:
                    write(row)
                continue
            domains[row.domain] += 1
            test_files.update({_file_of(match.test) for match in matches})
            result.dropped_rows.append(
                {
                    "id": row.id,
                    "domain": row.domain,
                    "source": row.source,
                    "test_texts": len(matches),
                    "touches": [asdict(match) for match in matches[:_MAX_MATCHES_SHOWN]],
                }
            )
        result.dropped = result.rows - result.kept
        result.dropped_by_domain = dict(sorted(domains.items()))
        result.dropped_by_test = dict(sorted(test_files.items()))
        write_report(asdict(result))
    return result


def _file_of(location: str) -> str:
    """`tests/gsm8k.jsonl:12` or `tests/a.json[3]` -> its file."""
    if location.endswith("]"):
        return location.removesuffix("]").rpartition("[")[0]
    file, _, line = location.rpartition(":")
    return file if file and line.isdigit() else location
