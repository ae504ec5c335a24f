"""Read fused checkpoints: the manifest, every specialist from its source, the gate. saving.py writes them."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .adapters import merge_adapter, read_adapter
from .configuration_ultrafuser import UltraFuserConfig, specialist_config
from .empty import empty_model
from .errors import LOAD_ERRORS, CheckpointError, reason
from .files import read_safetensors, refuse_links, refuse_pickles
from .fitness import check_output_layer
from .hub import Access, is_commit, needs_code
from .inputs import OUTPUTS, refuse_keywords
from .manifest import REVISIONS, SpecialistEntry, SpecialistSource, weight_sources
from .parallel import AbsentGroup
from .placement import SPREAD, accelerators, place_groups
from .quantized import check_packages, finish_loading
from .references import check_files, is_hub_id, resolve
from .saving import GATE_FILE, TOKENIZERS, mark_unchanged
from .shared_base import AdapterWeights, SpecialistGroup

logger = logging.getLogger(__name__)


def load_fused(cls: type, name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """See `UltraFuserForCausalLM.from_pretrained`."""
    access = Access.take(kwargs)
    folder = fused_folder(name_or_path, access, kwargs.pop("revision", None), kwargs.pop("subfolder", None))
    config = kwargs.pop("config", None)
    if not isinstance(config, UltraFuserConfig):
        config = read_manifest(folder)
    config.name_or_path = str(name_or_path)
    if "mixing" in kwargs:
        config.mixing = kwargs.pop("mixing")
        config.check()
    # the Auto class has put some of them into the configuration
    refuse_keywords({key: kwargs.pop(key, None) or getattr(config, key, None) for key in OUTPUTS}, "from_pretrained")
    refuse_keywords({"ignore_mismatched_sizes": kwargs.pop("ignore_mismatched_sizes", None)}, "from_pretrained")
    if kwargs.pop("use_safetensors", None) is False:
        raise CheckpointError("from_pretrained got use_safetensors=False. Pickled weights can run code. Leave it out")
    kwargs.pop("adapter_kwargs", None)  # the Auto class means this folder; the specialists have their own adapters
    info = kwargs.pop("output_loading_info", False)
    groups = load_groups(config, folder, access=access, **kwargs)
    model = cls(config, groups)
    state = read_safetensors(folder / GATE_FILE)
    check_files(folder, getattr(config, "gate_files", None) or {}, "the gate")
    try:
        model.gate.load_state_dict({k.removeprefix("gate."): v for k, v in state.items()})
    except RuntimeError as error:  # names or shapes
        raise CheckpointError(
            f"{folder / GATE_FILE}: does not fit the manifest: {' '.join(str(error).split())}. Was it written by another "
            "fusion?"
        ) from error
    model.gate.to(model.device)
    if settings := _generation_settings(folder, str(folder)):
        model.generation_config = settings
    model.specialist_tokenizers = load_specialist_tokenizers(config, folder, access)
    mark_unchanged(model, folder, access)
    model.eval()
    report: dict[str, Any] = {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": [],
    }
    return (model, report) if info else model


def fused_folder(
    name_or_path: str | os.PathLike,
    access: Access | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """The local folder of a fused checkpoint. A hub id is downloaded.

    Raises:
        CheckpointError: no such folder, or one with links that lead out of it.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        if not is_hub_id(str(name_or_path)):
            raise CheckpointError(f"{name_or_path}: no such folder. Expected a fused checkpoint or a hub id")
        folder = (access or Access()).fetch(str(name_or_path), revision, None, str(name_or_path))
    folder /= subfolder or ""
    refuse_links(folder)
    return folder


def _generation_settings(folder: Path, owner: str) -> GenerationConfig | None:
    """The settings in `generation_config.json`, if there is one. transformers ignores a broken file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{owner}: generation_config.json: {reason(error)}. Copy the folder again") from error


def load_tokenizer(path: Path, options: Mapping[str, Any], specialist: str) -> PreTrainedTokenizerBase:
    """A tokenizer whose files are here.

    Raises:
        CheckpointError: there is none, or it needs code that may not run.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except LOAD_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise needs_code(f"the tokenizer in {path}", specialist) from error
        raise CheckpointError(f"specialist {specialist!r}: no tokenizer in {path}: {reason(error)}") from error
    names = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if invalid := [name for name in names if not re.fullmatch(r"[\w-][\w.-]*", name)]:  # saving makes files of them
        raise CheckpointError(
            f"specialist {specialist!r}: the tokenizer in {path} names a chat template {invalid[0]!r}. Expected letters, digits, "
            "'_', '-' or '.', because it names a file"
        )
    return tokenizer


