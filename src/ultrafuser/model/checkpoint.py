"""Fused checkpoints on disk: load specialists from where they are, write a manifest, the gate, and what changed.

my-fused/
  config.json          the manifest; written last, so that a folder without it is half written
  model.safetensors    the gate
  specialists/<name>/  ordinary HF checkpoints or PEFT adapters: what training changed, or `copy` asked for
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
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .configuration_ultrafuser import UltraFuserConfig
from .errors import CheckpointError
from .references import WEIGHTS, check_files, is_inside, record_files, resolve
from .shared_base import AdapterWeights, SpecialistGroup

GATE_FILE = "model.safetensors"
CODE = ("configuration_ultrafuser", "modeling_ultrafuser", "checkpoint", "references", "shared_base", "gate", "cache",
        "loss", "errors")  # fmt: skip
_SAMPLES = 1024  # values of each tensor that are remembered, to see whether training changed it
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")
# Settings of PEFT's LoraConfig that make an adapter more than y = W x + scaling * B A x with one rank and scaling.
_OTHER_LORAS = ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication",
                "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora",
                "arrow_config", "kasa_config", "monteclora_config", "velora_config")  # fmt: skip
_OUTER_LAYERS = ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte")


# ---------------------------------------------------------------- loading


def load_fused(cls: type, name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """`UltraFuserForCausalLM.from_pretrained`; see there."""
    folder = fused_folder(name_or_path, kwargs)
    config = kwargs.pop("config", None)
    if not isinstance(config, UltraFuserConfig):
        config = read_manifest(folder)
    config.name_or_path = str(name_or_path)
    if overrides := {key: kwargs.pop(key) for key in ("mixing",) if key in kwargs}:
        for key, value in overrides.items():
            setattr(config, key, value)
        config.check()
    kwargs.pop("adapter_kwargs", None)  # of the Auto class, about this folder; the specialists have their own adapters
    info = kwargs.pop("output_loading_info", False)
    groups = load_groups(config, folder, **kwargs)
    model = cls(config, groups)
    state = _read_safetensors(folder / GATE_FILE)
    check_files(folder, getattr(config, "gate_files", None) or {}, "the gate")
    try:
        model.gate.load_state_dict({k.removeprefix("gate."): v for k, v in state.items()})
    except RuntimeError as error:  # names or shapes
        raise CheckpointError(
            f"{folder / GATE_FILE}: does not fit the manifest: {' '.join(str(error).split())}; was it written by another "
            "fusion?"
        ) from error
    model.gate.to(model.device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    mark_unchanged(model, folder)
    model.eval()
    report: dict[str, Any] = {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": [],
    }
    return (model, report) if info else model


def fused_folder(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> Path:
    """The local folder of a fused checkpoint, downloaded from the hub where it is an id; takes the hub arguments out."""
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    subfolder = kwargs.pop("subfolder", None) or ""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        if not _looks_like_hub_id(str(name_or_path)):
            raise CheckpointError(f"{name_or_path}: no such folder; expected a fused checkpoint or a hub id")
        hub = {key: value for key, value in hub.items() if value is not None}
        try:
            folder = Path(snapshot_download(str(name_or_path), **hub))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name_or_path}: no such folder, and the hub did not give it: {error}") from error
    return folder / subfolder


def read_manifest(folder: Path) -> UltraFuserConfig:
    """The configuration of a fused checkpoint.

    Raises:
        CheckpointError: no manifest (not a checkpoint, or half written), or a broken one.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json, so it is not a fused checkpoint or was only half written; write it again with "
            "`ultrafuser fuse` or save_pretrained"
        )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder}/config.json: not JSON: {error}") from error
    if kind != UltraFuserConfig.model_type:
        raise CheckpointError(
            f"{folder}: model_type is {kind!r}, expected 'ultrafuser'; fuse it with `ultrafuser fuse`"
        )
    return UltraFuserConfig.from_pretrained(folder)


