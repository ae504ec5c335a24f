"""Memory and time of a recipe's stages on a device, estimated from its configurations before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ultrafuser.data.collate import token_budget
from ultrafuser.errors import TrainingError
from ultrafuser.model.loss import chunk_values
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.parallel import AbsentGroup
from ultrafuser.model.quantized import is_quantized
from ultrafuser.recipe import GateStage, JointStage, OutcomeStage, Recipe, StageRecipe
from ultrafuser.specialists import outline
from ultrafuser.train.checks import check_stage
from ultrafuser.train.features import Precision, token_bytes
from ultrafuser.train.memory import (
    SHARE,
    activation_bytes,
    adapter_size,
    base_size,
    cache_bytes,
    device_bytes,
    forward_parameters,
    layer_bytes,
    new_adapter_parameters,
    parameter_size,
)
from ultrafuser.train.sharding import decoder_layers

GIB = 2**30
# Bytes of the optimizer's states for each trained number: two averages in float32, in 8 bits, or sums of rows and columns.
_STATES = {"adamw_torch": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 1}
_FLOAT = 4
# Code, workspaces and temporary arrays. On a CPU they took 1.07 to 1.83 GB beside the other parts (docs/devices.md).
_LIBRARIES = GIB
# The share of a device's memory that `rows_per_device: auto` fills by the plan. The rest is for what the plan leaves out.
_FILL = 0.8


@dataclass(frozen=True)
class StagePlan:
    """One stage on one device.

    Attributes:
        name: of the stage.
        rows_per_device: rows of one forward pass. None: a number of tokens bounds it, or the stage draws no rows.
        memory: bytes by what holds them.
        trained: numbers that the optimizer changes.
        checkpointing: whether activations are computed again in the backward pass.
        flops: of all steps on all devices, if every row has `max_length` tokens.
    """

    name: str
    rows_per_device: int | None
    memory: dict[str, int]
    trained: int
    checkpointing: bool
    flops: float

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.memory.values())

    def hours(self, processes: int, tflops: float) -> float:
        """Duration at `tflops` (1e12 floating-point operations a second) on each device."""
        return self.flops / (processes * tflops * 1e12) / 3600


@dataclass(frozen=True)
class Plan:
    """What a recipe needs.

    Attributes:
        parameters: of each base model, by the names of its specialists.
        feature_bytes: of the gate stage's cache on the disk, for each response token.
        stages: in their order.
        proposals: by stage that does not fit, the overrides with which it does (empty: none of those tried).
    """

    parameters: dict[str, int]
    feature_bytes: int
    stages: list[StagePlan]
    proposals: dict[str, list[str]]


def plan(recipe: Recipe, *, memory: int, processes: int | None = None, kind: str = "cuda") -> Plan:
    """Estimate every stage on the device of the process that needs most.

    Each process has one device. It holds all specialists, or its share of them with `parallel.specialist`, or its part of
    their weights with `parallel.shard`.

    Args:
        memory: of a device, in bytes.
        processes: all that train together. Default: as many as share the specialists.
        kind: of the devices, as torch calls it. It decides how many tokens are read and scored at once.

    Raises:
        TrainingError: a stage that the specialists do not admit, quantised weights, which are not estimated, or a number
            of processes that does not fit.
        CheckpointError: a specialist without a configuration, or more processes than there are models to share.
    """
    model = outline(recipe)
    if quantised := [
        spec["name"]
        for spec in model.config.specialists
        if spec.get("quantization") or spec["config"].get("quantization_config")
    ]:
        raise TrainingError(
            f"plan: the weights of {', '.join(quantised)} are quantised, and their memory is not estimated. Plan the "
            "recipe without `quantization` for an upper limit"
        )
    share = recipe.parallel.specialist
    setup = _make_setup(model, recipe, memory, processes or share, kind)
    if setup.processes % share:
        raise TrainingError(f"plan: {processes} processes cannot form groups of {share} (parallel.specialist)")
    if recipe.parallel.shard and setup.parts == 1:
        raise TrainingError(
            f"plan: parallel.shard divides weights among at least {2 * share} processes, got {setup.processes}. Set --processes"
        )
    model.config.check_share(share)
    stages, proposals = list[StagePlan](), dict[str, list[str]]()
    for stage in recipe.stages:
        check_stage(model, stage)
        planned = _plan_stage(model, recipe, stage, setup)
        stages.append(planned)
        if planned.total > memory:
            proposals[stage.name] = _propose(model, recipe, stage, planned, setup)
    kinds: list[Precision] = [stage.feature_dtype for stage in recipe.stages if isinstance(stage, GateStage)]
    return Plan(
        parameters={", ".join(group.names): base_size(group)[0] for group in model.groups},
        feature_bytes=token_bytes(model.heads(), *kinds[:1]),
        stages=stages,
        proposals=proposals,
    )


def check_plan(planned: Plan, memory: int) -> None:
    """Refuse a plan that does not fit.

    Raises:
        TrainingError: a stage needs more than `memory` bytes. The message names overrides with which it fits.
    """
    for stage in planned.stages:
        if stage.total <= memory:
            continue
        overrides = " ".join(planned.proposals[stage.name])
        advice = f"It fits with {overrides}" if overrides else "Use devices with more memory, or smaller specialists"
        raise TrainingError(
            f"stage {stage.name}: needs {stage.total / GIB:.1f} GiB on each device, got {memory / GIB:.1f} GiB. {advice}"
        )


def describe_memory(
    model: UltraFuserForCausalLM, recipe: Recipe, *, processes: int, device: torch.device | None = None
) -> str:
    """One line on what the stages of a loaded model will need on this process's device, and whether that is there.

    Empty for quantised weights, which are not estimated.

    Args:
        device: that the model trains on. Default: where it is now.
    """
    device = device or model.device
    if any(is_quantized(group.model) for group in model.local_groups):
        return ""
    memory = device_bytes(model, device)
    setup = _make_setup(model, recipe, memory, processes, device.type)
    plans = [_plan_share(model, recipe, _with_rows([model], recipe, stage, setup), setup) for stage in recipe.stages]
    text = "memory, estimated: " + ", ".join(f"stage {each.name} {each.total / GIB:.2f} GiB" for each in plans)
    if max(each.total for each in plans) > memory:
        text += (
            f". The device has {memory / GIB:.2f} GiB, so it may not suffice. `ultrafuser plan RECIPE` names overrides "
            "that need less"
        )
    return text


def fit_rows(
    model: UltraFuserForCausalLM,
    recipe: Recipe,
    stage: GateStage | JointStage,
    *,
    memory: int,
    processes: int,
    num_domains: int,
    length: int,
) -> int:
    """The rows of one forward pass that fit on this process's device, by the plan.

    It is the largest number that divides the process's rows of a global batch, so that passes are equal. Where the stage
    may choose gradient checkpointing, a smaller number that needs none comes first. If nothing fits, it is 1.

    Args:
        memory: of the device, in bytes, with what the model holds already.
        num_domains: of the rows.
        length: tokens of the longest row.

    Raises:
        TrainingError: quantised weights, which are not estimated.
    """
    if names := [name for group in model.local_groups if is_quantized(group.model) for name in group.names]:
        raise TrainingError(
            f"stage {stage.name}: rows_per_device is auto, but the weights of {', '.join(names)} are quantised, and their memory "
            f"is not estimated. Set a number, such as stages.{stage.name}.rows_per_device=1"
        )
    setup = _make_setup(model, recipe, memory, processes, model.device.type)
    return _fit_rows(model, recipe, stage, replace(setup, num_domains=num_domains, length=length))


@dataclass(frozen=True)
class _Setup:
    """What a stage runs on.

    Attributes:
        memory: of a device, in bytes.
        kind: of the devices, as torch calls it.
        share: processes that share the specialists.
        num_domains: of the rows.
        length: tokens of the longest row.
        shards: the processes that do not share specialists divide the weights of each.
    """

    memory: int
    processes: int
    kind: str
    share: int
    num_domains: int
    length: int
    shards: bool

    @property
    def parts(self) -> int:
        """Processes that divide the weights of a specialist."""
        return self.processes // self.share if self.shards else 1

    def part(self, gate: int, rest: int) -> int:
        """Bytes of a process, which has the gate whole."""
        return gate + math.ceil(rest / self.parts)

    def rows_of_process(self, stage: StageRecipe) -> int:
        """Rows of a global batch that one process reads."""
        return math.ceil(stage.samples_per_domain * self.num_domains * self.share / self.processes)


def _make_setup(model: UltraFuserForCausalLM, recipe: Recipe, memory: int, processes: int, kind: str) -> _Setup:
    """What the stages of a recipe run on, as far as it is known before its rows are read."""
    parallel, num_domains = recipe.parallel, _num_domains(model, recipe)
    return _Setup(memory, processes, kind, parallel.specialist, num_domains, recipe.data.max_length, parallel.shard)


def _fit_rows(model: UltraFuserForCausalLM, recipe: Recipe, stage: GateStage | JointStage, setup: _Setup) -> int:
    share = setup.rows_of_process(stage)
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    plans = [_plan_share(model, recipe, stage.model_copy(update={"rows_per_device": size}), setup) for size in sizes]
    fitting = [planned for planned in plans if planned.total <= _FILL * setup.memory]
    best = [planned for planned in fitting if not planned.checkpointing] or fitting or plans[-1:]
    return best[0].rows_per_device or 1


def _with_rows(
    parts: Sequence[UltraFuserForCausalLM], recipe: Recipe, stage: StageRecipe, setup: _Setup
) -> StageRecipe:
    """The stage with a number of rows in place of `auto`: that which fits on the devices of all processes."""
    if isinstance(stage, OutcomeStage) or stage.rows_per_device != "auto":
        return stage
    rows = min(_fit_rows(part, recipe, stage, setup) for part in parts)
    return stage.model_copy(update={"rows_per_device": rows})


def _plan_stage(model: UltraFuserForCausalLM, recipe: Recipe, stage: StageRecipe, setup: _Setup) -> StagePlan:
    """The plan of the process that needs most memory, with the numbers of all and the time of the slowest."""
    parts = _shares(model, setup.share)
    stage = _with_rows(parts, recipe, stage, setup)
    plans = [_plan_share(part, recipe, stage, setup) for part in parts]
    gate = parameter_size(list(model.gate.parameters()))[0]
    return replace(
        max(plans, key=lambda planned: planned.total),
        trained=gate + sum(planned.trained - gate for planned in plans),
        flops=setup.share * max(planned.flops for planned in plans),
    )


def _shares(model: UltraFuserForCausalLM, size: int) -> list[UltraFuserForCausalLM]:
    """The model as each of the processes that share its specialists sees it."""
    if size == 1:
        return [model]
    absent = [AbsentGroup(group.names, group.width) for group in model.groups]
    with torch.device("meta"):
        return [
            UltraFuserForCausalLM(
                model.config, [group if g % size == i else absent[g] for g, group in enumerate(model.groups)]
            )
            for i in range(size)
        ]


def _plan_share(model: UltraFuserForCausalLM, recipe: Recipe, stage: StageRecipe, setup: _Setup) -> StagePlan:
    rows = stage.samples_per_domain * setup.num_domains
    if isinstance(stage, JointStage):
        return _plan_joint(model, stage, rows, setup)
    trained, length, rows_per_pass = parameter_size(list(model.gate.parameters()))[0], setup.length, None
    frozen = sum(base_size(group)[1] + adapter_size(group)[1] for group in model.local_groups)
    memory = _trained_bytes(trained, trained, setup) | {"weights": setup.part(trained * _FLOAT, frozen)}
    memory |= _gathered_bytes(model, setup, trains_all_weights=False)
    widths = [head.weight.shape[1] for head in model.heads()]
    if isinstance(stage, OutcomeStage):
        rows *= stage.answers
        length += stage.max_new_tokens
        memory["key-value cache"] = sum(cache_bytes(group, rows * length) for group in model.local_groups)
        tokens = rows * stage.max_new_tokens
    else:
        rows_per_pass, tokens = _pass_size(stage, setup)
        memory["reading"] = _reading_bytes(model, setup)
    hidden = model.config.gate_hidden_size if model.config.gate_type == "mlp" else 1
    memory["activations"] = tokens * sum(2 * width + 2 * hidden for width in widths) * _FLOAT
    memory["logits"] = _logits_bytes(model, tokens, setup)
    flops = 2.0 * forward_parameters(model) * rows * length * stage.steps
    return StagePlan(stage.name, rows_per_pass, memory, trained, False, flops)


def _plan_joint(model: UltraFuserForCausalLM, stage: JointStage, rows: int, setup: _Setup) -> StagePlan:
    rows_per_pass, tokens = _pass_size(stage, setup)
    gate, copies = parameter_size(list(model.gate.parameters()))[0], 0
    if stage.trains_all_weights:  # in float32, and autocast keeps a copy in bfloat16
        trained = gate + sum(base_size(group)[0] for group in model.local_groups)
        weights = trained * _FLOAT
        copies = sum(base_size(group)[1] for group in model.local_groups if group.model.dtype.itemsize < _FLOAT)
    else:
        trained = gate + sum(
            adapter_size(group)[0] or new_adapter_parameters(group, stage.lora) for group in model.local_groups
        )
        weights = trained * _FLOAT + sum(base_size(group)[1] for group in model.local_groups)
    weights = setup.part(gate * _FLOAT, weights - gate * _FLOAT)
    memory = _trained_bytes(trained, gate, setup, stage.optim)
    memory |= {"weights": weights, "logits": _logits_bytes(model, tokens, setup, compares=stage.kl_coef > 0)}
    if stage.kl_coef:  # the specialists read the rows before the stage
        memory["reading"] = _reading_bytes(model, setup)
        if stage.trains_all_weights:  # the output layers before the stage, and their gradients
            memory["reference"] = sum(2 * head.weight.numel() * _FLOAT for head in model.heads())
    memory |= _gathered_bytes(model, setup, trains_all_weights=stage.trains_all_weights)
    if copies and not setup.shards:
        memory["copies for autocast"] = copies
    kept = sum(activation_bytes(group, tokens) for group in model.local_groups)
    checkpointing = stage.gradient_checkpointing
    if checkpointing == "auto":
        is_possible = all(group.model.supports_gradient_checkpointing for group in model.local_groups)
        checkpointing = is_possible and kept > SHARE * (setup.memory - weights)  # the stage decides before the others
    if checkpointing:
        offload = checkpointing == "offload" and setup.kind != "cpu"
        kept = sum(activation_bytes(group, tokens, checkpointing=True, offload=offload) for group in model.local_groups)
    memory["activations"] = kept
    passes = 2 + (4 if stage.trains_all_weights else 2) + (2 if checkpointing else 0)
    flops = float(passes) * forward_parameters(model) * rows * setup.length * stage.steps
    return StagePlan(stage.name, rows_per_pass, memory, trained, bool(checkpointing), flops)


def _propose(
    model: UltraFuserForCausalLM, recipe: Recipe, stage: StageRecipe, planned: StagePlan, setup: _Setup
) -> list[str]:
    """The first overrides, each with those before it, with which a stage fits. Empty: it does not fit with all of them."""
    overrides: list[str] = []
    for field, values in _remedies(model, stage, planned, setup):
        for value in values:
            if field == "dtype":
                recipe = recipe.model_copy(update={"dtype": value})
                model, override = outline(recipe), f"dtype={value}"
            elif field == "shard":
                setup, override = replace(setup, shards=value), "parallel.shard=true"
            else:
                stage = stage.model_copy(update={field: value})
                override = f"stages.{stage.name}.{field}={str(value).lower()}"
            attempt = [other for other in overrides if other.partition("=")[0] != override.partition("=")[0]]
            overrides = [*attempt, override]
            if _plan_stage(model, recipe, stage, setup).total <= setup.memory:
                return overrides
    return []


def _remedies(
    model: UltraFuserForCausalLM, stage: StageRecipe, planned: StagePlan, setup: _Setup
) -> Iterator[tuple[str, list[Any]]]:
    """Fields and their values, those that cost least first."""
    can_checkpoint = all(group.model.supports_gradient_checkpointing for group in model.local_groups)
    if isinstance(stage, JointStage) and can_checkpoint and not planned.checkpointing:
        yield "gradient_checkpointing", [True]
    if not isinstance(stage, OutcomeStage):
        rows, tokens = planned.rows_per_device or 1, stage.tokens_per_device or 0
        yield "tokens_per_device", [tokens >> i for i in range(1, tokens.bit_length())]
        yield "rows_per_device", [rows >> i for i in range(1, rows.bit_length())]
    if any(group.model.dtype.itemsize == _FLOAT for group in model.local_groups):
        yield "dtype", ["bfloat16"]
    if setup.processes > setup.share and not (setup.shards or isinstance(stage, OutcomeStage)):
        yield "shard", [True]
    if stage.trains_all_weights and all(group.model.dtype != torch.float16 for group in model.local_groups):
        yield "specialists", ["lora"]


# ---------------------------------------------------------------- numbers and bytes


def _num_domains(model: UltraFuserForCausalLM, recipe: Recipe) -> int:
    """As many as the sources name, or as the specialists have."""
    named = {source.domain for source in recipe.data.train}
    return len({spec["domain"] for spec in model.config.specialists} if None in named or not named else named)


def _pass_size(stage: GateStage | JointStage, setup: _Setup) -> tuple[int | None, int]:
    """Rows of one forward pass, if they are set, and their tokens at most."""
    assert stage.rows_per_device != "auto"
    share = setup.rows_of_process(stage)
    if stage.tokens_per_device:
        return None, min(max(stage.tokens_per_device, setup.length), share * setup.length)
    rows = min(stage.rows_per_device or share, share)
    return rows, rows * setup.length


def _trained_bytes(trained: int, gate: int, setup: _Setup, optim: str = "adamw_torch") -> dict[str, int]:
    # DistributedDataParallel sends them from buckets of its own. Processes that share specialists or weights do without it
    copies = 2 if setup.processes > setup.share == 1 and not setup.shards else 1
    numbers = setup.part(gate, trained - gate)
    return {"gradients": numbers * _FLOAT * copies, "optimizer": numbers * _STATES[optim], "libraries": _LIBRARIES}


def _gathered_bytes(model: UltraFuserForCausalLM, setup: _Setup, *, trains_all_weights: bool) -> dict[str, int]:
    """Whole weights that a pass holds where they are divided, and their gradients where they are trained.

    These are the weights outside the decoder layers, one layer, and the next one, which is on its way.
    """
    if setup.parts == 1:
        return {}
    outer = layers = 0
    for group in model.local_groups:
        sizes = [parameter_size(list(layer.parameters())) for layer in decoder_layers(group)]
        numbers, held = parameter_size(list(group.parameters()))
        numbers, held = numbers - sum(size[0] for size in sizes), held - sum(size[1] for size in sizes)
        outer += 2 * numbers * _FLOAT if trains_all_weights else held
        largest = max(sizes)
        layers = max(layers, 2 * (largest[1] + largest[0] * _FLOAT * trains_all_weights))
    return {"gathered": outer + layers}


def _reading_bytes(model: UltraFuserForCausalLM, setup: _Setup) -> int:
    """The largest pass that fills the feature cache."""
    tokens = token_budget(torch.device(setup.kind))
    return max(layer_bytes(group, tokens, kept=False) for group in model.local_groups)


def _logits_bytes(model: UltraFuserForCausalLM, tokens: int, setup: _Setup, *, compares: bool = False) -> int:
    """Logits that are held at once, in float32: of each specialist and of the mixture, or of one specialist and its gradient.

    Args:
        compares: with `kl_coef` one specialist's distribution before the stage and the present one, their divergence, and gradients.
    """
    size = max(head.weight.shape[0] for head in model.heads())
    arrays = max(len(model.heads()) + 1 if model.config.mixing == "logits" else 2, 6 if compares else 0)
    return arrays * min(tokens * size, chunk_values(setup.kind)) * _FLOAT
