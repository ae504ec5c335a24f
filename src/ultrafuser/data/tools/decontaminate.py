"""Drop training rows that share words with test data: the paper's 13-gram rule, with every hit verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from ultrafuser.data.schema import Row
from ultrafuser.data.tools.ngrams import window_hashes, words
from ultrafuser.data.tools.streaming import stream_rows
from ultrafuser.data.tools.texts import Text, read_texts
from ultrafuser.data.writing import check_targets, row_writer, write_json
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress

_ROWS_AT_ONCE = 500
_TOUCHES_SHOWN = 5  # test texts named for a dropped row; all are counted
_TEXTS_A_RUN = 64  # test texts that hold the same words; of boilerplate in all of them, more would say no more
_FEWEST_WORDS = 3  # shorter test texts ("B", "Yes") say nothing


@dataclass(frozen=True)
class Rule:
    """When a row touches a test text.

    Attributes:
        ngram: words in a row that a long test text and a conversation share.
        min_words: a test text of `min_words` to `ngram - 1` words counts when the whole of it stands in a conversation; a
            shorter one only when it is the whole of a user's message.
    """

    ngram: int = 13  # the paper, appendix F
    min_words: int = 8  # GPT-3's lower bound for short test texts, arXiv 2005.14165, appendix C

    def __post_init__(self) -> None:
        if not _FEWEST_WORDS <= self.min_words <= self.ngram:
            raise DataError(
                f"got n-grams of {self.ngram} words and whole texts from {self.min_words} words on; expected "
                f"{_FEWEST_WORDS} <= min_words <= ngram"
            )


@dataclass(frozen=True)
class Touch:
    """What a row shares with a test text: the kind of hit, and the shared words, normalised."""

    test: str
    field: str
    kind: str
    words: str


@dataclass
class _Grams:
    """All runs of `size` words to look for: hashes in order, and where each run stands in the test words."""

    size: int
    hashes: np.ndarray  # (N,) uint64, ascending
    starts: np.ndarray  # (N,) the place of the run in the flat test words
    maybe: np.ndarray  # (2^bits,) bool: whether any hash has these highest bits
    shift: np.uint64


class ContaminationIndex:
    """The texts of test files, ready to be looked for in rows.

    A hash only finds candidates: every hit is then compared word by word, so there is no false one.
    """

    def __init__(self, texts: Iterable[Text], rule: Rule | None = None) -> None:
        """
        Raises:
            DataError: no text long enough to look for.
        """
        self.rule = rule or Rule()
        self.texts: list[Text] = []
        self._kinds: list[str] = []
        self.counts: Counter[str] = Counter()
        self._ids: dict[str, int] = {}  # word -> number, from 1 on; 0 is any other word
        self._messages: dict[tuple[str, ...], list[int]] = {}
        flat: list[int] = []
        begins: list[int] = []
        starts: dict[int, list[int]] = {}
        for text in texts:
            spoken = words(text.text)
            kind = self._kind(len(spoken))
            self.counts[kind] += 1
            if kind == "ignored":
                continue
            number = len(self.texts)
            self.texts.append(text)
            self._kinds.append(kind)
            begins.append(len(flat))
            if kind == "message":
                self._messages.setdefault(tuple(spoken), []).append(number)
                continue
            size = min(self.rule.ngram, len(spoken))
            starts.setdefault(size, []).extend(range(len(flat), len(flat) + len(spoken) - size + 1))
            flat += [self._ids.setdefault(word, len(self._ids) + 1) for word in spoken]
        if not self.texts:
            raise DataError(
                f"the test files hold no text of {_FEWEST_WORDS} words or more, so there is nothing to look for"
            )
        self._flat = np.array(flat, np.int64)
        self._begins = np.array(begins, np.int64)
        draws = np.random.default_rng(0).integers(0, 1 << 63, len(self._ids) + 1, np.uint64)
        self._codes = draws * np.uint64(2) + np.uint64(1)  # a code for each word
        self._grams = [self._table(size, np.array(places, np.int64)) for size, places in sorted(starts.items())]

    def _kind(self, length: int) -> str:
        if length >= self.rule.ngram:
            return "ngram"
        if length >= self.rule.min_words:
            return "whole"
        return "message" if length >= _FEWEST_WORDS else "ignored"

    def _table(self, size: int, starts: np.ndarray) -> _Grams:
        hashes = window_hashes(self._codes[self._flat], size)[starts]
        order = np.argsort(hashes, kind="stable")
        bits = min(26, max(16, int(16 * len(hashes)).bit_length()))  # about one in 16 other words passes by chance
        shift = np.uint64(64 - bits)
        maybe = np.zeros(1 << bits, bool)
        maybe[hashes >> shift] = True
        return _Grams(size, hashes[order], starts[order], maybe, shift)

    def touches(self, rows: Iterable[Row]) -> Iterator[tuple[Row, list[Touch]]]:
        """Every row and what it touches, in the order of the test texts; nothing for a clean row."""
        stream = iter(rows)
        while batch := list(islice(stream, _ROWS_AT_ONCE)):
            for row, found in zip(batch, self._search(batch), strict=True):
                yield row, [self._touch(*one) for one in sorted(found.items())]

    def _search(self, batch: Sequence[Row]) -> list[dict[int, tuple[str, ...]]]:
        """For each row, the numbers of the test texts that it touches, with the shared words."""
        found: list[dict[int, tuple[str, ...]]] = [{} for _ in batch]
        spoken: list[str] = []
        begins = []
        for row, touched in zip(batch, found, strict=True):
            begins.append(len(spoken))
            for role, content in row.messages:
                mine = words(content)
                spoken += mine
                if role == "user" and len(mine) < self.rule.min_words:
                    touched |= {number: tuple(mine) for number in self._messages.get(tuple(mine), ())}
            spoken.append("")  # no word: nothing is found across rows
        ids = np.fromiter(map(self._ids.get, spoken, repeat(0)), np.int64, len(spoken))
        codes = self._codes[ids]
        for grams in self._grams:
            windows, places = self._hits(grams, ids, codes)
            owners = np.searchsorted(begins, windows, "right") - 1
            texts = np.searchsorted(self._begins, places, "right") - 1
            for window, owner, number in zip(windows.tolist(), owners.tolist(), texts.tolist(), strict=True):
                if number not in found[owner]:
                    found[owner][number] = tuple(spoken[window : window + grams.size])
        return found

    def _hits(self, grams: _Grams, ids: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of a run of words among `ids` and the same run in the test words, verified."""
        hashes = window_hashes(codes, grams.size)
        windows = np.flatnonzero(grams.maybe[hashes >> grams.shift])
        first = np.searchsorted(grams.hashes, hashes[windows], "left")
        many = np.minimum(np.searchsorted(grams.hashes, hashes[windows], "right") - first, _TEXTS_A_RUN)
        windows, first, many = windows[many > 0], first[many > 0], many[many > 0]
        # one line for each pair: a run may stand in several test texts
        pair = np.repeat(np.arange(len(windows)), many)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(many) - many, many)
        windows, places = windows[pair], grams.starts[first[pair] + within]
        span = np.arange(grams.size)
        same = (ids[windows[:, None] + span] == self._flat[places[:, None] + span]).all(axis=1)
        return windows[same], places[same]

    def _touch(self, number: int, shared: tuple[str, ...]) -> Touch:
        names = {"ngram": f"{self.rule.ngram}-gram", "whole": "whole text", "message": "whole message"}
        text = self.texts[number]
        return Touch(text.where, text.field, names[self._kinds[number]], " ".join(shared))