def load_groups(
    config: UltraFuserConfig, folder: Path | None, verify: bool = True, **kwargs: Any
) -> list[SpecialistGroup]:
    """Load every specialist from where the manifest says it is; adapters on one base load that base once.

    Args:
        folder: the checkpoint, against which relative sources resolve.
        verify: compare local weight files with the recorded sizes and checksums first.
        kwargs: of AutoModelForCausalLM.from_pretrained.

    Raises:
        CheckpointError: a reference is gone, a file changed, weights are pickled, an adapter does not fit its base.
    """
    groups, checked = [], set[Path]()
    for indices in config.groups():
        specs = [config.specialists[k] for k in indices]
        for spec in specs if verify else ():
            for part in ("model", "adapter"):
                recorded = (spec.get("files") or {}).get(part)
                if not recorded:
                    continue
                where = Path(resolve(spec["source"][part], folder, spec["name"]))
                if where not in checked:  # a base that several share is hashed once
                    check_files(where, recorded, f"specialist {spec['name']!r}")
                    checked.add(where)
        model = load_base(specs[0], folder, **kwargs)
        if specs[0].get("separate"):
            model = _merge_with_peft(model, specs[0], folder)
            adapters: list[AdapterWeights | None] = []
        else:
            adapters = [read_adapter(spec, folder, model.dtype) for spec in specs]
        groups.append(SpecialistGroup(model, [spec["name"] for spec in specs], adapters))
    return groups


def load_base(spec: Mapping[str, Any], folder: Path | None, **kwargs: Any) -> PreTrainedModel:
    """The causal model of one specialist, without its adapter."""
    source, name = spec["source"], spec["name"]
    where = resolve(source["model"], folder, name)
    options = dict(kwargs)
    options.setdefault("dtype", options.pop("torch_dtype", None) or "auto")
    for field, option in (
        ("dtype", "dtype"),
        ("device_map", "device_map"),
        ("quantization", "quantization_config"),
    ):
        if spec.get(field) is not None:
            options[option] = spec[field]
    if isinstance(options.get("quantization_config"), dict):
        from transformers.quantizers.auto import AutoQuantizationConfig

        options["quantization_config"] = AutoQuantizationConfig.from_dict(options["quantization_config"])
    if source.get("revision"):
        options["revision"] = source["revision"]
    fields = dict(spec["config"])
    options["config"] = AutoConfig.for_model(fields.pop("model_type"), **fields)  # parsing a GGUF file for it is slow
    gguf = source.get("gguf_file")
    if isinstance(where, Path):
        if where.suffix == ".gguf":
            where, gguf = where.parent, where.name
        if not gguf:
            _refuse_pickles(where, name)
    if gguf:
        options["gguf_file"] = gguf
        if options["dtype"] == "auto":
            options["dtype"] = torch.float32  # a GGUF file is decompressed; it has no data type of its own
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            where, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"specialist {name!r}: its weights could not be loaded from {source['model']}: {error}"
        ) from error
    # transformers fills what it does not find with random numbers and a warning
    if lost := sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"]):
        raise CheckpointError(
            f"specialist {name!r}: {source['model']} lacks {len(lost)} weights of a {type(model).__name__}, or has them in "
            f"another shape: {', '.join(lost[:3])}; it is half written, or belongs to another configuration"
        )
    if gguf and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # decompressed: saving must not claim otherwise
    return model


def read_adapter_config(spec: Mapping[str, Any], folder: Path | None) -> tuple[Path, dict[str, Any]] | None:
    """Folder and configuration of a specialist's PEFT adapter, if it has one."""
    reference = spec["source"].get("adapter")
    if not reference:
        return None
    where = resolve(reference, folder, spec["name"])
    if not isinstance(where, Path):
        try:
            where = Path(
                snapshot_download(
                    str(where), revision=spec["source"].get("adapter_revision"), allow_patterns="adapter_*"
                )
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"specialist {spec['name']!r}: no folder {reference!r}, and the hub did not give it: {error}"
            ) from error
    if not (where / "adapter_config.json").is_file():
        raise CheckpointError(
            f"specialist {spec['name']!r}: {where} has no adapter_config.json; expected a PEFT adapter"
        )
    _refuse_pickles(where, spec["name"])
    return where, json.loads((where / "adapter_config.json").read_text(encoding="utf-8"))


