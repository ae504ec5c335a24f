"""Files that appear when they are complete, checks of outputs before long work, and errors of the disk in words."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ultrafuser.errors import DataError, DiskError

_PROBLEMS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the limit of this process or disk",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EIO: "the disk reports an input/output error",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a file is where a folder is expected",
    errno.EISDIR: "a folder is where a file is expected",
    errno.ELOOP: "too many symbolic links",
    errno.ESTALE: "the network file system lost it",
}
_NUMBER = re.compile(r"(?:\(os error |\[Errno )(\d+)[)\]]")
_SPACE = [_PROBLEMS[number] for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
_DRAFT = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?:tmp|uneven)", re.DOTALL)
_PROBE_BYTES = 4096  # a full disk often still takes an empty file


def disk_problem(error: BaseException | None) -> str | None:
    """The reason, in words, why a file could not be written or read. None: the error has another cause."""
    if isinstance(error, OSError) and error.errno is not None:
        return _PROBLEMS.get(error.errno)
    text = str(error)
    if number := _NUMBER.search(
        text
    ):  # of safetensors, of tokenizers, which raises a bare Exception, and of shutil.Error
        return _PROBLEMS.get(int(number[1]))
    writer = ("inline_container", "PytorchStreamWriter", "iostream error")
    if isinstance(error, RuntimeError) and any(words in text for words in writer):
        return "the disk is full, or not writable"  # torch.save does not say which
    return None


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn an error of the disk in the block into one that names the file or folder that the block writes.

    Raises:
        DiskError: `target` could not be written.
    """
    try:
        yield
    except Exception as error:
        problem = disk_problem(error) or disk_problem(error.__cause__)
        if problem is None or isinstance(error, DiskError):
            raise
        raise DiskError(target, problem, next_step(problem)) from error


def next_step(problem: str) -> str:
    """What the user can do about a problem of the disk."""
    return "Free space or choose another output" if problem in _SPACE else "Choose another output"


# ---------------------------------------------------------------- before the work


def check_target(target: Path, *, force: bool) -> None:
    """Check that a file can be written, before long work starts.

    Raises:
        DataError: the file exists and `force` is false, it is a folder, or it cannot be written.
    """
    target = target.expanduser().absolute()
    _check_kind(target, force)
    if not _is_device(target):
        _probe(target)


def check_folder(folder: Path) -> None:
    """Check that a folder can be made beside its neighbours and written to, before long work starts.

    Raises:
        DataError: it is a file, or it cannot be written.
    """
    folder = folder.expanduser().absolute()
    if _exists(folder) and not folder.is_dir():
        raise DataError(f"{folder}: is a file, expected a folder. Choose another output")
    _probe(folder)
    if folder.is_dir():
        _probe(folder / "probe")


def make_folder(folder: Path) -> None:
    """Make the folder of a run, check that it can be written to, and remove the drafts of killed processes from it.

    Raises:
        DataError: it is a file, or it cannot be written.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_drafts(folder)


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """As `make_folder`. A run that wrote nothing into it leaves neither it nor the folders that were made above it.

    Raises:
        DataError: as `make_folder`.
    """
    new_folders = [path for path in (folder, *folder.parents) if not _exists(path)]
    make_folder(folder)
    try:
        yield
    finally:
        _remove_empty(new_folders)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()  # fails if it holds a file


def _check_kind(target: Path, force: bool) -> None:
    if _exists(target) and target.is_dir():
        raise DataError(f"{target}: is a folder, expected a file name")
    if _exists(target) and not force:
        raise DataError(f"{target}: exists. Replace it with --force, or choose another output")


def _exists(target: Path) -> bool:
    """Whether a path exists. A path that cannot exist, such as one with a name that is too long, does not."""
    try:
        return target.exists()
    except OSError:
        return False


def _is_device(target: Path) -> bool:
    """Whether a target is written in place because it can only be so: a pipe or device such as /dev/stdout."""
    return _exists(target) and not target.is_file()


def _probe(target: Path) -> None:
    """Write a few bytes beside the target, in folders that are made for it, and remove all again."""
    draft, made = draft_of(target), []
    try:
        for folder in reversed(draft.parents):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        draft.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        raise DataError(str(_unwritable(target, error))) from error  # nothing is there to resume
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):  # another process has put a file there
                folder.rmdir()


# ---------------------------------------------------------------- all or nothing


@contextmanager
def atomic_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary file beside `target`. It replaces `target` when the block succeeds, and is removed when it fails.

    Raises:
        DataError: `target` exists and `force` is false, or it cannot be written.
    """
    with atomic_files([target], force=force) as [draft], naming(target, draft):
        yield draft


