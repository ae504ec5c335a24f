"""One process at a time in a folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ultrafuser.errors import DataError

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


@contextmanager
def exclusive_lock(folder: Path, purpose: str, name: str = "lock") -> Iterator[None]:
    """Hold the lock of an existing folder, in its file `name`, until the block or the process ends.

    The file is removed at the end of the block. Nothing is locked on a file system without locks.

    Args:
        purpose: what runs in the folder, for the error: `evaluation`, say.

    Raises:
        DataError: another process, or this one elsewhere, holds the lock.
    """
    file = folder / name
    while True:
        with file.open("w") as lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise DataError(
                        f"{folder}: another {purpose} is running in this folder. Wait until it ends, or choose another folder"
                    ) from None
                except OSError as error:
                    if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
            if fcntl is not None and not _is_same(file, lock.fileno()):
                continue  # its owner removed it between our two calls
            try:
                yield
            finally:
                with suppress(OSError):
                    file.unlink()
            return


def _is_same(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
