"""Measure recall and precision of `ultrafuser data dedup` on edited copies of real rows.

For each kind of edit, one copy of every row (default: the zoo's) is added: words replaced by words of other rows, an
opening and a closing phrase added, sentences in another order. Recall is the share of copies that are found with their
original. Precision is the share of dropped rows that are dropped for their own original. Time and memory are measured on
copies that share nothing, because every word carries a number.

    python benchmarks/near_duplicates.py [--data FILE...] [--on conversation] [--many 20000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows
from ultrafuser.data.tools.near_duplicates import COMPARED_ROLES, NearDuplicateRule, find_clusters

ZOO = [f"package:ultrafuser/zoo/data/{name}.train.jsonl" for name in ("text", "code", "math", "mixed")]
THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5)
Edit = Callable[[random.Random, str], str]


def replaced(share: float, vocabulary: list[str]) -> Edit:
    """Replace a share of the words by random ones. Shingles do not tell a synonym from any other word."""

    def edit(rng: random.Random, text: str) -> str:
        tokens = re.split(r"(\s+)", text)
        indices = [i for i, token in enumerate(tokens) if token.strip()]
        for i in rng.sample(indices, round(share * len(indices))):
            tokens[i] = rng.choice(vocabulary)
        return "".join(tokens)

    return edit


def framed(rng: random.Random, text: str) -> str:
    """Add an opening and a closing phrase, and change case and punctuation."""
    opening = rng.choice(["Could you help me with this, please?", "I have a question for you.", "Hello there,"])
    closing = rng.choice(["Thank you very much in advance.", "Please take your time.", "Let me know."])
    return f"{opening} {text.upper().replace('. ', '; ')} {closing}"


def reordered(rng: random.Random, text: str) -> str:
    """Shuffle sentences and lines."""
    sentences = re.split(r"(?<=[.!?])\s+|\n+", text)
    rng.shuffle(sentences)
    return " ".join(sentences)


def edited(row: Row, id: str, edit: Edit, rng: random.Random) -> Row:
    """A copy with every message edited."""
    return replace(row, id=id, messages=tuple((role, edit(rng, content)) for role, content in row.messages))


def recall_and_precision(rows: list[Row], copies: list[Row], rule: NearDuplicateRule) -> tuple[float, float]:
    """Recall and precision of finding the copies."""
    all_rows = [*rows, *copies]
    hits = wrong = 0
    for cluster in find_clusters(all_rows, rule):
        original = all_rows[cluster.kept].id.split("/")[0]
        dropped = [*cluster.exact, *(index for index, _ in cluster.near)]
        correct = sum(all_rows[index].id.split("/")[0] == original for index in dropped)
        hits, wrong = hits + correct, wrong + len(dropped) - correct
    return hits / len(copies), hits / (hits + wrong) if hits + wrong else 1.0


def load(rows: list[Row], count: int, rule: NearDuplicateRule) -> dict[str, Any]:
    """Seconds, and memory above that of the rows, to compare `count` rows that share nothing."""
    rng = random.Random(0)
    numbered = [
        edited(rows[i % len(rows)], f"{i:07}", lambda _, text, i=i: re.sub(r"(\w+)", rf"\g<1>{i}", text), rng)  # type: ignore[misc]
        for i in range(count)
    ]
    baseline_mb, start = _peak_mb(), time.perf_counter()
    num_clusters = len(find_clusters(numbered, rule))
    seconds = time.perf_counter() - start
    return {"rows": count, "kept": num_clusters, "s": seconds, "mb_above_rows": _peak_mb() - baseline_mb}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=ZOO)
    parser.add_argument("--on", choices=list(COMPARED_ROLES), default="conversation")
    parser.add_argument("--many", type=int, default=20_000, help="rows for time and memory (0: do not measure them)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    # drop duplicates first, since they would blur both figures
    loaded = [row for path in args.data for row in load_rows(path)]
    rows = [
        replace(loaded[cluster.kept], id=f"{i:06}")
        for i, cluster in enumerate(find_clusters(loaded, NearDuplicateRule(0.5, args.on)))
    ]
    vocabulary = [word for row in rows for _, content in row.messages for word in content.split()]
    edits: dict[str, Edit] = {
        f"{share:.0%} of the words": replaced(share, vocabulary) for share in (0.02, 0.05, 0.1, 0.2)
    }
    edits |= {"another frame": framed, "sentences in another order": reordered}
    table = Table(title=f"{len(rows):,} rows, compared on the {args.on}: recall (precision)")
    for column in ("edit", *(f"threshold {value}" for value in THRESHOLDS)):
        table.add_column(column, justify="left" if column == "edit" else "right")
    result: dict[str, Any] = {"rows": len(rows), "on": args.on, "found": {}}
    for name, edit in edits.items():
        rng = random.Random(args.seed)
        copies = [edited(row, f"{row.id}/copy", edit, rng) for row in rows]
        cells = {
            str(value): recall_and_precision(rows, copies, NearDuplicateRule(value, args.on)) for value in THRESHOLDS
        }
        result["found"][name] = {key: {"recall": r, "precision": p} for key, (r, p) in cells.items()}
        table.add_row(name, *(f"{r:.3f} ({p:.3f})" for r, p in cells.values()))
    Console().print(table)
    if args.many:
        result["load"] = load(rows, args.many, NearDuplicateRule(on=args.on))
        Console().print(result["load"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