@dataclass
class Report:
    """What was read, kept and dropped, and why."""

    rule: dict[str, Any]
    test_texts: dict[str, int]
    rows: int = 0
    kept: int = 0
    dropped: int = 0
    dropped_by_domain: dict[str, int] = field(default_factory=dict)
    dropped_by_test: dict[str, int] = field(default_factory=dict)
    dropped_rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self)


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
    progress: Progress | None = None,
) -> Report:
    """Copy the rows that touch no test text.

    Args:
        sources: rows, as in `load_rows`.
        tests: test files, as in `read_texts`; `fields`: their top-level fields to look at, by default all.
        output: the file to write; None: only report.
        report: where the report goes as JSON, if anywhere.

    Raises:
        DataError: rows or tests that cannot be read, an output that cannot be written or is there already.
    """
    check_targets(output, report, force=force)
    index = ContaminationIndex((text for path in tests for text in read_texts(path, fields)), rule)
    counts = {kind: index.counts[kind] for kind in ("ngram", "whole", "message", "ignored")}
    done = Report({"ngram": index.rule.ngram, "min_words": index.rule.min_words, "tests": list(tests)}, counts)
    domains: Counter[str] = Counter()
    files: Counter[str] = Counter()
    rows = stream_rows(sources, domain=domain, progress=progress, what="rows compared with the tests")
    with ExitStack() as stack:
        write = stack.enter_context(row_writer(output, force=force)) if output is not None else None
        for row, touches in index.touches(rows):
            done.rows += 1
            if not touches:
                done.kept += 1
                if write is not None:
                    write(row)
                continue
            domains[row.domain] += 1
            files.update({_file_of(touch.test) for touch in touches})
            facts = {"id": row.id, "domain": row.domain, "source": row.source, "test_texts": len(touches)}
            shown = [asdict(touch) for touch in touches[:_TOUCHES_SHOWN]]
            done.dropped_rows.append(facts | {"touches": shown})
    done.dropped = done.rows - done.kept
    done.dropped_by_domain, done.dropped_by_test = dict(sorted(domains.items())), dict(sorted(files.items()))
    if report is not None:
        write_json(report, done.to_dict(), force=force)
    return done


def _file_of(where: str) -> str:
    """`tests/gsm8k.jsonl:12` or `tests/a.json[3]` -> its file."""
    return where.removesuffix("]").rpartition("[")[0] if where.endswith("]") else _before_line(where)


def _before_line(where: str) -> str:
    file, _, line = where.rpartition(":")
    return file if file and line.isdigit() else where
