"""Find a specialist's files, and check that they are unchanged."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from .errors import CheckpointError
from .manifest import FileRecord, FileRecords

PACKAGE = "package:"
WEIGHTS = ("*.safetensors", "*.gguf")
# Loading compares larger files by size alone, because hashing would double the time. `info --verify` hashes all.
HASH_LIMIT_BYTES = 1 << 30


def resolve(reference: str, folder: Path | None, specialist: str) -> Path | str:
    """The local path behind a reference, or the reference itself when it is a hub id.

    Args:
        reference: `package:MODULE/FILE`, a path (relative ones first against `folder`), or a hub id.
        folder: the fused checkpoint.

    Raises:
        CheckpointError: a path that is gone, or a package that is not installed.
    """
    if reference.startswith(PACKAGE):
        return package_path(reference)
    if folder is not None and (folder / reference).exists():
        return folder / reference
    local = Path(reference).expanduser()
    if local.exists():
        return local.absolute()
    if is_hub_id(reference) and not reference.startswith("specialists/"):
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
    if not path.exists():
        raise CheckpointError(f"{reference}: the Python package {module!r} has no {inner!r}")
    return path


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies within a folder."""
    return path.absolute().is_relative_to(folder.absolute())


def record_files(path: Path) -> FileRecords:
    """Size and SHA-256 of the weight files of a folder, or of one file, by name."""
    files = [path] if path.is_file() else sorted(file for pattern in WEIGHTS for file in path.glob(pattern))
    return {file.name: {"size_bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}


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
