"""What users do today instead of fusing: averages of the weights."""

from __future__ import annotations

import copy

import torch

from ultrafuser.errors import UltraFuserError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.saving import plain_model
from ultrafuser.model.shared_base import SpecialistGroup


@torch.no_grad()
def weight_average(model: UltraFuserForCausalLM) -> SpecialistGroup:
    """One model whose weights are the mean of the specialists' weights ("average merging" in table 1).

    Raises:
        UltraFuserError: the specialists have different architectures, so there is nothing to average.
    """
    size = len(model.config.specialists)
    if len(model.groups) == 1:
        group = model.groups[0]
        return SpecialistGroup(plain_model(group, {i: 1 / size for i in range(size)}), ["weight_average"])
    states = [model.specialist(name).state_dict() for name in model.config.names]
    first = {key: tensor.shape for key, tensor in states[0].items()}
    for name, state in zip(model.config.names, states, strict=True):
        if {key: tensor.shape for key, tensor in state.items()} != first:
            raise UltraFuserError(
                f"specialist {name!r} has other weights than {model.config.names[0]!r} (names or shapes), so their "
                "average does not exist"
            )
    merged = copy.deepcopy(model.specialist(model.config.names[0]))
    merged.load_state_dict(
        {k: torch.stack([state[k].float() for state in states]).mean(0).to(states[0][k].dtype) for k in first}
    )
    return SpecialistGroup(merged, ["weight_average"])
