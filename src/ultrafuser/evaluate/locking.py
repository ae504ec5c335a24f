"""Results that are whole or not there, in a folder where one works at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultrafuser.data.writing import atomic_file
from ultrafuser.errors import DataError

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]


def write_json(file: Path, tree: Mapping[str, Any]) -> None:
    """All of it, or what was there before; answers may hold half a character, so other letters than ASCII are escaped.

    Raises:
        DataError: it cannot be written.
    """
    with atomic_file(file, force=True) as draft:
        draft.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Only one evaluation or comparison at a time works in a folder.

    Raises:
        DataError: another one does.
    """
    with (folder / "lock").open("w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"{folder}: another {what} is at work there; wait for it, or choose another output"
                ) from None
        yield
