"""Parts of a data set for training, validation and test: stratified by domain, seeded, and without duplicates across."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ultrafuser.data.schema import Row
from ultrafuser.data.tools.near_duplicates import NearDuplicateRule, connected
from ultrafuser.data.tools.streaming import stream_rows
from ultrafuser.data.writing import check_layout, check_target, row_writer, write_json
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress

REPORT = "split.json"


def assign(
    rows: Sequence[Row],
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    likeness: NearDuplicateRule | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """The part of each row.

    Rows that are duplicates of each other, also by way of others, go to one part. Every part gets its share of each domain
    to the row, as far as such groups allow. The result depends on the rows and the seed, not on their order.

    Raises:
        DataError: shares that do not add up to 1.
        MissingExtraError: near duplicates count and datasketch is not installed.
    """
    check_shares(shares)
    groups = connected(rows, likeness or NearDuplicateRule(), progress)
    need = {domain: _targets(count, shares) for domain, count in sorted(Counter(row.domain for row in rows).items())}

    def order(group: list[int]) -> tuple[int, bytes]:
        text = "\x1f".join([str(seed), *sorted(f"{rows[number].id}\x1e{rows[number].messages}" for number in group)])
        return -len(group), blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    parts = [""] * len(rows)
    for group in sorted(groups, key=order):  # large groups first, while there is room for them
        domains = Counter(rows[number].domain for number in group)
        best = max(shares, key=lambda part: sum(need[domain][part] * n for domain, n in domains.items()))
        for number in group:
            parts[number] = best
            need[rows[number].domain][best] -= 1
    return parts


def check_shares(shares: Mapping[str, float]) -> None:
    """
    Raises:
        DataError: fewer than two parts, or shares that are not positive or do not add up to 1.
    """
    if len(shares) < 2 or any(share <= 0 for share in shares.values()) or not math.isclose(sum(shares.values()), 1):
        given = ", ".join(f"{name}={share:g}" for name, share in shares.items())
        raise DataError(f"parts {given}: expected two or more with positive shares that add up to 1")


def _targets(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers of rows in proportion to the shares: the largest remainders are rounded up."""
    exact = {part: count * share for part, share in shares.items()}
    out = {part: math.floor(value + 1e-9) for part, value in exact.items()}
    for part in sorted(exact, key=lambda part: out[part] - exact[part])[: count - sum(out.values())]:
        out[part] += 1
    return out


def split(
    sources: Sequence[str],
    folder: Path,
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    likeness: NearDuplicateRule | None = None,
    kind: str = "jsonl",
    domain: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a file for each part and `split.json` into a folder; all of them appear at the end.

    Returns:
        the report, as in split.json: rows by part and domain, and how many rows have duplicates.

    Raises:
        DataError: rows that cannot be read, parts that cannot be made or written, or files that are there already.
        MissingExtraError: near duplicates count and datasketch is not installed.
    """
    check_shares(shares)
    likeness = likeness or NearDuplicateRule()
    targets = {part: folder / f"{part}.{kind}" for part in shares}
    if folder / REPORT in targets.values():
        raise DataError(
            f"part {Path(REPORT).stem!r}: {folder / REPORT} is the report; choose another name, or another kind"
        )
    for target in targets.values():
        check_layout(target, None)
    for target in (*targets.values(), folder / REPORT):
        check_target(target, force=force)
    rows = list(stream_rows(sources, domain=domain, progress=progress, what="rows read"))
    parts = assign(rows, shares, seed=seed, likeness=likeness, progress=progress)
    counts = {part: Counter(row.domain for row, own in zip(rows, parts, strict=True) if own == part) for part in shares}
    empty = [part for part in shares if not counts[part]]
    if empty:
        raise DataError(f"part {empty[0]!r} would be empty: {len(rows)} rows are too few; raise its share, or use more")
    report: dict[str, Any] = {
        "rows": len(rows),
        "seed": seed,
        "shares": dict(shares),
        "rule": {"threshold": likeness.threshold, "on": likeness.on, "shingle": likeness.shingle},
        "parts": {part: {"rows": own.total(), "domains": dict(sorted(own.items()))} for part, own in counts.items()},
        "files": {part: str(target) for part, target in targets.items()},
    }
    with ExitStack() as stack:
        writers = {part: stack.enter_context(row_writer(target, force=force)) for part, target in targets.items()}
        for row, part in zip(rows, parts, strict=True):
            writers[part](row)
    write_json(folder / REPORT, report, force=force)
    return report
