"""The process that compares mathematical answers: pairs come in as JSON lines, true or false goes out."""

from __future__ import annotations

import json
import logging
import sys

MEMORY_BYTES = 4 * 2**30


def main() -> None:
    """Answer until the input ends."""
    limit_memory()
    logging.disable(logging.WARNING)
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(answer: str) -> list:
        return parse(f"\\boxed{{{answer}}}", config, parsing_timeout=None)

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        given, reference = json.loads(line)
        same = verify(read(reference), read(given), allow_set_relation_comp=True, timeout_seconds=None)
        sys.stdout.write(json.dumps(same) + "\n")
        sys.stdout.flush()


def limit_memory() -> None:
    """An answer such as 9^{9^{9^9}} must not take all memory; where there is no such limit, time has to do."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


if __name__ == "__main__":
    main()
