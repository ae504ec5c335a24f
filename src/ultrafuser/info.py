"""Describe a fused checkpoint: its specialists, their sources and sizes, and whether all of them are still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultrafuser.errors import CheckpointError
from ultrafuser.model.checkpoint import fused_folder, read_manifest
from ultrafuser.model.manifest import SpecialistEntry, weight_sources
from ultrafuser.model.references import check_files, is_inside, resolve
from ultrafuser.model.saving import GATE_FILE


def describe(folder: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """Facts about a fused checkpoint, without loading it.

    Args:
        verify: compare every file with its recorded checksum, large ones too.

    Raises:
        CheckpointError: no checkpoint, or with `verify` a file that differs.
    """
    root = fused_folder(folder, {})
    config = read_manifest(root)
    groups = config.groups()
    specialists = [_specialist(spec, root, verify) for spec in config.specialists]
    for k, facts in enumerate(specialists):
        shared = next(group for group in groups if k in group)
        facts["shares_base_with"] = [config.names[index] for index in shared if index != k]
    if verify:
        check_files(root, config.gate_files, "the gate")
    # Bytes outside the checkpoint. A base that several specialists share counts once.
    outside = {
        facts[key]["source"]: facts[key]["size_bytes"]
        for facts in specialists
        for key in ("model", "adapter")
        if key in facts and not facts[key]["inside"]
    }
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


def _specialist(spec: SpecialistEntry, root: Path, verify: bool) -> dict[str, Any]:
    source = spec["source"]
    locations: dict[str, dict[str, Any]] = {}
    for key, reference in weight_sources(source):
        recorded = (spec.get("files") or {}).get(key) or {}
        location: dict[str, Any] = {
            "source": reference,
            "size_bytes": sum(record["size_bytes"] for record in recorded.values()),
        }
        try:
            path = resolve(reference, root, spec["name"])
            location["inside"] = isinstance(path, Path) and is_inside(path, root)
            location["status"] = "here" if isinstance(path, Path) else "on the hub"
            if verify and isinstance(path, Path):
                check_files(path, recorded, f"specialist {spec['name']!r}", every=True)
        except CheckpointError as error:
            if verify:
                raise
            location |= {"inside": False, "status": "gone", "problem": str(error)}
        locations[key] = location
    return {
        "name": spec["name"],
        "domain": spec.get("domain"),
        "architecture": spec["config"].get("model_type"),
        "revision": source.get("revision"),
        "temperature": spec.get("temperature", 1.0),
        **locations,
    }
