"""Time and memory of decontaminating 100,000 rows on one core, and what the rule finds of leaks planted among them.

Rows are made of the zoo's own sentences and random words, about 500 words a conversation (UltraChat 2 has 400 to 560
tokens). Test items are made the same way, or are real files (--against). Into one row of 1,000 a run of a test text is
planted, in another case and punctuation: exactly those rows must be dropped. Aim: below 60 s and 500 MB.

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
from ultrafuser.data.tools.ngrams import words
from ultrafuser.data.tools.texts import read_texts

ZOO = "package:ultrafuser/zoo/data/{}.train.jsonl"
AIM_S, AIM_MB = 60, 500
WORDS = 500  # of a conversation


def vocabulary() -> list[str]:
    """Words of the zoo's rows as often as they stand there, so that common words are common.

    Regular expressions and formulas without blanks are left out: they are many words in one piece, so that two texts
    made of pieces would share 13 of them.
    """
    rows = [row for name in ("text", "code", "math") for row in load_rows(ZOO.format(name))]
    pieces = [piece for row in rows for _, content in row.messages for piece in content.split()]
    return [piece for piece in pieces if len(words(piece)) == 1]


def sentence(rng: random.Random, spoken: list[str], size: int) -> str:
    """Runs of three real words: the grams of five words and more are new, shorter ones real."""
    starts = rng.choices(range(len(spoken) - 3), k=-(-size // 3))
    return " ".join(word for start in starts for word in spoken[start : start + 3])


def make(folder: Path, rows: int, against: str | None, seed: int) -> tuple[Path, str, set[str]]:
    """A file of rows, test data, and the ids of the rows with a planted leak."""
    rng, spoken = random.Random(seed), vocabulary()
    tests = against
    if tests is None:
        file = folder / "tests.jsonl"
        items = [{"question": sentence(rng, spoken, 60), "answer": sentence(rng, spoken, 100)} for _ in range(5000)]
        file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        tests = str(file)
    # Grams that the clean rows may hold by chance are no leaks of ours: plant runs of at least 13 words.
    long = [spoken_words for text in read_texts(tests) if len(spoken_words := words(text.text)) >= 20]
    path, planted = folder / "rows.jsonl", set()
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            question, answer = sentence(rng, spoken, WORDS // 5), sentence(rng, spoken, WORDS - WORDS // 5)
            if number % 1000 == 7:
                run = rng.choice(long)
                start = rng.randrange(len(run) - 19)
                answer = f"{answer} {' -- '.join(run[start : start + 20]).upper()}"
                planted.add(str(number))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            row = {"id": str(number), "domain": ("text", "code", "math")[number % 3], "messages": turns}
            stream.write(json.dumps(row) + "\n")
    return path, tests, planted


def measure(rows: int, against: str | None, seed: int) -> dict[str, Any]:
    """Seconds and memory of reading, comparing and writing, and what was found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, tests, planted = make(folder, rows, against, seed)
        before_mb = _peak_mb()
        wall, cpu = time.perf_counter(), time.process_time()
        index = ContaminationIndex(read_texts(tests))
        index_s = time.perf_counter() - wall
        grams = sum(len(table.hashes) for table in index._grams)
        del index
        wall, cpu = time.perf_counter(), time.process_time()
        done = decontaminate([str(path)], [tests], folder / "clean.jsonl")
        found = {row["id"] for row in done.dropped_rows}
        return {
            "rows": rows, "size_mb": path.stat().st_size / 1e6, "test_grams": grams, "index_s": index_s,
            "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
            "peak_mb": _peak_mb(), "peak_before_mb": before_mb, "aim_s": AIM_S, "aim_mb": AIM_MB,
            "planted": len(planted), "found": len(found & planted), "others_dropped": len(found - planted),
        }  # fmt: skip


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--against", help="test data; default: 5,000 made items")
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
