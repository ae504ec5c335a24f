"""Write fused checkpoints: a manifest, the gate, and the specialists that changed. The others stay references.

my-fused/
  config.json          the manifest, written last: a folder without it is half written
  model.safetensors    the gate
  specialists/<name>/  ordinary HF checkpoints or PEFT adapters: those that training changed, or all with `copy`
  bases/<name>/        the base of copied adapters
  tokenizers/<name>/   tokenizers that differ from the one of the folder
  *.py                 this package, so that trust_remote_code works where ultrafuser is not installed
"""

from __future__ import annotations

import copy as copying
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .configuration_ultrafuser import UltraFuserConfig
from .errors import CheckpointError
from .files import copy_model
from .fingerprint import WeightMarks
from .hub import Access
from .manifest import REVISIONS, SourceKey, SpecialistEntry, weight_sources
from .quantized import is_quantized
from .references import PACKAGE, inner_path, record_files, resolve
from .shared_base import SpecialistGroup

GATE_FILE = "model.safetensors"
TOKENIZERS = "tokenizers"
MAX_SHARD_SIZE = "50GB"  # as in transformers
CODE = ("configuration_ultrafuser", "modeling_ultrafuser", "checkpoint", "adapters", "empty", "saving", "references", "files", "hub",
        "shared_base", "gate", "generation", "inputs", "cache", "growing", "loss", "mixing", "parallel", "manifest", "fingerprint", "fitness",
        "quantized", "placement", "few_rows", "speculation", "errors", "card")  # fmt: skip

WRITE_ERRORS = (OSError, RuntimeError, TypeError, ValueError)  # of torch, transformers, safetensors and our own


class Origin(NamedTuple):
    """Where a model was loaded from.

    Attributes:
        folder: the checkpoint, against which relative sources resolve. None: it was fused or made in memory.
        access: to the hub.
    """

    folder: Path | None
    access: Access


# ---------------------------------------------------------------- changes


def mark_unchanged(model: Any, folder: Path | None, access: Access | None = None) -> None:
    """Remember that the specialists' weights now equal their sources.

    Args:
        folder: the checkpoint, if there is one.
        access: how the sources were reached.
    """
    model.origin = Origin(folder, access or Access())
    for group in model.local_groups:
        group.marks = WeightMarks(group.parameters())


def is_changed(group: SpecialistGroup) -> bool:
    """Whether a group's weights may differ from their sources. A group that was never loaded counts as changed."""
    return group.marks.differ(group.parameters())


def plain_model(group: SpecialistGroup, coefficients: Mapping[int, float]) -> PreTrainedModel:
    """A copy of the base as an ordinary transformers model, with adapters merged by `coefficients`."""
    config = copying.deepcopy(group.model.config)
    if is_quantized(group.model):
        del config.quantization_config
    model = type(group.model)._from_config(config, dtype=group.model.dtype)
    model.load_state_dict(group.base_state(coefficients))
    model.generation_config = copying.deepcopy(group.model.generation_config)
    return model.to(group.device).eval()


# ---------------------------------------------------------------- writing


