"""Measure time, memory and recall of decontaminating 100,000 rows on one core.

Rows are made of the zoo's own sentences and random words, about 500 words per conversation (UltraChat 2 has 400 to 560
tokens). Test items are made the same way, or come from files (--against). One row in 1,000 contains a run of words from a
test text, in another case and punctuation. Exactly those rows must be dropped. Target: below 60 s and 500 MB.

    python benchmarks/decontamination.py [--rows 100000] [--against FILE_OR_FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ultrafuser.data.sources import load_rows
from ultrafuser.data.tools.decontaminate import ContaminationIndex, decontaminate
from ultrafuser.data.tools.ngrams import signed_words, words
from ultrafuser.data.tools.texts import read_texts

ZOO = "package:ultrafuser/zoo/data/{}.train.jsonl"
TARGET_S, TARGET_MB = 60, 500
WORDS = 500  # per conversation


def vocabulary() -> list[str]:
    """Words of the zoo's rows, repeated as often as they occur, so that common words are common.

    Regular expressions and formulas without blanks are left out. They hold many words each, so two texts made of them
    would share runs of 13 words by chance.
    """
    rows = [row for name in ("text", "code", "math") for row in load_rows(ZOO.format(name))]
    fragments = [fragment for row in rows for _, content in row.messages for fragment in content.split()]
    return [fragment for fragment in fragments if len(words(fragment)) == 1]


def sentence(rng: random.Random, corpus: list[str], size: int) -> str:
    """Text made of runs of three real words. Its runs of five words or more are new, shorter ones are real."""
    starts = rng.choices(range(len(corpus) - 3), k=-(-size // 3))
    return " ".join(word for start in starts for word in corpus[start : start + 3])


def make(folder: Path, rows: int, against: str | None, seed: int) -> tuple[Path, str, set[str]]:
    """A file of rows, test data, and the ids of the rows with a planted leak."""
    rng, corpus = random.Random(seed), vocabulary()
    tests = against
    if tests is None:
        file = folder / "tests.jsonl"
        items = [{"question": sentence(rng, corpus, 60), "answer": sentence(rng, corpus, 100)} for _ in range(5000)]
        file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        tests = str(file)
    # Clean rows may hold shorter runs by chance, so plant runs of 20 words.
    long = [text_words for text in read_texts(tests) if len(text_words := signed_words(text.text)) >= 20]
    path, planted = folder / "rows.jsonl", set()
    with path.open("w", encoding="utf-8") as stream:
        for index in range(rows):
            question, answer = sentence(rng, corpus, WORDS // 5), sentence(rng, corpus, WORDS - WORDS // 5)
            if index % 1000 == 7:
                run = rng.choice(long)
                start = rng.randrange(len(run) - 19)
                leak = " -- ".join(f"{signs} {word}" for signs, word in run[start : start + 20])
                answer = f"{answer}\n\n{leak.upper()}"
                planted.add(str(index))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            row = {"id": str(index), "domain": ("text", "code", "math")[index % 3], "messages": turns}
            stream.write(json.dumps(row) + "\n")
    return path, tests, planted


def measure(rows: int, against: str | None, seed: int) -> dict[str, Any]:
    """Seconds and memory of reading, comparing and writing, and how many planted rows were found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, tests, planted = make(folder, rows, against, seed)
        before_mb = _peak_mb()
        wall, cpu = time.perf_counter(), time.process_time()
        index = ContaminationIndex(read_texts(tests))
        index_s = time.perf_counter() - wall
        grams = sum(len(table.hashes) for table in index._tables)
        del index
        wall, cpu = time.perf_counter(), time.process_time()
        result = decontaminate([str(path)], [tests], folder / "clean.jsonl")
        dropped = {row["id"] for row in result.dropped_rows}
        return {
            "rows": rows, "size_mb": path.stat().st_size / 1e6, "test_grams": grams, "index_s": index_s,
            "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
            "peak_mb": _peak_mb(), "peak_before_mb": before_mb, "target_s": TARGET_S, "target_mb": TARGET_MB,
            "planted": len(planted), "found": len(dropped & planted), "others_dropped": len(dropped - planted),
        }  # fmt: skip


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--against", help="test data; default: 5,000 generated items")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    result = measure(args.rows, args.against, args.seed)
    for key, value in result.items():
        Console().print(f"{key.replace('_', ' ')}: {value:,.1f}" if isinstance(value, float) else f"{key}: {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