def is_plain_lora(adapter_config: Mapping[str, Any]) -> bool:
    """Whether an adapter can run beside others on one base; other kinds are merged into a base of their own."""
    targets = adapter_config.get("target_modules") or []
    if isinstance(targets, str):  # PEFT reads it as a regular expression over whole names
        outer = any(re.fullmatch(targets, name) for name in _OUTER_LAYERS)
    else:
        outer = any(name.rpartition(".")[2] in _OUTER_LAYERS for name in targets)
    return (
        adapter_config.get("peft_type") == "LORA"
        and adapter_config.get("bias", "none") == "none"
        # PiSSA, OLoRA and the like also change the base when they start
        and adapter_config.get("init_lora_weights", True) in (True, False, None, "gaussian", "orthogonal", "eva")
        and not any(adapter_config.get(key) for key in _OTHER_LORAS)
        and not outer
    )


def read_adapter(spec: Mapping[str, Any], folder: Path | None, dtype: torch.dtype) -> AdapterWeights | None:
    """A specialist's LoRA weights, by the names that the layers have in the base.

    Raises:
        CheckpointError: weights with names that are not LoRA's.
    """
    found = read_adapter_config(spec, folder)
    if found is None:
        return None
    where, config = found
    tensors = _read_safetensors(where / "adapter_model.safetensors")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise CheckpointError(f"specialist {spec['name']!r}: {where} holds {key!r}, which is no plain LoRA weight")
        halves.setdefault(name, {})[half] = tensor.to(dtype)
    r, alpha = config["r"], config["lora_alpha"]
    scaling = alpha / (r**0.5 if config.get("use_rslora") else r)
    return AdapterWeights({name: (pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}, scaling)


def _merge_with_peft(model: PreTrainedModel, spec: Mapping[str, Any], folder: Path | None) -> PreTrainedModel:
    """Adapters of other kinds than plain LoRA: PEFT merges them into a base of their own."""
    from peft import PeftModel

    found = read_adapter_config(spec, folder)
    if found is None:
        return model
    try:
        return PeftModel.from_pretrained(model, found[0]).merge_and_unload()
    except (
        RuntimeError,
        ValueError,
        NotImplementedError,
    ) as error:  # PEFT's own words for what cannot be merged
        raise CheckpointError(
            f"specialist {spec['name']!r}: PEFT cannot merge its adapter {found[0]} into its base: {error}"
        ) from error


def _refuse_pickles(where: Path, name: str) -> None:
    if not where.is_dir():
        raise CheckpointError(f"specialist {name!r}: {where} is not a folder; expected a checkpoint or an adapter")
    if any(True for pattern in WEIGHTS for _ in where.glob(pattern)):
        return
    pickled = sorted(file.name for file in where.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    found = f"only pickled weights ({', '.join(pickled)}), which can run code" if pickled else "no weights"
    raise CheckpointError(
        f"specialist {name!r}: {where} has {found}; expected *.safetensors (load it once with transformers from a source "
        "you trust, then save_pretrained)"
    )


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; the folder is half written or is no checkpoint")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: corrupted or half written: {error}") from error


def _looks_like_hub_id(reference: str) -> bool:
    return reference.count("/") <= 1 and not reference.startswith((".", "/", "~"))


# ---------------------------------------------------------------- what changed


def mark_unchanged(model: Any, folder: Path | None) -> None:
    """Remember that the specialists' weights are now what their sources say."""
    model._folder = folder
    for group in model.groups:
        group._fingerprint = _fingerprint(group)


def _fingerprint(group: SpecialistGroup) -> dict[int, tuple[int, torch.Tensor]]:
    """How often each tensor was written to, and a sample of it; moving devices or casting changes neither.

    The counter alone misses writes through `.data` and by fused optimizers, transformers' default; the sample sees them.
    """
    return {id(parameter): (parameter._version, _sample(parameter)) for parameter in group.parameters()}


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].cpu().clone()


