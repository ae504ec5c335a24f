"""Load a MODEL of the command line for lm-eval: a fused folder, any checkpoint, BASE+ADAPTER or an endpoint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lm_eval.api.model import LM
from pydantic import ValidationError

from ultrafuser.data.templates import Renderer
from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.errors import RecipeError
from ultrafuser.evaluate.lm.fused import FusionLM
from ultrafuser.evaluate.lm.parameters import count_parameters
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.references import PACKAGE, record_files
from ultrafuser.recipe import load_node, load_recipe
from ultrafuser.specialists import fuse, is_fused, load, make_renderer, parse_model_reference, pick_device

ENDPOINT = "openai:"


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        chat_template: for a model whose tokenizer has none: a built-in name, a file, or Jinja text.
        dtype, device: as in a training recipe.
        batch_size: requests answered together.
        trust_remote_code: run the code in the repositories of all specialists, or of those named.
    """

    chat_template: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 8
    trust_remote_code: bool | Sequence[str] = False


@dataclass
class LoadedModel:
    """A model that answers.

    Attributes:
        lm: the model as lm-eval sees it.
        fingerprint: differs for different weights, templates or endpoints.
        model, renderer: None for an endpoint, which shows no probabilities of given text.
    """

    name: str
    lm: LM
    fingerprint: str
    model: UltraFuserForCausalLM | None = None
    renderer: Renderer | None = None

    def parameters(self) -> dict[str, int] | None:
        """Weights in total (`total`) and weights used for each token (`active`), or None for an endpoint."""
        if self.model is None:
            return None
        single = len(self.model.config.names) == 1  # whose gate is not counted
        return count_parameters(self.model.groups[0].model if single else self.model)


def load_model(
    source: str, options: LoadOptions | None = None, *, name: str | None = None, seed: int = 0
) -> LoadedModel:
    """Load a model of the command line.

    Args:
        source: a fused folder, a folder or hub id of any causal model, a GGUF file, `BASE+ADAPTER` of any of these, or
            `openai:NAME@http://host/v1`.
        seed: of sampled answers.

    Raises:
        CheckpointError: there is no such model, or it cannot be loaded.
        DataError: a model without a chat template.
        RecipeError: an endpoint or device that cannot be used.
    """
    options, name = options or LoadOptions(), name or name_of(source)
    if source.startswith(ENDPOINT):
        from ultrafuser.evaluate.lm.endpoint import Endpoint, EndpointLM

        endpoint = endpoint_recipe(source)
        settings = endpoint.model_dump(include={"temperature", "max_tokens", "extra_body"}, exclude_defaults=True)
        # Only a YAML file has settings.
        suffix = f" {json.dumps(settings, sort_keys=True)}" if settings else ""
        fingerprint = f"openai:{endpoint.model}@{endpoint.base_url}{suffix}"
        return LoadedModel(name, EndpointLM(Endpoint(endpoint)), fingerprint)
    if is_fused(source):
        if options.chat_template is not None:
            raise RecipeError(f"{source}: a fused model has a template for each specialist. Leave --chat-template out")
        model, renderer = load(
            source,
            dtype=options.dtype,
            device_map=pick_device(options.device),
            trust_remote_code=options.trust_remote_code,
        )
    else:
        spec = {"name": "model", **asdict(parse_model_reference(source)), "chat_template": options.chat_template}
        recipe = {"specialists": [spec], "dtype": options.dtype, "device": options.device, "seed": seed}
        recipe["trust_remote_code"] = bool(options.trust_remote_code)
        model, tokenizer = fuse(load_recipe(recipe))
        renderer = make_renderer(model, tokenizer)
    return wrap_model(model, renderer, name=name, batch_size=options.batch_size, seed=seed, folder=Path(source))


def wrap_model(
    model: UltraFuserForCausalLM,
    renderer: Renderer,
    *,
    name: str,
    batch_size: int = 8,
    seed: int = 0,
    folder: Path | None = None,
) -> LoadedModel:
    """A model in memory as one that answers.

    Args:
        folder: with the model's weight files, if it has one. They are part of the fingerprint.
    """
    lm = FusionLM(model, renderer, batch_size=batch_size, seed=seed)
    return LoadedModel(name, lm, _fingerprint(model, renderer, folder), model, renderer)


def name_of(text: str) -> str:
    """A short name that a folder can have: the end of a path, hub id, adapter or endpoint's model."""
    if text.startswith(ENDPOINT):
        text = endpoint_recipe(text).model
    reference = parse_model_reference(text)
    last = Path((reference.adapter or reference.model).removeprefix(PACKAGE)).name
    return re.sub(r"[^A-Za-z0-9_.-]", "-", last).strip(".-") or "model"


def split_name(text: str) -> tuple[str | None, str]:
    """The name and the model of `NAME=MODEL`. MODEL alone has no name."""
    match = re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)=(.+)", text)
    is_path = Path(text).exists() or Path(parse_model_reference(text).model).exists()  # a path may hold a `=`
    return (match[1], match[2]) if match and not is_path else (None, text)


def endpoint_recipe(text: str) -> EndpointRecipe:
    """`[openai:]NAME[@URL]` as an endpoint, or a YAML file with the fields of one.

    Raises:
        RecipeError: another form, or a file with other fields.
    """
    if (file := text.removeprefix(ENDPOINT)).endswith((".yaml", ".yml")):
        return load_node(EndpointRecipe, file)
    if "://" in text and "@http" not in text.lower():
        raise RecipeError(f"{text}: expected NAME@URL, such as my-model@http://localhost:8000/v1")
    try:
        return EndpointRecipe.model_validate(text)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{text}: {problem}. Expected NAME@URL, such as my-model@http://localhost:8000/v1") from None


def _fingerprint(model: UltraFuserForCausalLM, renderer: Renderer, folder: Path | None) -> str:
    """A hash of all that decides the answers: configuration, weight files, gate, templates."""
    digest = hashlib.sha256()
    several = len(model.config.specialists) > 1  # with one specialist, neither gate nor mixing matters
    dtypes = [str(group.model.dtype) for group in model.groups]
    facts = [model.config.specialists, model.config.mixing if several else "", renderer.chat_templates, dtypes]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    if folder is not None and folder.is_dir():
        inner = [folder, *sorted(path for path in folder.glob("specialists/*") if path.is_dir())]
        digest.update(json.dumps([record_files(path) for path in inner]).encode())
    for parameter in model.gate.parameters() if several else ():
        digest.update(parameter.detach().float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
