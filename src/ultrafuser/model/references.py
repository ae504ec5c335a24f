"""Find a specialist's files, and check that they are unchanged."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from .errors import CheckpointError
from .files import leaves, weight_files
from .manifest import FileRecord, FileRecords

PACKAGE = "package:"
# Loading compares larger files by size alone, because hashing would double the time. `info --verify` hashes all.
HASH_LIMIT_BYTES = 1 << 30


def resolve(reference: str, folder: Path | None, specialist: str) -> Path | str:
    """The local path behind a reference, or the reference itself when it is a hub id.

    Args:
        reference: `package:MODULE/FILE`, a path (a relative one lies in `folder`), or a hub id.
        folder: the fused checkpoint. None: relative paths lie in the working folder.

    Raises:
        CheckpointError: a path that is gone or leaves the checkpoint, or a package that is not installed.
    """
    if reference.startswith(PACKAGE):
        return package_path(reference)
    local = Path(reference).expanduser()
    if folder is not None and not local.is_absolute():
        local = folder / reference
        if ".." in Path(reference).parts or leaves(local, folder):
            raise CheckpointError(
                f"specialist {specialist!r}: its source {reference} leads out of {folder}. Expected a folder inside, a full "
                "path or a hub id. Fuse again if you trust this checkpoint"
            )
    if local.exists():
        return local if folder is not None else local.absolute()
    if is_hub_id(reference) and not reference.startswith(("specialists/", "bases/")):
        return reference
    raise CheckpointError(
        f"specialist {specialist!r}: its source {reference} is gone. Put it back, or fuse again (with --copy the "
        "checkpoint holds its own copies)"
    )


def is_hub_id(reference: str) -> bool:
    """Whether a reference without a local path can be a hub id."""
    return reference.count("/") <= 1 and not reference.startswith((".", "/", "~"))


def package_path(reference: str) -> Path:
    """The file behind `package:MODULE/FILE`, data of an installed Python package. The package is not imported.

    Raises:
        CheckpointError: the package is not installed, or has no such file.
    """
    module, _, inner = reference.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"{reference}: the Python package {module!r} is not installed. Install it with pip")
    path = Path(next(iter(spec.submodule_search_locations))) / inner
    if ".." in Path(inner).parts or not path.exists():
        raise CheckpointError(f"{reference}: the Python package {module!r} has no {inner!r}")
    return path


def inner_path(path: Path, folder: Path) -> str | None:
    """A path relative to the folder that holds it. None: it lies elsewhere. Folders that are links are followed."""
    real = path.parent.resolve() / path.name if path.is_symlink() else path.resolve()
    root = folder.resolve()
    return real.relative_to(root).as_posix() if real.is_relative_to(root) and not leaves(path, folder) else None


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies within a folder."""
    return inner_path(path, folder) is not None


def record_files(path: Path) -> FileRecords:
    """Size and SHA-256 of the weight files of a folder, or of one file, by name."""
    files = [path] if path.is_file() else [file for file in weight_files(path) if file.is_file()]
    root = path.parent if path.is_file() else path
    return {
        file.relative_to(root).as_posix(): {"size_bytes": file.stat().st_size, "sha256": sha256(file)} for file in files
    }


def check_files(path: Path, recorded: Mapping[str, FileRecord], owner: str, every: bool = False) -> None:
    """Compare weight files with their records.

    Args:
        path: the folder that holds them, or the file itself.
        owner: who needs the files, for the errors.
        every: also hash files above HASH_LIMIT_BYTES.

    Raises:
        CheckpointError: a file is missing, or differs in size or checksum.
    """
    for name, record in recorded.items():
        file = path if path.is_file() else path / name
        if not file.is_file():
            raise CheckpointError(f"{owner}: {file} is missing. The checkpoint is half written or its source is gone")
        size = file.stat().st_size
        if size != record["size_bytes"]:
            raise CheckpointError(
                f"{owner}: {file} has {size} bytes, expected {record['size_bytes']}: it is corrupted, or was replaced "
                "since it was fused. Restore it or fuse again"
            )
        if (every or size <= HASH_LIMIT_BYTES) and sha256(file) != record["sha256"]:
            raise CheckpointError(
                f"{owner}: the SHA-256 of {file} is not the recorded one. It is corrupted, or was replaced since it was "
                "fused. Restore it or fuse again"
            )


def sha256(file: Path) -> str:
    """The checksum of one file, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
