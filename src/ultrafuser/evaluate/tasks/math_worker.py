"""The process that compares mathematical answers: it reads pairs as JSON lines, and writes true or false."""

from __future__ import annotations

import contextlib
import json
import logging
import sys

MEMORY_BYTES = 4 * 2**30


def main() -> None:
    """Answer until the input ends."""
    # Bounds the memory of answers such as 9^{9^{9^9}}. Without this limit, only the time is bounded.
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.WARNING)
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", config, parsing_timeout=None)

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        answer, reference = json.loads(line)
        same = verify(read(reference), read(answer), allow_set_relation_comp=True, timeout_seconds=None)
        sys.stdout.write(json.dumps(same) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
