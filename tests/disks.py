"""Outputs that cannot be written: below a file, read-only, on a full disk, and a limit on the size of files."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def file_limit(size_bytes: int) -> Iterator[None]:
    """Let this process write no file beyond a size, as on a disk that fills."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, size_kb: int = 64, options: str = "rw") -> Iterator[Path]:
    """A disk of this size, as root. Otherwise the test is skipped."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k,{options}", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Fill a small disk."""
    with suppress(OSError), (folder / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


UNWRITABLE = ("below a file", "wrong kind", "a long name", "no permission", "read-only", "a full disk")


@contextmanager
def unwritable(kind: str, tmp_path: Path, *, suffix: str = "", folder: bool = False) -> Iterator[tuple[Path, str]]:
    """A file or folder that cannot be written, and the words of the error.

    Args:
        suffix: of the name.
    """
    out = f"out{suffix}"
    if kind == "below a file":
        (tmp_path / "file").write_text("")
        yield tmp_path / "file" / out, f"{out}: could not be written: a file is where a folder is expected"
    elif kind == "wrong kind" and folder:
        (tmp_path / out).write_text("")
        yield tmp_path / out, f"{out}: is a file, expected a folder. Choose another output"
    elif kind == "wrong kind":
        (tmp_path / out).mkdir()
        yield tmp_path / out, f"{out}: is a folder, expected a file name"
    elif kind == "a long name":
        name = "x" * 300 + suffix
        yield tmp_path / name, f"{name}: could not be written: the name is too long"
    elif kind == "no permission":
        if not os.geteuid():
            pytest.skip("root may write everywhere")
        (tmp_path / "closed").mkdir(mode=0o555)
        yield tmp_path / "closed" / out, f"{out}: could not be written: permission denied"
    elif kind == "read-only":
        with small_disk(tmp_path / "disk", options="ro") as disk:
            yield disk / out, f"{out}: could not be written: the file system is read-only"
    else:
        assert kind == "a full disk"
        with small_disk(tmp_path / "disk") as disk:
            fill(disk)
            yield disk / "new" / out, f"{out}: could not be written: the disk is full"
