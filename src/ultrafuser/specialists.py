"""Fuse a recipe's specialists: find each one, compare the tokenizers, add an untrained gate."""

from __future__ import annotations

import copy
import datetime
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedTokenizerBase

from ultrafuser.data.chat_format import ChatFormat, resolve_template
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import CheckpointError, RecipeError, TokenizerMismatchError
from ultrafuser.model.adapters import adapter_tables, is_plain_lora, read_adapter_config
from ultrafuser.model.checkpoint import (
    fused_folder,
    load_groups,
    load_specialist_tokenizers,
    load_tokenizer,
    locate_model,
    pin,
    read_manifest,
    read_model_type,
)
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig, table_rows
from ultrafuser.model.empty import empty_groups
from ultrafuser.model.errors import LOAD_ERRORS, reason
from ultrafuser.model.fitness import check_architecture, check_head, check_weights
from ultrafuser.model.hub import Access, needs_code
from ultrafuser.model.manifest import FileRecords, SpecialistEntry, SpecialistSource, weight_sources
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.references import PACKAGE, is_hub_id, record_files, resolve
from ultrafuser.model.saving import mark_unchanged
from ultrafuser.recipe import Recipe, SpecialistRecipe
from ultrafuser.vocabulary import common_vocabulary, is_same_tokenizer, shared_end