def _is_written(parameter: torch.Tensor, before: Mapping[int, tuple[int, torch.Tensor]]) -> bool:
    if id(parameter) not in before:
        return True
    version, sample = before[id(parameter)]
    return version != parameter._version or not torch.equal(sample.to(parameter.dtype), _sample(parameter))


def is_changed(group: SpecialistGroup) -> bool:
    """Whether a group's weights may differ from their sources; a group that was never loaded counts as changed."""
    before = getattr(group, "_fingerprint", {})
    now = list(group.parameters())
    return set(before) != {id(p) for p in now} or any(_is_written(p, before) for p in now)


def plain_model(group: SpecialistGroup, coefficients: Mapping[int, float]) -> PreTrainedModel:
    """An ordinary transformers model with adapters merged in by `coefficients`; a copy of the base."""
    state = {name: tensor.clone() for name, tensor in group.base_state(coefficients).items()}
    model = AutoModelForCausalLM.from_config(group.model.config, dtype=group.model.dtype)
    model.load_state_dict(state)
    model.generation_config = copying.deepcopy(group.model.generation_config)
    return model.to(group.device).eval()


# ---------------------------------------------------------------- saving


def save_fused(
    model: Any,
    save_directory: str | os.PathLike,
    *,
    copy: bool = False,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """`UltraFuserForCausalLM.save_pretrained`; see there."""
    if not is_main_process:
        return
    if push_to_hub:
        raise CheckpointError("save first, then call model.push_to_hub(repo_id), which uploads the folder")
    config: UltraFuserConfig = copying.deepcopy(model.config)
    state = dict(state_dict) if state_dict is not None else None
    copied: dict[Path, str] = {}
    with staging(Path(save_directory)) as folder:
        for g, group in enumerate(model.groups):
            specs = [config.specialists[config.names.index(name)] for name in group.names]
            if is_changed(group):
                own = None if state is None else _sub_state(state, f"groups.{g}.model.")
                _write_group(group, specs, folder, own, getattr(model, "_folder", None))
            else:
                for spec in specs:
                    _keep(spec, folder, getattr(model, "_folder", None), copy, copied)
        gate = _sub_state(state, "gate.") if state is not None else model.gate.state_dict()
        gate = {f"gate.{key}": value.detach().cpu().contiguous() for key, value in gate.items()}
        save_file(gate, folder / GATE_FILE, metadata={"format": "pt"})
        config.gate_files = record_files(folder / GATE_FILE)
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


def _sub_state(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _write_group(
    group: SpecialistGroup,
    specs: list[dict[str, Any]],
    folder: Path,
    state: Mapping[str, torch.Tensor] | None,
    old: Path | None,
) -> None:
    """Write the specialists of a group that training changed."""
    if group.loras and not _base_changed(group):
        for i, spec in enumerate(specs):
            home = folder / "specialists" / spec["name"]
            _absolute_base(spec, folder, old)
            write_adapter(group, i, spec["source"]["model"], home, state)
            spec["source"] |= {"adapter": f"specialists/{spec['name']}", "adapter_revision": None}
            spec["files"] = (spec.get("files") or {}) | {"adapter": record_files(home)}
        return
    if group.size > 1:
        raise CheckpointError(
            f"the base that {', '.join(group.names)} share was changed, so its weights belong to none of them; train "
            "their adapters only, or fuse with share_base: false"
        )
    spec, home = specs[0], folder / "specialists" / specs[0]["name"]
    if group.loras:
        plain_model(group, {0: 1.0}).save_pretrained(home)
    else:
        group.model.save_pretrained(home, state_dict=None if state is None else dict(state))
    spec["source"] = {"model": f"specialists/{spec['name']}"}
    spec["files"] = {"model": record_files(home)}
    spec["config"] = group.model.config.to_dict()
    spec.pop("separate", None)


def _base_changed(group: SpecialistGroup) -> bool:
    """Whether more than adapters changed; adapters that are new since loading do not count."""
    adapters = {id(parameter) for parameter in group.adapter_parameters()}
    before = getattr(group, "_fingerprint", {})
    return any(_is_written(p, before) for p in group.parameters() if id(p) not in adapters)


def write_adapter(
    group: SpecialistGroup, i: int, base: str, home: Path, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write one specialist's adapter as an ordinary PEFT folder."""
    adapter = group.adapter(i)
    tensors = {}
    for name, pair in adapter.layers.items():
        for half, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
            if state is not None:  # gathered from all ranks
                whole, rank = state[f"{name}.{half}"][i], group.loras[name].ranks[i]
                tensor = whole[:rank] if half == "lora_A" else whole[:, :rank]
            tensors[f"base_model.model.{name}.{half}.weight"] = tensor.detach().cpu().contiguous()
    rank = max(a.shape[0] for a, _ in adapter.layers.values())
    home.mkdir(parents=True, exist_ok=True)
    save_file(tensors, home / "adapter_model.safetensors", metadata={"format": "pt"})
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
    (home / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n", encoding="utf-8")


def _keep(spec: dict[str, Any], folder: Path, old: Path | None, copy: bool, copied: dict[Path, str]) -> None:
    """An unchanged specialist stays a reference; what lies inside the old checkpoint moves along.

    Args:
        copied: what was copied to where so far, since several specialists may share a base.
    """
    source = spec["source"]
    for part in ("model", "adapter"):
        if not source.get(part):
            continue
        where = resolve(source[part], old, spec["name"])
        inside = old is not None and isinstance(where, Path) and is_inside(where, old)
        if not (inside or copy):
            continue
        if not isinstance(where, Path):
            revision = source.get("revision" if part == "model" else "adapter_revision")
            where = Path(snapshot_download(str(where), revision=revision))
        if where not in copied:
            if inside and old is not None:
                copied[where] = where.relative_to(old).as_posix()
            else:
                shelf = "bases" if part == "model" and source.get("adapter") else "specialists"
                copied[where] = f"{shelf}/{spec['name']}" + (f"/{where.name}" if where.is_file() else "")
            _copy(where, folder / copied[where])
        source[part] = copied[where]


def _copy(where: Path, home: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    if where.is_dir():
        shutil.copytree(where, home, dirs_exist_ok=True)
    else:
        shutil.copy(where, home)


def _absolute_base(spec: dict[str, Any], folder: Path, old: Path | None) -> None:
    """A base that lies inside the old checkpoint moves along with the new adapters."""
    where = resolve(spec["source"]["model"], old, spec["name"])
    if old is not None and isinstance(where, Path) and is_inside(where, old):
        home = folder / where.relative_to(old)
        if not home.exists():
            _copy(where, home)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and vanishes when it does not.

    A folder that exists keeps its other files; its config.json goes first and comes back last, so that it is never
    taken for a whole checkpoint in between.

    Raises:
        CheckpointError: the disk is full or not writable; `target` is as it was.
    """
    target = target.expanduser().absolute()
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        if not target.exists():
            draft.rename(target)
        else:
            (target / "config.json").unlink(missing_ok=True)
            for stale in ("specialists", "bases"):
                shutil.rmtree(target / stale, ignore_errors=True)
            for entry in sorted(draft.iterdir(), key=lambda entry: entry.name == "config.json"):
                if (target / entry.name).is_dir():
                    shutil.rmtree(target / entry.name)
                os.replace(entry, target / entry.name)
    except (OSError, SafetensorError) as error:
        full = "No space left" in str(error) or getattr(error, "errno", None) == 28
        why = "the disk is full" if full else str(error)
        raise CheckpointError(f"{target}: could not be written: {why}; nothing was changed, free some space or choose "
                              "another folder") from error  # fmt: skip
    finally:
        shutil.rmtree(draft, ignore_errors=True)