def load_specialist_tokenizers(
    config: UltraFuserConfig, folder: Path, access: Access
) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers of those specialists that read another one than the first.

    Raises:
        CheckpointError: one cannot be loaded.
    """
    paths = {name: folder / TOKENIZERS / name for name in config.names}
    return {name: load_tokenizer(path, access.options(name), name) for name, path in paths.items() if path.is_dir()}


def read_manifest(folder: Path) -> UltraFuserConfig:
    """The configuration of a fused checkpoint.

    Raises:
        CheckpointError: no manifest (not a checkpoint, or half written), or a broken one.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json, so it is not a fused checkpoint or was only half written. Write it again with "
            "`ultrafuser fuse` or save_pretrained"
        )
    model_type = read_model_type(folder / "config.json")
    if model_type != UltraFuserConfig.model_type:
        raise CheckpointError(
            f"{folder}: model_type is {model_type!r}, expected 'ultrafuser'. Fuse it with `ultrafuser fuse`"
        )
    try:
        config = UltraFuserConfig.from_pretrained(folder)
        config.groups()  # reads every entry
        return config
    except CheckpointError:
        raise
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{folder}/config.json: no manifest of a fused checkpoint: {reason(error)}") from error


def read_model_type(file: Path) -> str | None:
    """The kind of model that a config.json describes.

    Raises:
        CheckpointError: it is not JSON, or no mapping.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}. Is the folder half written? Copy it again") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: expected a mapping, got {type(fields).__name__}. Copy the folder again")
    return fields.get("model_type")


def load_groups(
    config: UltraFuserConfig,
    folder: Path | None,
    verify: bool = True,
    access: Access | None = None,
    share: tuple[int, int] = (0, 1),
    **kwargs: Any,
) -> list[SpecialistGroup | AbsentGroup]:
    """Load every specialist from its source. Adapters on one base load that base once.

    Args:
        folder: the checkpoint, against which relative sources resolve.
        verify: compare local weight files with the recorded sizes and checksums first.
        access: to the hub. Sources without a commit are pinned to the one that is loaded.
        share: (i, n): of each n groups in turn load the i-th alone. The others are left to other processes.
        kwargs: of AutoModelForCausalLM.from_pretrained. With `device_map="auto"`, whole specialists are spread over the
            accelerators of this process.

    Raises:
        CheckpointError: a reference is gone, a file changed, weights are pickled, an adapter does not fit its base, or there are
            fewer groups than processes.
    """
    access = access or Access()
    for spec in config.specialists:
        for repository, commit in pin(spec["source"], folder, spec["name"], access):
            logger.warning(
                "specialist %r: no commit of %s is recorded. Loading %s. Save the model to record it",
                spec["name"], repository, commit,
            )  # fmt: skip
    config.check_share(share[1])
    groups, checked = list[SpecialistGroup | AbsentGroup](), set[Path]()
    for spec in config.specialists:
        quantization = spec.get("quantization") or spec["config"].get("quantization_config") or {}
        check_packages(quantization, f"specialist {spec['name']!r}")
    devices: list[str] = []
    if kwargs.get("device_map") in SPREAD and len(free_bytes := accelerators()) > 1:
        dtype = str(kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto").removeprefix("torch.")
        devices = place_groups(config, folder, dtype, access, free_bytes)
    for g, indices in enumerate(config.groups()):
        specs = [config.specialists[k] for k in indices]
        if devices:
            kwargs["device_map"] = devices[g]
        if g % share[1] != share[0]:
            model = empty_model(specs[0], torch.float32)
            groups.append(AbsentGroup([spec["name"] for spec in specs], model.get_output_embeddings().weight.shape[1]))
            continue
        for spec in specs if verify else ():
            check_recorded_files(spec, folder, checked)
        model = load_base(specs[0], folder, access, **kwargs)
        if specs[0].get("separate"):
            model = merge_adapter(model, specs[0], folder, access)
            adapters: list[AdapterWeights | None] = []
        else:
            adapters = [read_adapter(spec, folder, model.dtype, access) for spec in specs]
        group = SpecialistGroup(model, [spec["name"] for spec in specs], adapters)
        check_output_layer(group)
        groups.append(group)
    return groups


def check_recorded_files(spec: SpecialistEntry, folder: Path | None, checked: set[Path]) -> None:
    """Compare a specialist's local weight files with the recorded sizes and checksums.

    Args:
        checked: the paths that need no check any more, because several specialists may share a base. Grows.

    Raises:
        CheckpointError: a file is missing or changed.
    """
    for key, reference in weight_sources(spec["source"]):
        recorded = (spec.get("files") or {}).get(key)
        if not recorded:
            continue
        path = Path(resolve(reference, folder, spec["name"]))
        if path not in checked:
            check_files(path, recorded, f"specialist {spec['name']!r}")
            checked.add(path)


def pin(source: SpecialistSource, folder: Path | None, name: str, access: Access) -> list[tuple[str, str]]:
    """Record the commits of a specialist's hub repositories. Returns the repositories that had none, and their commits."""
    pinned = []
    for key, reference in weight_sources(source):
        revision = source.get(REVISIONS[key])
        if isinstance(resolve(reference, folder, name), str) and not is_commit(revision):
            source[REVISIONS[key]] = commit = access.commit(reference, revision, name)
            pinned.append((reference, commit))
    return pinned