@contextmanager
def atomic_files(targets: Sequence[Path], *, force: bool = False) -> Iterator[list[Path]]:
    """Temporary files beside the targets. All of them replace their targets when the block succeeds, or none does.

    A target that is a device or a pipe, such as /dev/stdout, is written in place. Errors in the block stay as they are.
    `naming` makes those of one target clear.

    Raises:
        DataError: a target exists and `force` is false, or it cannot be written.
    """
    targets = [target.expanduser().absolute() for target in targets]
    drafts = [target if _is_device(target) else draft_of(target) for target in targets]
    pairs = [(draft, target) for draft, target in zip(drafts, targets, strict=True) if draft != target]
    for target in targets:
        _check_kind(target, force)
    new_folders = [folder for _, target in pairs for folder in target.parents if not _exists(folder)]
    try:
        for draft, target in pairs:
            with naming(target, draft):
                target.parent.mkdir(parents=True, exist_ok=True)
                remove_stale_drafts(target.parent, target.name)
                draft.touch()
        yield drafts
        for draft, target in pairs:
            with naming(target, draft):
                os.replace(draft, target)
    finally:
        for draft, _ in pairs:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        _remove_empty(new_folders)


@contextmanager
def naming(target: Path, draft: Path) -> Iterator[None]:
    """Name the target in an error of the disk. Errors of other files, which the block reads, stay as they are.

    Raises:
        DiskError: the target or its draft could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        name = getattr(error, "filename", None)
        if name is not None and str(name) not in (str(draft), str(target), str(target.parent)):
            raise
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError | SafetensorError) -> DiskError:
    reason = disk_problem(error) or getattr(error, "strerror", None) or str(error)
    return DiskError(target, reason, f"Nothing was changed. {next_step(reason)}")


def write_json(path: Path, value: Any, *, force: bool = True) -> None:
    """Write a value as indented JSON. A lone surrogate in a text is written as its escape, which JSON allows.

    Raises:
        DataError: as `atomic_file`.
    """
    write_text(path, json_text(value), force=force)


def json_text(value: Any) -> str:
    """A value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str, *, force: bool = True) -> None:
    """Write a text file as UTF-8. A lone surrogate is written as its escape.

    Raises:
        DataError: as `atomic_file`.
    """
    with atomic_file(path, force=force) as draft:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")


# ---------------------------------------------------------------- drafts and room


def draft_of(target: Path) -> Path:
    """Where a target is written until it is complete: `.NAME.PID.tmp` beside it."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def remove_stale_drafts(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of the target `name`, or of all targets in a folder."""
    for entry in os.scandir(folder):
        match = _DRAFT.fullmatch(entry.name)
        if match is None or name not in (None, match["name"]) or _is_running(int(match["pid"])):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            with suppress(OSError):
                os.unlink(entry.path)


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def allocate(file: Path, size_bytes: int) -> None:
    """Make a new file of this size whose blocks are on the disk, so that writing to its memory map cannot fail.

    A sparse file would end the process with SIGBUS when the disk is full.

    Raises:
        OSError: the disk is full, or not writable.
    """
    with file.open("wb") as stream:
        try:
            if size_bytes:
                os.posix_fallocate(stream.fileno(), 0, size_bytes)
        except (AttributeError, OSError) as error:  # not on Windows, nor on every file system
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            os.truncate(stream.fileno(), size_bytes)