def save_fused(
    model: Any,
    save_directory: str | os.PathLike,
    *,
    copy: bool = False,
    left_out: list[str] | None = None,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **kwargs: Any,
) -> None:
    """See `UltraFuserForCausalLM.save_pretrained`."""
    if not is_main_process:
        return
    if push_to_hub:
        raise CheckpointError("save first, then call model.push_to_hub(repo_id), which uploads the model")
    config: UltraFuserConfig = copying.deepcopy(model.config)
    state = None if state_dict is None else dict(state_dict)
    copied: dict[Path, str] = {}
    with atomic_directory(Path(save_directory)) as folder:
        for g, group in enumerate(model.groups):
            specs = [config.specialists[config.names.index(name)] for name in group.names]
            prefix = f"groups.{g}.model."
            group_state = state and {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            arguments = (group, specs, folder, group_state, model.origin, copied)
            if left_out is not None:
                left_out += _write_some(*arguments, copy=copy, max_shard_size=max_shard_size)
            elif is_changed(group):
                _write_group(*arguments, max_shard_size=max_shard_size)
            else:
                _keep_group(specs, folder, model.origin, copy, copied)
        gate = model.gate.state_dict(prefix="gate.")
        gate = {key: (state or gate)[key].detach().cpu().contiguous() for key in gate}
        save_file(gate, folder / GATE_FILE, metadata={"format": "pt"})
        config.gate_files = record_files(folder / GATE_FILE)
        for name, tokenizer in model.specialist_tokenizers.items():
            tokenizer.save_pretrained(folder / TOKENIZERS / name)
        for name in CODE:
            shutil.copy(Path(__file__).parent / f"{name}.py", folder)
        config.auto_map = {
            "AutoConfig": "configuration_ultrafuser.UltraFuserConfig",
            "AutoModelForCausalLM": "modeling_ultrafuser.UltraFuserForCausalLM",
        }
        config.architectures = ["UltraFuserForCausalLM"]
        config.dtype = None
        model.generation_config.save_pretrained(folder)
        config.save_pretrained(folder)


def _write_some(
    group: SpecialistGroup,
    specs: list[SpecialistEntry],
    folder: Path,
    state: Mapping[str, torch.Tensor] | None,
    old: Origin,
    copied: dict[Path, str],
    *,
    copy: bool,
    max_shard_size: int | str,
) -> list[str]:
    """Write as much of a group as can be written, and refer to the rest as it was. Returns the parts left out."""
    names, initial, initially_copied = ", ".join(group.names), copying.deepcopy(specs), dict(copied)
    for keep_base in (False, True) if is_changed(group) else ():
        try:
            _write_group(group, specs, folder, state, old, copied, keep_base=keep_base, max_shard_size=max_shard_size)
            return [f"the changed base of {names}"] if keep_base else []
        except WRITE_ERRORS:
            for spec, unchanged in zip(specs, initial, strict=True):
                spec |= copying.deepcopy(unchanged)
                shutil.rmtree(folder / "specialists" / spec["name"], ignore_errors=True)
            copied.clear()
            copied |= initially_copied
    left_out = [f"the changes of {names}"] if is_changed(group) else []
    try:
        _keep_group(specs, folder, old, copy, copied)
    except WRITE_ERRORS as error:
        left_out.append(f"the files of {names} ({error})")
    return left_out


def _keep_group(specs: list[SpecialistEntry], folder: Path, old: Origin, copy: bool, copied: dict[Path, str]) -> None:
    for spec in specs:
        for key, _ in weight_sources(spec["source"]):
            _keep(spec, key, folder, old, copy, copied)


def _write_group(
    group: SpecialistGroup,
    specs: list[SpecialistEntry],
    folder: Path,
    state: Mapping[str, torch.Tensor] | None,
    old: Origin,
    copied: dict[Path, str],
    keep_base: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write the specialists of a group that training changed. `old`, `copied`: see `_keep`.

    Args:
        keep_base: write the adapters alone, and refer to the base as it was.
    """
    adapters = {id(parameter) for parameter in group.adapter_parameters()}  # they may be new since loading
    base_changed = any(group.marks.is_written(p) for p in group.parameters() if id(p) not in adapters)
    if group.loras and (keep_base or not base_changed):
        for i, spec in enumerate(specs):
            specialist_folder = folder / "specialists" / spec["name"]
            spec["source"] |= {"adapter": f"specialists/{spec['name']}", "adapter_revision": None}
            _keep(spec, "model", folder, old, False, copied)
            write_adapter(group, i, spec["source"]["model"], specialist_folder, state)
            spec["files"] = (spec.get("files") or {}) | {"adapter": record_files(specialist_folder)}
        return
    if group.size > 1:
        raise CheckpointError(
            f"the base that {', '.join(group.names)} share was changed, so its weights belong to none of them. Train "
            "their adapters alone, or fuse with share_base: false"
        )
    spec, specialist_folder = specs[0], folder / "specialists" / specs[0]["name"]
    if group.loras:
        plain_model(group, {0: 1.0}).save_pretrained(specialist_folder, max_shard_size=max_shard_size)
    else:
        weights = None if state is None else dict(state)
        group.model.save_pretrained(specialist_folder, state_dict=weights, max_shard_size=max_shard_size)
    spec["source"] = {"model": f"specialists/{spec['name']}"}
    spec["files"] = {"model": record_files(specialist_folder)}
    spec["config"] = group.model.config.to_dict()
    spec.pop("separate", None)
    spec.pop("table_rows", None)


def write_adapter(
    group: SpecialistGroup, i: int, base: str, specialist_folder: Path, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write one specialist's adapter as an ordinary PEFT folder."""
    adapter = group.adapter(i)
    tensors = {}
    for name, pair in adapter.layers.items():
        for half, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
            if state is not None:  # gathered from all ranks
                padded, rank = state[f"{name}.{half}"][i], group.loras[name].ranks[i]
                tensor = padded[:rank] if half == "lora_A" else padded[:, :rank]
            tensors[f"base_model.model.{name}.{half}.weight"] = tensor.detach().cpu().contiguous()
    rank = max(a.shape[0] for a, _ in adapter.layers.values())
    specialist_folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, specialist_folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapter.scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": group.model.config.model_type == "gpt2",
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.layers}),
    }
    (specialist_folder / "adapter_config.json").write_text(
        json.dumps(adapter_config, indent=2) + "\n", encoding="utf-8"
    )