def load_base(
    spec: SpecialistEntry, folder: Path | None, access: Access | None = None, **kwargs: Any
) -> PreTrainedModel:
    """The causal model of one specialist, without its adapter."""
    source, name = spec["source"], spec["name"]
    path, location = locate_model(source, folder, name, access, weights=True)
    options = _loading_options(spec, kwargs, path, location) | location
    if "gguf_file" in location:
        if options["dtype"] == "auto":
            options["dtype"] = torch.float32  # a GGUF file is decompressed and has no data type
    else:
        refuse_pickles(path, f"specialist {name!r}", spec["config"].get("transformers_weights"))
        _generation_settings(path, f"specialist {name!r}: {path}")  # otherwise its answers would not end as they should
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except LOAD_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise needs_code(source["model"], name) from error
        raise CheckpointError(
            f"specialist {name!r}: its weights could not be loaded from {source['model']}: {reason(error)}"
        ) from error
    # transformers fills missing weights with random numbers and a warning
    if missing := sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"]):
        raise CheckpointError(
            f"specialist {name!r}: {source['model']} lacks {len(missing)} weights of a {type(model).__name__}, or has them in "
            f"another shape: {', '.join(missing[:3])}. It is half written, or belongs to another configuration"
        )
    if "gguf_file" in location and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # decompressed: saving must not claim otherwise
    try:
        finish_loading(model)
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"specialist {name!r}: its quantised weights cannot run on {model.device}: {reason(error)}"
        ) from error
    return model


def locate_model(
    source: SpecialistSource, folder: Path | None, name: str, access: Access | None = None, weights: bool = False
) -> tuple[Path, dict[str, Any]]:
    """The path and options by which transformers' `from_pretrained` finds the model of the specialist `name`.

    Args:
        weights: fetch the weights of a hub model too.
    """
    access = access or Access()
    path, gguf_file, revision = resolve(source["model"], folder, name), source.get("gguf_file"), source.get("revision")
    options = access.options(name) | ({"gguf_file": gguf_file} if gguf_file else {})
    if not isinstance(path, Path):
        whole = weights or gguf_file  # the configuration is in the GGUF file
        path = access.model(path, revision, name, gguf_file) if whole else access.metadata(path, revision, name)
    if path.suffix == ".gguf":
        return path.parent, options | {"gguf_file": path.name}
    return path, options


def _loading_options(
    spec: SpecialistEntry, kwargs: Mapping[str, Any], path: Path, location: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of `AutoModelForCausalLM.from_pretrained`: the caller's, replaced by those of the manifest entry."""
    options = dict(kwargs)
    options.setdefault("dtype", options.pop("torch_dtype", None) or "auto")
    specific = {key: spec.get(key) for key in ("dtype", "device_map")}
    specific["quantization_config"] = spec.get("quantization")
    options |= {key: value for key, value in specific.items() if value is not None}
    if isinstance(options.get("quantization_config"), dict):
        from transformers.quantizers.auto import AutoQuantizationConfig

        try:
            options["quantization_config"] = AutoQuantizationConfig.from_dict(options["quantization_config"])
        except LOAD_ERRORS as error:
            raise CheckpointError(
                f"specialist {spec['name']!r}: quantization cannot be used: {reason(error)}"
            ) from error
    if location["trust_remote_code"] and spec["config"].get("auto_map"):
        options["config"] = AutoConfig.from_pretrained(path, **location)  # its class is in the repository too
    elif spec["config"]["model_type"] not in CONFIG_MAPPING:
        raise needs_code(spec["source"]["model"], spec["name"])
    else:
        options["config"] = specialist_config(spec["config"])  # parsing a GGUF file for it is slow
    return options
