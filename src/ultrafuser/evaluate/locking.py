"""A lock on a results folder: one evaluation or comparison works in it at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ultrafuser.errors import DataError

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]


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