_SOURCE_FIELDS = {"model", "revision", "gguf_file", "adapter", "adapter_revision"}
_LOADING_FIELDS = {"dtype", "device_map", "quantization", "template_kwargs", "system"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
logger = logging.getLogger(__name__)


def fuse(
    recipe: Recipe, *, share: tuple[int, int] = (0, 1), **options: Any
) -> tuple[UltraFuserForCausalLM, PreTrainedTokenizerBase]:
    """Load the recipe's specialists and add an untrained gate.

    Args:
        share: which of them this process holds. See `load_groups`.
        options: `token`, `cache_dir`, `local_files_only` and `force_download` of transformers' `from_pretrained`.

    Raises:
        CheckpointError: a specialist cannot be loaded.
        TokenizerMismatchError: tokenizers that differ, with the tokens that differ.
        DataError: a specialist without a chat template.
    """
    access = Access(**options, trust_remote_code=recipe.trusted_code)
    date = recipe.date or datetime.date.today().isoformat()
    specs, formats = _describe_all(recipe, access, date)
    tokenizers = {chat_format.name: chat_format.tokenizer for chat_format in formats}
    vocabulary = common_vocabulary(tokenizers, {spec["name"]: table_rows(spec) for spec in specs})
    tokenizer = formats[0].tokenizer
    distinct = {name: other for name, other in tokenizers.items() if not is_same_tokenizer(other, tokenizer)}
    end = shared_end(formats, vocabulary)
    tokenizer.chat_template = specs[0]["chat_template"]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = _configure(
        recipe,
        specs,
        vocab_size=vocabulary.size,
        end_token_id=end,
        masked_token_ids=[token for token in vocabulary.masked if token != end],
        date=date if any(chat_format.reads_clock for chat_format in formats) else None,
    )
    device = recipe.device_map or pick_device(recipe.device)
    groups = load_groups(config, None, verify=False, access=access, share=share, dtype=recipe.dtype, device_map=device)
    _record_files(config)
    torch.manual_seed(recipe.seed)
    model = UltraFuserForCausalLM(config, groups)
    for group in model.local_groups:
        check_weights(group, config.vocab_size)
        check_head(group, config.vocab_size)
    model.specialist_tokenizers = distinct
    model.gate.to(model.device)
    mark_unchanged(model, None, access)
    model.generation_config.eos_token_id = _ends(model)
    model.generation_config.pad_token_id = make_renderer(model, tokenizer).pad_id
    return model.eval(), tokenizer


def outline(recipe: Recipe, **options: Any) -> UltraFuserForCausalLM:
    """The model of a recipe without weights, on torch's meta device. Only configurations and adapters are read.

    Args:
        options: see `fuse`.

    Raises:
        CheckpointError: a specialist has no configuration, or an adapter that does not fit.
    """
    access = Access(**options, trust_remote_code=recipe.trusted_code)
    if recipe.fused is not None:
        folder = fused_folder(recipe.fused)
        config = UltraFuserConfig.from_pretrained(folder)
    else:
        folder, configs = None, dict[str, dict[str, Any]]()
        specs = [_describe(specialist, configs, access) for specialist in recipe.specialists]
        config = _configure(recipe, specs, vocab_size=min(map(table_rows, specs)))
    groups = empty_groups(config, folder, recipe.dtype, access)
    with torch.device("meta"):
        return UltraFuserForCausalLM(config, groups)


def _configure(recipe: Recipe, specs: list[SpecialistEntry], **fields: Any) -> UltraFuserConfig:
    """The configuration of a recipe's model. `fields`: what the recipe does not say."""
    return UltraFuserConfig(
        specialists=specs,
        gate_type=recipe.gate.type,
        gate_hidden_size=recipe.gate.hidden_size,
        mixing=recipe.mixing,
        share_base=recipe.share_base,
        **fields,
    )


def answers_apart(recipe: Recipe) -> bool:
    """Whether the specialists' templates write different blanks around an answer. They then count as prompt for all."""
    _, formats = _describe_all(recipe, Access(trust_remote_code=recipe.trusted_code), recipe.date)
    return len({(chat_format.lead, chat_format.tail) for chat_format in formats}) > 1


def _describe_all(recipe: Recipe, access: Access, date: str | None) -> tuple[list[SpecialistEntry], list[ChatFormat]]:
    """The manifest entry and the chat format of each specialist."""
    configs: dict[str, dict[str, Any]] = {}
    specs = [_describe(specialist, configs, access) for specialist in recipe.specialists]
    tokenizers = _tokenizers(specs, access)
    formats = []
    for spec, specialist in zip(specs, recipe.specialists, strict=True):
        name, tokenizer = spec["name"], tokenizers[spec["name"]]
        spec["chat_template"] = resolve_template(specialist.chat_template, tokenizer, name)
        chat_format = _chat_format(spec, tokenizer, date)
        end, rows = chat_format.end_token_id, table_rows(spec)
        token = tokenizer.convert_ids_to_tokens(end)
        if end >= rows:
            raise TokenizerMismatchError(
                f"specialist {name!r}: its answers end with {token!r} (id {end}), but its embedding table has {rows} rows. Resize "
                "its embeddings, or give it another chat_template"
            )
        if not chat_format.writes_end:
            logger.warning(
                "specialist %r: its chat template writes no end token that its tokenizer has. Its answers end with %r",
                name, token,
            )  # fmt: skip
        spec["end_token_id"] = end
        formats.append(chat_format)
    return specs, formats


def _ends(model: UltraFuserForCausalLM) -> int | list[int]:
    """The tokens that end an answer: the common label, then those that the specialists' own checkpoints name."""
    assert model.config.end_token_id is not None
    end, further = model.config.end_token_id, set[int]()
    tokens = {spec["name"]: spec["end_token_id"] for spec in model.config.specialists}
    for group in model.local_groups:
        ends = group.model.generation_config.eos_token_id
        for name in group.names:  # a specialist's own end token is `end` in the mixture
            further |= set(ends if isinstance(ends, list) else [ends]) - {tokens[name], None}
    common = set(range(model.config.vocab_size)) - set(model.config.masked_token_ids)
    further = (further & common) - {end}
    return [end, *sorted(further)] if further else end


def load(folder: str | Path, **kwargs: Any) -> tuple[UltraFuserForCausalLM, Renderer]:
    """A fused checkpoint and the renderer of its prompts.

    Args:
        folder: a folder or a hub id.
        kwargs: of `UltraFuserForCausalLM.from_pretrained`, e.g. `dtype`, `device_map`.

    Raises:
        CheckpointError: see `UltraFuserForCausalLM.from_pretrained`.
    """
    kwargs.setdefault("device_map", pick_device("auto"))
    access = Access.take(dict(kwargs))
    local = fused_folder(folder, access, kwargs.pop("revision", None), kwargs.pop("subfolder", None))
    model = UltraFuserForCausalLM.from_pretrained(local, **kwargs)
    first = model.config.names[0]
    tokenizer = load_tokenizer(local, access.options(first), first)
    return model, make_renderer(model, tokenizer)


def make_renderer(
    model: UltraFuserForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    apart: bool | None = None,
) -> Renderer:
    """The renderer of a fused model's prompts and rows.

    Args:
        tokenizer: of the fused model. Specialists whose own tokenizers differ read theirs.
        max_length: maximum tokens of a sequence. Default: the smallest context of the specialists.
        apart: see `Renderer`.
    """
    return _renderer(model.config, model.specialist_tokenizers, tokenizer, max_length, apart)


def load_renderer(folder: str | Path) -> Renderer:
    """The renderer of a fused checkpoint, without its weights.

    Raises:
        CheckpointError: no fused checkpoint, or one without a tokenizer.
    """
    access = Access()
    local = fused_folder(folder, access)
    config = read_manifest(local)
    tokenizer = load_tokenizer(local, access.options(config.names[0]), config.names[0])
    return _renderer(config, load_specialist_tokenizers(config, local, access), tokenizer, None, None)


def _renderer(
    config: UltraFuserConfig,
    specialist_tokenizers: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    apart: bool | None,
) -> Renderer:
    formats = [
        _chat_format(spec, specialist_tokenizers.get(spec["name"], tokenizer), config.date)
        for spec in config.specialists
    ]
    return Renderer(
        tokenizer,
        formats,
        config.max_position_embeddings if max_length is None else min(max_length, config.max_position_embeddings),
        end_token_id=config.end_token_id,
        vocab_size=config.vocab_size,
        masked_token_ids=frozenset(config.masked_token_ids),
        apart=apart,
    )


def _chat_format(spec: SpecialistEntry, tokenizer: PreTrainedTokenizerBase, date: str | None) -> ChatFormat:
    if not spec.get("chat_template"):
        raise CheckpointError(f"specialist {spec['name']!r}: the manifest has no chat_template for it. Fuse again")
    return ChatFormat(
        tokenizer,
        spec["chat_template"],
        name=spec["name"],
        template_kwargs=spec.get("template_kwargs"),
        system=spec.get("system", "keep"),
        date=date,
        table_rows=table_rows(spec),
    )


@dataclass(frozen=True)
class ModelReference:
    """How users name a model: a folder, hub id, GGUF file or `package:MODULE/FILE`, and perhaps an adapter on it."""

    model: str
    adapter: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether transformers' Auto classes load it by itself: a folder or a hub id."""
        return self.adapter is None and not self.model.startswith(PACKAGE) and not self.model.endswith(".gguf")


def parse_model_reference(text: str) -> ModelReference:
    """Split `BASE+ADAPTER` at the `+` with a model on both sides, since a `+` may also belong to a path."""
    pairs = [(text[: sign.start()], text[sign.end() :]) for sign in re.finditer(r"\+", text)]
    if not pairs or _exists(text):
        return ModelReference(text)
    complete = [pair for pair in pairs if all(map(_may_be_model, pair))]
    half = [(base, adapter) for base, adapter in pairs if _exists(base) or (adapter and _exists(adapter))]
    if complete or half:
        return ModelReference(*(complete or half)[0])
    base, adapter = pairs[-1]
    return ModelReference(text) if adapter else ModelReference(base)  # a `+` at the end is nothing


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _may_be_model(reference: str) -> bool:
    return (
        _exists(reference)
        or reference.startswith(PACKAGE)
        or (is_hub_id(reference) and bool(_HUB_ID.fullmatch(reference)))
    )


def is_fused(source: str) -> bool:
    """Whether a folder or a hub id is a fused checkpoint.

    Raises:
        CheckpointError: its `config.json` is not JSON.
    """
    file = Path(source) / "config.json"
    if not file.is_file():
        if Path(source).exists() or not parse_model_reference(source).is_plain or source.count("/") != 1:
            return False
        try:
            file = Path(hf_hub_download(source, "config.json"))
        except (OSError, ValueError):  # the error comes when it is loaded
            return False
    return read_model_type(file) == UltraFuserConfig.model_type


def pick_device(device: str) -> str:
    """Resolve `auto` to a GPU if there is one.

    Raises:
        RecipeError: this machine or this build of torch does not have the device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise RecipeError(f"device {device!r} cannot be used here: {error}. Try auto or cpu") from error
    return device


def _tokenizers(specs: Sequence[SpecialistEntry], access: Access) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizer of each specialist. That in the folder of an adapter comes before its base's. Each is loaded once."""
    by_source: dict[str, PreTrainedTokenizerBase] = {}
    tokenizers = {}
    for spec in specs:
        name, source = spec["name"], spec["source"]
        path, options = locate_model(source, None, name, access)
        adapter = read_adapter_config(source, None, name, access)
        folder = adapter[0] if adapter is not None else None
        has_own = folder is not None and any((folder / file).is_file() for file in _TOKENIZER_FILES)
        if has_own and folder is not None:
            path, options = folder, access.options(name)
        location = repr((path, options))
        if location not in by_source:
            by_source[location] = _load_tokenizer(path, options, spec)
        tokenizers[name] = by_source[location]
        template = folder / "chat_template.jinja" if folder is not None else None
        if template is not None and not has_own and template.is_file():
            tokenizers[name] = copy.deepcopy(tokenizers[name])
            tokenizers[name].chat_template = template.read_text(encoding="utf-8")
    return tokenizers


def _load_tokenizer(path: Path, options: Mapping[str, Any], spec: SpecialistEntry) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(path, options, spec["name"])
    end = spec["config"].get("eos_token_id")
    if "gguf_file" in options and isinstance(end, int):  # transformers 5.17 reads bos_token from some files
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def _describe(specialist: SpecialistRecipe, configs: dict[str, dict[str, Any]], access: Access) -> SpecialistEntry:
    """A recipe's specialist as a manifest entry. `configs` caches the model configurations that several share."""
    name = specialist.name
    source = cast(SpecialistSource, specialist.model_dump(include=_SOURCE_FIELDS, exclude_none=True))
    for key, reference in weight_sources(source):  # local folders are kept with their full path
        if not reference.startswith(PACKAGE):
            source[key] = str(resolve(reference, None, name))
    pin(source, None, name, access)  # a later push to the hub must not change this fusion
    adapter = read_adapter_config(source, None, name, access)
    path, options = locate_model(source, None, name, access)
    location = repr((path, options))
    if location not in configs:  # a GGUF file takes seconds to parse
        configs[location] = _read_config(path, options, name)
    config = copy.deepcopy(configs[location])
    entry: SpecialistEntry = {"name": name, "domain": specialist.domain, "source": source, "config": config}
    entry |= cast(SpecialistEntry, specialist.model_dump(include=_LOADING_FIELDS, exclude_defaults=True))
    if adapter is not None:
        only_lora, rows = adapter_tables(adapter[0], f"specialist {name!r}")
        if not (only_lora and is_plain_lora(adapter[1])):
            entry["separate"] = True
        if rows is not None:
            entry["table_rows"] = rows
    return entry


def _read_config(path: Path, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A model's configuration as plain JSON."""
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except LOAD_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise needs_code(path, name) from error
        file = path / options.get("gguf_file", "")
        raise CheckpointError(f"specialist {name!r}: no model in {file}: {reason(error)}") from error
    check_architecture(config, f"specialist {name!r}: {path}")
    fields = config.to_dict()
    if "gguf_file" in options:
        fields.pop("quantization_config", None)  # transformers decompresses it
    if fields["model_type"] not in CONFIG_MAPPING:  # without its code, only these names are known
        facts = {key: getattr(config, key, None) for key in ("vocab_size", "max_position_embeddings")}
        fields = {key: value for key, value in facts.items() if value is not None} | fields
    return fields


def _record_files(config: UltraFuserConfig) -> None:
    """Record checksums of local weights, so that changes are detected. Hub models are pinned to a commit instead."""
    records: dict[Path, FileRecords] = {}
    for entry in config.specialists:
        entry["files"] = {}
        for key, reference in weight_sources(entry["source"]):
            path = resolve(reference, None, entry["name"])
            if isinstance(path, Path):
                if path not in records:
                    records[path] = record_files(path)
                entry["files"][key] = records[path]
