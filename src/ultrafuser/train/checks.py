"""Refuse a stage that the specialists do not admit, before anything is trained or planned."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from ultrafuser.errors import TrainingError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.quantized import is_quantized
from ultrafuser.recipe import JointStage, StageRecipe


def check_stage(model: UltraFuserForCausalLM, stage: StageRecipe) -> None:
    """Refuse a stage that the specialists do not admit.

    Raises:
        TrainingError: `specialists: full` where several specialists share one base, or where weights are quantised.
            Adapters in float16, whose gradients underflow without loss scaling. Gradient checkpointing of a model that has none.
    """
    if not isinstance(stage, JointStage):
        return
    for group in model.local_groups:
        names = ", ".join(group.names)
        if stage.gradient_checkpointing in (True, "offload") and not group.model.supports_gradient_checkpointing:
            raise TrainingError(
                f"specialists {names}: {type(group.model).__name__} has no gradient checkpointing. Set "
                "stages.joint.gradient_checkpointing=false"
            )
        if stage.specialists == "lora":
            if group.model.dtype == torch.float16:
                raise TrainingError(
                    f"specialists {names}: the joint stage cannot train adapters of a float16 model, because their gradients "
                    "underflow. Use dtype=bfloat16 or dtype=float32"
                )
        elif group.size > 1:
            raise TrainingError(
                f"specialists {names} share one base, so training all its weights would tie them. "
                "Use stages.joint.specialists=lora, or share_base=false"
            )
        elif is_quantized(group.model):
            raise TrainingError(
                f"specialist {group.names[0]!r}: its weights are quantised and cannot be trained. Use "
                "stages.joint.specialists=lora"
            )


def check_optimizer(stages: Sequence[StageRecipe]) -> None:
    """
    Raises:
        TrainingError: the package of a stage's optimizer is not installed.
    """
    for stage in stages:
        if isinstance(stage, JointStage) and stage.optim.endswith("bit") and not find_spec("bitsandbytes"):
            raise TrainingError(
                f"stages.joint.optim={stage.optim} needs 'bitsandbytes', which is not installed. Run: pip install bitsandbytes"
            )
