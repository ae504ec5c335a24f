"""Split a data set by domain for training, validation and test, seeded and without duplicates across parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict

from ultrafuser.data.files import check_target
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import RowReader
from ultrafuser.data.tools.near_duplicates import NearDuplicateRule, find_groups
from ultrafuser.data.tools.streaming import stream_rows
from ultrafuser.data.writing import check_layout, row_writers
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress

REPORT = "split.json"


class PartCounts(TypedDict):
    """The rows of one part, in all and by domain."""

    rows: int
    domains: dict[str, int]


class SplitReport(TypedDict):
    """The content of `split.json`."""

    rows: int
    seed: int
    shares: dict[str, float]
    rule: dict[str, Any]  # the fields of a NearDuplicateRule
    parts: dict[str, PartCounts]
    files: dict[str, str]


def assign(
    rows: Sequence[Row],
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    rule: NearDuplicateRule | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """The split of each row, by name.

    Rows that are duplicates of each other, directly or through a chain, go to one split. Each split gets its exact share of
    every domain, unless such groups prevent it. The result depends on the rows and the seed, not on the order of the rows.

    Raises:
        DataError: shares that do not add up to 1.
        MissingExtraError: the rule asks for near duplicates and datasketch is not installed.
    """
    check_shares(shares)
    groups = find_groups(rows, rule or NearDuplicateRule(), progress)
    domain_sizes = Counter(row.domain for row in rows)
    missing = {domain: _row_counts(size, shares) for domain, size in sorted(domain_sizes.items())}

    def order(group: list[int]) -> tuple[int, bytes]:
        text = "\x1f".join([str(seed), *sorted(f"{rows[index].id}\x1e{rows[index].messages}" for index in group)])
        return -len(group), blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    names = [""] * len(rows)
    for group in sorted(groups, key=order):  # large groups first, while there is room for them
        domains = Counter(rows[index].domain for index in group)
        # the split that still misses most rows of the group's domains
        best = max(shares, key=lambda name: sum(missing[domain][name] * count for domain, count in domains.items()))
        for index in group:
            names[index] = best
            missing[rows[index].domain][best] -= 1
    return names


def check_shares(shares: Mapping[str, float]) -> None:
    """
    Raises:
        DataError: fewer than two parts, or shares that are not positive or do not add up to 1.
    """
    if len(shares) < 2 or any(share <= 0 for share in shares.values()) or not math.isclose(sum(shares.values()), 1):
        listing = ", ".join(f"{name}={share:g}" for name, share in shares.items())
        raise DataError(f"parts {listing}: expected two or more with positive shares that add up to 1")


def _row_counts(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers of rows in proportion to the shares: the largest remainders are rounded up."""
    exact = {name: count * share for name, share in shares.items()}
    rounded = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: rounded[name] - exact[name])[: count - sum(rounded.values())]:
        rounded[name] += 1
    return rounded


def split(
    sources: Sequence[str],
    folder: Path,
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    rule: NearDuplicateRule | None = None,
    kind: str = "jsonl",
    domain: str | None = None,
    force: bool = False,
    reader: RowReader | None = None,
    progress: Progress | None = None,
) -> SplitReport:
    """Write one file for each split, and `split.json`, into a folder. All of them appear at the end, or none does.

    Raises:
        DataError: unreadable rows, a split without rows, or files that exist or cannot be written.
        MissingExtraError: the rule asks for near duplicates and datasketch is not installed.
    """
    check_shares(shares)
    rule = rule or NearDuplicateRule()
    files = {name: folder / f"{name}.{kind}" for name in shares}
    if folder / REPORT in files.values():
        raise DataError(f"part 'split': {folder / REPORT} is the report. Choose another name, or another kind")
    for file in files.values():
        check_layout(file, None)
    for file in (*files.values(), folder / REPORT):
        check_target(file, force=force)
    rows = list(stream_rows(sources, domain=domain, reader=reader, progress=progress, label="rows read"))
    names = assign(rows, shares, seed=seed, rule=rule, progress=progress)
    counts: dict[str, Counter[str]] = {name: Counter() for name in shares}
    for row, name in zip(rows, names, strict=True):
        counts[name][row.domain] += 1
    empty = [name for name in shares if not counts[name]]
    if empty:
        raise DataError(f"part {empty[0]!r} would be empty: {len(rows)} rows are too few. Raise its share, or use more")
    report: SplitReport = {
        "rows": len(rows),
        "seed": seed,
        "shares": dict(shares),
        "rule": asdict(rule),
        "parts": {
            name: {"rows": count.total(), "domains": dict(sorted(count.items()))} for name, count in counts.items()
        },
        "files": {name: str(file) for name, file in files.items()},
    }
    with row_writers(list(files.values()), folder / REPORT, force=force) as (writers, write_report):
        writer_of = dict(zip(files, writers, strict=True))
        for row, name in zip(rows, names, strict=True):
            writer_of[name](row)
        write_report(report)
    return report