def _keep(
    spec: SpecialistEntry, key: SourceKey, folder: Path, old: Origin, copy: bool, copied: dict[Path, str]
) -> None:
    """Keep unchanged weights as a reference, or copy them: always if they lie inside the old checkpoint.

    Args:
        old: the origin of the model.
        copied: paths copied so far and their new places, because several specialists may share a base.
    """
    source, reference, name = spec["source"], str(spec["source"][key]), spec["name"]
    path = resolve(reference, old.folder, name)
    inside = None if old.folder is None or not isinstance(path, Path) else inner_path(path, old.folder)
    if inside is None and not copy:
        return
    gguf_file = source.get("gguf_file") if key == "model" else None
    if not isinstance(path, Path):
        revision, access = source.get(REVISIONS[key]), old.access
        is_model = key == "model"
        path = access.model(path, revision, name, gguf_file) if is_model else access.adapter(path, revision, name)
    if path not in copied:
        shelf = "bases" if key == "model" and source.get("adapter") else "specialists"
        copied[path] = f"{shelf}/{name}" + (f"/{path.name}" if path.is_file() else "")
        if inside is not None and not (shelf == "bases" and inside == f"specialists/{name}"):
            copied[path] = inside  # but not beside an adapter, which transformers would add to the model
        target = folder / copied[path]
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            root = old.folder if inside is not None else None if reference.startswith(PACKAGE) else path
            copy_model(path, target, root=root, gguf_file=gguf_file, code=old.access.trusts(name))
        else:
            shutil.copy(path, target)
    source[key] = copied[path]
    if path.is_dir():
        target, files = folder / copied[path], spec.get("files") or {}
        written = {file: record for file, record in files.get(key, {}).items() if (target / file).exists()}
        spec["files"] = files | {key: written or record_files(target)}


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces it when the block succeeds and is removed when it fails.

    A target that exists keeps its other files. Its config.json is removed first and written last, so that a folder
    that is half replaced is never read as a checkpoint.

    Raises:
        CheckpointError: the disk is full or not writable. `target` is unchanged.
    """
    target = target.expanduser().absolute()
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _remove_stale_drafts(target)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        if not target.exists():
            draft.rename(target)
        else:
            (target / "config.json").unlink(missing_ok=True)
            for stale in ("specialists", "bases", TOKENIZERS):
                _remove(target / stale)
            for entry in sorted(draft.iterdir(), key=lambda entry: entry.name == "config.json"):
                if (target / entry.name).is_dir():
                    _remove(target / entry.name)
                os.replace(entry, target / entry.name)
    except (OSError, SafetensorError) as error:
        full = "No space left" in str(error) or getattr(error, "errno", None) == 28
        why = "the disk is full" if full else str(error)
        raise CheckpointError(
            f"{target}: could not be written: {why}. Nothing was changed. Free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to a folder but not what it leads to."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale_drafts(target: Path) -> None:
    """Remove the drafts of this target, and drafts of drafts, whose process was killed."""
    if not target.parent.is_dir():
        return
    name = re.compile(rf"\.+{re.escape(target.name)}((?:\.\d+\.tmp)+)")
    for path in target.parent.iterdir():
        match = name.fullmatch(path.name)
        if match and path.is_dir() and not any(map(_is_running, map(int, re.findall(r"\d+", match[1])))):
            _remove(path)


def _is_running(pid: int) -> bool:
    """Whether a process of this machine runs. True where the system does not tell."""
    if os.name != "posix":  # on Windows the same call ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
