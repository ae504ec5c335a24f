"""The types of a fused checkpoint's config.json: the entry of each specialist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from .errors import CheckpointError

SourceKey = Literal["model", "adapter"]
RevisionKey = Literal["revision", "adapter_revision"]
REVISIONS: dict[SourceKey, RevisionKey] = {"model": "revision", "adapter": "adapter_revision"}


class FileRecord(TypedDict):
    """Size and checksum of one weight file when it was recorded."""

    size_bytes: int
    sha256: str


FileRecords = dict[str, FileRecord]
"""Recorded files by their names."""


class _SourceModel(TypedDict):
    model: str


class SpecialistSource(_SourceModel, total=False):
    """Where the weights are. Folders inside the checkpoint are relative to it.

    Attributes:
        model: hub id, folder, or `package:MODULE/FILE`.
        adapter: hub id or folder of a PEFT adapter on that model.
    """

    revision: str | None
    gguf_file: str | None
    adapter: str | None
    adapter_revision: str | None


class _SpecialistIdentity(TypedDict):
    name: str
    source: SpecialistSource
    config: dict[str, Any]


class SpecialistEntry(_SpecialistIdentity, total=False):
    """One specialist of the manifest, all plain JSON.

    Attributes:
        config: the specialist's own model configuration.
        domain: the domain of the rows that it was trained on. Default: its name.
        files: size and SHA-256 of each local weight file.
        chat_template: the Jinja text it was trained with.
        template_kwargs: further variables of the template.
        system: what happens to system turns: `keep`, `merge` or `drop`. Default: `keep`.
        end_token_id: the token by which it ends an answer.
        dtype, device_map, quantization: how to load it, if that differs from the others.
        separate: whether its adapter is no plain LoRA, so that PEFT merges it into a separate base.
        table_rows: rows of its embedding table, if its adapter holds a table of another size than its base.
        temperature: its logits are divided by it before they are mixed. Default: 1.
    """

    domain: str
    files: dict[SourceKey, FileRecords]
    chat_template: str
    template_kwargs: dict[str, Any]
    system: Literal["keep", "merge", "drop"]
    end_token_id: int
    dtype: str
    device_map: Any
    quantization: dict[str, Any]
    separate: bool
    table_rows: int
    temperature: float


_TYPES = {
    "domain": str,
    "files": dict,
    "chat_template": str,
    "template_kwargs": dict,
    "end_token_id": int,
    "table_rows": int,
}


def check_entry(entry: Mapping[str, Any]) -> None:
    """Raises CheckpointError: a field of an entry has another type, or `system` another value."""
    for key, kind in _TYPES.items():
        if entry.get(key) is not None and type(entry[key]) is not kind:
            raise CheckpointError(f"specialist {entry['name']}: {key} is {entry[key]!r}, expected {kind.__name__}")
    if (system := entry.get("system", "keep")) not in ("keep", "merge", "drop"):
        raise CheckpointError(f"specialist {entry['name']}: system is {system!r}, expected keep, merge or drop")


def weight_sources(source: SpecialistSource) -> list[tuple[SourceKey, str]]:
    """The references to a specialist's weights: its model's and, where it has one, its adapter's."""
    sources: list[tuple[SourceKey, str]] = [("model", source["model"])]
    if adapter := source.get("adapter"):
        sources.append(("adapter", adapter))
    return sources
