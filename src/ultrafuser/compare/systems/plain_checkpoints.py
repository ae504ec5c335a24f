"""Every specialist, and the bare base, as ordinary checkpoints with tokenizers, for tools outside ultrafuser."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ultrafuser.model.fingerprint import hash_weights
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.saving import atomic_directory, plain_model
from ultrafuser.progress import Progress

IDENTITY_FILE = "written_from.json"


@dataclass(frozen=True)
class PlainCheckpoints:
    """Folders of the checkpoints."""

    specialists: dict[str, Path]  # by name
    base: Path | None  # without adapters. None: the specialists do not share one


def write_plain_checkpoints(
    model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, progress: Progress | None = None
) -> PlainCheckpoints:
    """Write each specialist with its adapter merged, and the base they share. Folders of the same weights are kept.

    Args:
        folder: gets `specialists/<name>` and, where there is one, `base`. Each tokenizer has the chat template of its
            specialist. The base has the first specialist's.
    """
    progress = progress or Progress()
    folders = {name: folder / "specialists" / name for name in model.config.names}
    base = folder / "base" if len(model.groups) == 1 and model.groups[0].loras else None
    templates = {spec["name"]: spec.get("chat_template") for spec in model.config.specialists}
    checkpoints: list[tuple[str | None, Path]] = [*folders.items(), *([(None, base)] if base is not None else [])]
    progress.start("specialists become ordinary checkpoints", len(checkpoints))
    for name, checkpoint in checkpoints:
        template = templates[name or model.config.names[0]]
        identity = _identity(model, name, template)
        if _read_identity(checkpoint) != identity:
            plain = plain_model(model.groups[0], {}) if name is None else model.specialist(name)
            plain_tokenizer = copy.deepcopy(model.specialist_tokenizers.get(name or "", tokenizer))
            if template is not None:
                plain_tokenizer.chat_template = template
            with atomic_directory(checkpoint) as draft:
                plain.save_pretrained(draft)
                plain_tokenizer.save_pretrained(draft)
                (draft / IDENTITY_FILE).write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")
        progress.advance()
    progress.finish()
    return PlainCheckpoints(folders, base)


def _read_identity(folder: Path) -> str | None:
    """The fingerprint of the weights that a folder was written from. None: the folder is not complete."""
    file = folder / IDENTITY_FILE
    if not file.is_file() or not (folder / "config.json").is_file():  # config.json comes last
        return None
    return json.loads(file.read_text(encoding="utf-8"))["identity"]


def _identity(model: UltraFuserForCausalLM, name: str | None, template: str | None) -> str:
    """A fingerprint of one specialist's weights (None: the shared base's) and template."""

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for group in model.groups:
            if name is None or name in group.names:
                for key, tensor in group.named_parameters():
                    if key.rpartition(".")[2] not in ("lora_A", "lora_B"):
                        yield key, tensor
                    elif name is not None:  # this specialist's row of the adapters
                        yield key, tensor[group.names.index(name)]

    return hash_weights(weights(), start=f"{name} {template}".encode())
