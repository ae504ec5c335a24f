"""The files behind a path: file types, compression, folders, globs, and files of installed packages."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ultrafuser.errors import CheckpointError, DataError
from ultrafuser.model.references import package_path

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
EXPECTED = f"{', '.join(SUFFIXES)} (also with {', '.join(COMPRESSIONS)})"
_BINARY = (".parquet", ".arrow")  # compressed within


@dataclass
class Files:
    """The files of a source.

    Attributes:
        paths: the files to read, in order. A folder written by `Dataset.save_to_disk` is one of them.
        unread: files of the same folders that are not read.
    """

    paths: list[Path] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)


def file_type(file: Path, suffixes: Sequence[str] = SUFFIXES) -> str | None:
    """The suffix that tells the type of a file, in lower case and without compression. None: not one of `suffixes`."""
    names = [suffix.lower() for suffix in file.suffixes[-2:]]
    suffix = names[-1] if names else ""
    if suffix in COMPRESSIONS and len(names) == 2:
        suffix = names[0]
        return suffix if suffix in suffixes and suffix not in _BINARY else None
    return suffix if suffix in suffixes else None


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk`."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def find_files(path: str, split: str = "train", suffixes: Sequence[str] = SUFFIXES) -> Files:
    """The files behind a path: one file, those of a folder and its sub-folders, a glob, or `package:MODULE/FILE`.

    Args:
        split: of a folder written by `DatasetDict.save_to_disk`.
        suffixes: the types of files to read.

    Raises:
        DataError: a package that is not installed or has no such file, no such split, or a folder that cannot be read.
    """
    if path.startswith("package:"):
        try:
            path = str(package_path(path))
        except CheckpointError as error:
            raise DataError(str(error)) from error
    try:
        return _files_of(path, split, suffixes)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error


def _files_of(path: str, split: str, suffixes: Sequence[str]) -> Files:
    local = Path(path).expanduser()
    files = Files()
    if local.is_dir():
        _add_folder(files, local, split, suffixes, set())
    elif local.is_file():
        files.paths.append(local)
    elif glob.has_magic(path):
        for match in map(Path, sorted(glob.glob(str(local), recursive=True))):
            if match.is_dir():
                _add_folder(files, match, split, suffixes, set())
            else:
                (files.unread if file_type(match, suffixes) is None else files.paths).append(match)
        files.paths = list(dict.fromkeys(files.paths))  # `**` matches a folder and its files
        files.unread = list(dict.fromkeys(files.unread))
    return files


def _add_folder(files: Files, folder: Path, split: str, suffixes: Sequence[str], seen: set[str]) -> None:
    real_path = os.path.realpath(folder)
    if real_path in seen:  # a link to a folder above
        return
    seen = seen | {real_path}
    if is_saved_dataset(folder):
        files.paths.append(folder)
        return
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(child for child in folder.iterdir() if is_saved_dataset(child))
        if not any(child.name == split for child in splits):
            names = ", ".join(child.name for child in splits)
            raise DataError(
                f"{folder}: no split {split!r}, it has {names}. Name one of them, or the folder of one split"
            )
        files.paths.append(folder / split)
        files.unread += [child for child in splits if child.name != split]
        return
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            files.unread.append(child)
        elif child.is_dir():
            _add_folder(files, child, split, suffixes, seen)
        else:
            (files.unread if file_type(child, suffixes) is None else files.paths).append(child)


@contextmanager
def open_binary(file: Path) -> Iterator[IO[bytes]]:
    """Open a file that may be compressed, as the bytes of its content.

    Raises:
        DataError: the compressed file is damaged or cut off.
        OSError: the file cannot be opened or read.
    """
    try:
        with _open(file) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(file, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(file, error) from error  # gzip, bz2 and pyarrow raise it for damaged content


def _open(file: Path) -> IO[bytes]:
    suffix = file.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(suffix, open)(file, "rb")


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: damaged or cut off: {error}. Compress or download it again")
