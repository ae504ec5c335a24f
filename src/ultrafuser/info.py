"""Describe a fused checkpoint: its specialists, their sources and sizes, and whether all of them are still there."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from ultrafuser.errors import CheckpointError
from ultrafuser.model.checkpoint import fused_folder, read_manifest
from ultrafuser.model.hub import Access, is_commit
from ultrafuser.model.manifest import REVISIONS, SourceKey, SpecialistEntry, weight_sources
from ultrafuser.model.references import check_files, is_inside, resolve
from ultrafuser.model.saving import GATE_FILE

WEIGHTS: tuple[SourceKey, ...] = ("model", "adapter")


class WeightsInfo(TypedDict, total=False):
    """A base or an adapter. `problem` says why it is gone."""

    source: str
    size_bytes: int
    inside: bool
    status: str
    problem: str


class _Sources(TypedDict, total=False):
    model: WeightsInfo
    adapter: WeightsInfo


class SpecialistInfo(_Sources):
    """One specialist: who it is, and where its weights are."""

    name: str
    domain: str | None
    architecture: str | None
    revision: str | None
    temperature: float
    shares_base_with: list[str]


class CheckpointInfo(TypedDict):
    """A fused checkpoint. `size_bytes` is its folder, `referenced_size_bytes` the weights outside of it."""

    folder: str
    mixing: str
    gate_type: str
    gate_hidden_size: int
    gate_size_bytes: int | None
    vocab_size: int
    context: int
    size_bytes: int
    referenced_size_bytes: int
    specialists: list[SpecialistInfo]
    has_recipe: bool
    verified: bool


def describe(folder: str | Path, *, verify: bool = False) -> CheckpointInfo:
    """Facts about a fused checkpoint, without loading it.

    Args:
        verify: compare every file with its recorded checksum, large ones too, and look up the commits of hub models.

    Raises:
        CheckpointError: no checkpoint, or with `verify` a file that differs, or a hub model whose commit is not recorded or
            gone.
    """
    access = Access()
    root = fused_folder(folder, access)
    config = read_manifest(root)
    groups = config.groups()
    specialists = []
    for k, spec in enumerate(config.specialists):
        group = next(group for group in groups if k in group)
        specialists.append(
            _specialist(spec, root, verify, [config.names[index] for index in group if index != k], access)
        )
    if verify:
        check_files(root, config.gate_files, "the gate")
    # Bytes outside the checkpoint. A base that several specialists share counts once.
    weights = [facts[key] for facts in specialists for key in WEIGHTS if key in facts]
    outside = {facts["source"]: facts["size_bytes"] for facts in weights if not facts["inside"]}
    files = [file for file in root.rglob("*") if file.is_file()]
    return {
        "folder": str(root),
        "mixing": config.mixing,
        "gate_type": config.gate_type,
        "gate_hidden_size": config.gate_hidden_size,
        "gate_size_bytes": (root / GATE_FILE).stat().st_size if (root / GATE_FILE).is_file() else None,
        "vocab_size": config.vocab_size,
        "context": config.max_position_embeddings,
        "size_bytes": sum(file.stat().st_size for file in files),
        "referenced_size_bytes": sum(outside.values()),
        "specialists": specialists,
        "has_recipe": (root / "recipe.yaml").is_file(),
        "verified": verify,
    }


def _check_commit(repository: str, revision: str | None, specialist: str, access: Access) -> None:
    """
    Raises:
        CheckpointError: no commit is recorded, or neither the hub nor the cache has it.
    """
    if not is_commit(revision):
        raise CheckpointError(
            f"specialist {specialist!r}: {repository} has no recorded commit, so a push to the hub changes this model. Fuse "
            "again, or load it and save it, to record the commit"
        )
    access.metadata(repository, revision, specialist)


def _specialist(
    spec: SpecialistEntry, root: Path, verify: bool, shares_base_with: list[str], access: Access
) -> SpecialistInfo:
    facts: SpecialistInfo = {
        "name": spec["name"],
        "domain": spec.get("domain"),
        "architecture": spec["config"].get("model_type"),
        "revision": spec["source"].get("revision"),
        "temperature": spec.get("temperature", 1.0),
        "shares_base_with": shares_base_with,
    }
    for key, reference in weight_sources(spec["source"]):
        recorded = (spec.get("files") or {}).get(key) or {}
        size_bytes = sum(record["size_bytes"] for record in recorded.values())
        location: WeightsInfo = {"source": reference, "size_bytes": size_bytes}
        try:
            path = resolve(reference, root, spec["name"])
            location["inside"] = isinstance(path, Path) and is_inside(path, root)
            location["status"] = "here"
            if not isinstance(path, Path):
                revision = spec["source"].get(REVISIONS[key])
                location["status"] = "on the hub" if is_commit(revision) else "on the hub, not pinned to a commit"
                if verify:
                    _check_commit(reference, revision, spec["name"], access)
            elif verify:
                check_files(path, recorded, f"specialist {spec['name']!r}", every=True)
        except CheckpointError as error:
            if verify:
                raise
            location["inside"], location["status"], location["problem"] = False, "gone", str(error)
        facts[key] = location
    return facts
