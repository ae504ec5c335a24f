"""Branch-Train-MiX: the specialists' MLPs side by side behind a trained router, all other weights averaged.

Source: arXiv 2403.07816: K feed-forward blocks in each layer, the top two by a linear router weighed by a softmax over
the two, every other weight the mean of the specialists', then everything trained. A minimal build for models whose
layers hold an `mlp` (Llama, Qwen2, Mistral, Gemma and their like).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ultrafuser.data.templates import Rendered
from ultrafuser.errors import CheckpointError, UltraFuserError
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.model.manifest import SpecialistEntry
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM, UltraFuserOutput
from ultrafuser.model.saving import atomic_directory
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.progress import Progress
from ultrafuser.recipe import Recipe
from ultrafuser.train.stages import StageRun, run_stage
from ultrafuser.train.trainer import FusionTrainer

WEIGHTS_FILE, FACTS_FILE = "btx.safetensors", "btx.json"
BALANCE_WEIGHT = 0.01  # of the load-balancing loss, as in the paper


class RoutedMlp(nn.Module):
    """K MLPs and a router: each token goes through the `top_k` with the highest scores.

    y = sum_k softmax_k(scores of these MLPs) MLP_k(x). With `top_k` = K every MLP runs.
    """

    def __init__(self, mlps: Sequence[nn.Module], width: int, top_k: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(mlps)
        weight = next(self.mlps.parameters())
        self.router = nn.Linear(width, len(mlps), bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(self.router.weight, std=0.02)
        self.top_k = top_k
        self.scores: torch.Tensor | None = None  # (N, K) of the last forward pass in training, for the balance loss

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        scores = self.router(flat)  # (N, K)
        self.scores = scores if self.training else None
        top, indices = scores.topk(self.top_k, dim=-1)  # (N, top_k)
        weights = torch.zeros_like(scores).scatter(1, indices, top.softmax(-1))  # (N, K)
        out = torch.zeros_like(flat)
        for k, mlp in enumerate(self.mlps):
            tokens = (indices == k).any(-1).nonzero()[:, 0]
            if len(tokens):
                out = out.index_add(0, tokens, mlp(flat[tokens]) * weights[tokens, k, None])
        return out.reshape(x.shape)

    def idle_parameters(self) -> int:
        """Parameters that a token does not pass through."""
        size = sum(parameter.numel() for parameter in self.mlps.parameters()) // len(self.mlps)
        return size * (len(self.mlps) - self.top_k)


def build_btx(models: Sequence[PreTrainedModel], *, top_k: int = 2, seed: int = 0) -> PreTrainedModel:
    """One model of K specialists, with untrained routers. The specialists stay as they are.

    It is the first one's class with other MLPs, so `generate` and everything else of transformers works. Save it by
    `save_btx`: an ordinary checkpoint cannot hold it.

    Raises:
        UltraFuserError: the specialists' weights differ in names or shapes, or their layers have no `mlp`.
    """
    _check(models)
    named = [dict(model.named_parameters()) for model in models]
    merged = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            mean = torch.stack([parameters[name].float().to(parameter.device) for parameters in named]).mean(0)
            parameter.copy_(mean)  # MLPs too, but those are replaced
    layers = [_layers(model) for model in models]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i, layer in enumerate(_layers(merged)):
            mlps = [copy.deepcopy(model_layers[i].mlp) for model_layers in layers]
            layer.mlp = RoutedMlp(mlps, _width(merged), min(top_k, len(models)))
    merged.requires_grad_(True)
    return merged.eval()


class BtxTrainer(FusionTrainer):
    """Adds the load-balancing loss of the paper."""

    balance_weight = BALANCE_WEIGHT

    def extra_loss(self, inputs: dict[str, Any], out: UltraFuserOutput) -> torch.Tensor | None:
        ids, index = inputs["specialist_input_ids"][:, 0], inputs["response_index"][:, 0]
        lengths = index.amax(1, keepdim=True) + 1  # a row ends with the token that predicts the last response token
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths  # (B, T)
        return self.balance_weight * balance_loss(self.model, mask)


def train_btx(
    model: UltraFuserForCausalLM,
    recipe: Recipe,
    rows: Sequence[Rendered],
    folder: Path,
    progress: Progress | None = None,
    trainer: type[BtxTrainer] = BtxTrainer,
) -> None:
    """Train all weights in place by the recipe's joint stage, on balanced batches. An interrupted run is resumed.

    Args:
        model: of `as_fused`.
        folder: of checkpoints and metrics.
    """
    stage = next(stage for stage in recipe.stages if stage.name == "joint").model_copy(
        update={"specialists": "full", "kl_coef": 0.0}
    )
    recipe = recipe.model_copy(update={"balanced": True})
    progress = progress or Progress()
    run_stage(StageRun(model, stage, recipe, rows, [], folder / "1-joint", progress=progress, trainer=trainer))


def balance_loss(model: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """K sum_k (share of routing slots of k) (mean probability of k), mean over the layers. It is 1 when all are used equally.

    Args:
        mask: (B, T), true at the tokens that count (not padding).

    Source: equation 4 of Switch Transformers, arXiv 2101.03961, which BTX takes over.
    """
    losses = []
    for layer in model.modules():
        if isinstance(layer, RoutedMlp) and layer.scores is not None:
            scores = layer.scores[mask.reshape(-1)].float()  # (N, K)
            slots = nn.functional.one_hot(scores.topk(layer.top_k, dim=-1).indices, scores.shape[1])
            shares = slots.float().mean((0, 1))  # (K,)
            losses.append(scores.shape[1] * (shares * scores.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def save_btx(model: PreTrainedModel, folder: Path) -> None:
    """Write a model of `build_btx`, all or nothing. Without config.json no one loads it as an ordinary checkpoint."""
    first = _layers(model)[0].mlp
    facts = {
        "num_specialists": len(first.mlps),
        "top_k": first.top_k,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": model.config.to_dict(),
    }
    with atomic_directory(folder) as draft:
        save_model(model, str(draft / WEIGHTS_FILE))
        model.generation_config.save_pretrained(draft)
        (draft / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def load_btx(folder: Path) -> PreTrainedModel:
    """Read a model that `save_btx` wrote.

    Raises:
        CheckpointError: there is none in the folder.
    """
    if not (folder / FACTS_FILE).is_file():
        raise CheckpointError(f"{folder}: no {FACTS_FILE}, so there is no BTX model. Write one with save_btx")
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    fields = dict(facts["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, facts["dtype"]), trust_remote_code=False)
    for layer in _layers(model):
        mlps = [copy.deepcopy(layer.mlp) for _ in range(facts["num_specialists"])]
        layer.mlp = RoutedMlp(mlps, _width(model), facts["top_k"])
    load_model(model, str(folder / WEIGHTS_FILE))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def as_fused(
    model: PreTrainedModel,
    name: str = "btx",
    *,
    vocab_size: int | None = None,
    chat_template: str = "",
    folder: str = "",
) -> UltraFuserForCausalLM:
    """The mixture as a fused model of one specialist, which is how it is trained and measured.

    Args:
        vocab_size: rows of the output layer that are used. Default: all.
        folder: its checkpoint.
    """
    entry: SpecialistEntry = {
        "name": name,
        "domain": name,
        "source": {"model": folder},
        "config": model.config.to_dict(),
        "chat_template": chat_template,
    }
    config = UltraFuserConfig([entry], vocab_size=vocab_size or model.config.vocab_size)
    return UltraFuserForCausalLM(config, [SpecialistGroup(model, [name])]).eval()


def _layers(model: PreTrainedModel) -> Any:
    return getattr(model.base_model, "layers", [])


def _width(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[1]


def _check(models: Sequence[PreTrainedModel]) -> None:
    """Same weights by name and shape, and an `mlp` in every layer."""
    first = {name: parameter.shape for name, parameter in models[0].named_parameters()}
    for k, model in enumerate(models):
        if {name: parameter.shape for name, parameter in model.named_parameters()} != first:
            raise UltraFuserError(
                f"specialist number {k} has other weights than the first (names or shapes), so BTX cannot average them. "
                "It needs specialists of one architecture"
            )
    layers = _layers(models[0])
    if not len(layers) or not all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in layers):
        raise UltraFuserError(
            f"{type(models[0]).__name__} has no `model.layers[i].mlp`, which BTX makes K of. Expected an architecture like "
            "Llama, Qwen2 or Mistral"
        )
