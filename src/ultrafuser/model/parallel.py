"""Specialist parallelism: the processes of a mesh share the specialists of one model among them.

Processes form a grid (data x specialist). Those of one row read the same batch, each with its own specialists. With
probability mixing two numbers a token and specialist cross between them, the gate's score and log p_k(y). With logit mixing
one chunk of mixed logits does. Activations of a specialist stay where it is, and so do its weights and gradients, unless
the processes of its column divide them (see `ultrafuser.train.sharding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


class AbsentGroup(nn.Module):
    """Specialists that another process holds. It has no weights.

    Attributes:
        names: of the specialists.
        width: size of their last hidden state, D.
    """

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.names, self.width = list(names), width

    @property
    def size(self) -> int:
        """The number of specialists."""
        return len(self.names)


@dataclass(frozen=True)
class SpecialistMesh:
    """The grid (data x specialist) of all processes.

    Attributes:
        shards: whether the processes of a column divide the weights of their specialists.
    """

    mesh: DeviceMesh
    shards: bool = False

    @classmethod
    def build(cls, size: int, device_type: str, shards: bool = False) -> SpecialistMesh:
        """The mesh of all processes, with `size` of them for the specialists of one model. It divides their number."""
        shape = (dist.get_world_size() // size, size)
        return cls(init_device_mesh(device_type, shape, mesh_dim_names=("data", "specialist")), shards)

    @property
    def size(self) -> int:
        """Processes that share the specialists of one model."""
        return self.mesh["specialist"].size()

    @property
    def rank(self) -> int:
        """This process among those that share the specialists of one model."""
        return self.mesh["specialist"].get_local_rank()

    @property
    def data_size(self) -> int:
        """The number of different batches that are read at the same time."""
        return self.mesh["data"].size()

    @property
    def data_rank(self) -> int:
        """Which of these batches this process reads."""
        return self.mesh["data"].get_local_rank()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor over the processes that share the specialists of one model, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.mesh["specialist"].get_group())
        return tensor

    def missing_passes(self, count: int) -> int:
        """How many passes a process must add to its `count`, because all that divide weights gather them together."""
        if not self.shards:
            return 0
        most = torch.tensor(count, device=self.mesh.device_type)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.mesh["data"].get_group())
        return int(most) - count

    def reduce_gradients(self, model: Any) -> None:
        """Average the gradients over the batches. Those of the gate are also added over the specialists.

        The backward pass has averaged those of divided weights. All processes must have trained the same number of rows, and
        scaled their loss by the number of batches.
        """
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or isinstance(parameter, DTensor):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            is_gate = name.startswith("gate.")
            dist.all_reduce(parameter.grad, group=None if is_gate else self.mesh["data"].get_group())
            parameter.grad /= self.data_size

    def clip_gradients(self, model: Any, limit: float) -> torch.Tensor:
        """Clip the norm of the gradients of all specialists and the gate. Returns the norm before."""
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        gate = [p for name, p in trained.items() if name.startswith("gate.")]
        rest = [p for name, p in trained.items() if not name.startswith("gate.")]
        norm = get_total_norm([p.grad for p in rest])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        square = self.sum_(norm.to(gate[0].device).square())
        norm = (square + get_total_norm([p.grad for p in gate]).square()).sqrt()
        for parameters in (gate, rest):
            clip_grads_with_norm_(parameters, limit, norm)
        return norm


def gather_outer_weights(group: nn.Module) -> None:
    """Gather a specialist's weights outside its decoder layers, if several processes divide them. All must do so together."""
    if isinstance(group, FSDPModule):
        group.unshard()


@dataclass(frozen=True)
class Share:
    """The specialists that this process holds of a model that several processes share.

    Attributes:
        indices: of the k specialists of this process.
        size: the number of all specialists, K.
    """

    mesh: SpecialistMesh
    indices: list[int]
    size: int

    def gather(self, columns: torch.Tensor) -> torch.Tensor:
        """The columns of all specialists: (..., k) -> (..., K), differentiable in this process's columns.

        Every process computes the same loss from the result. The gradient of its columns is therefore whole.
        """
        return _Gather.apply(columns, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns, share):
        ctx.indices = share.indices
        out = columns.new_zeros(*columns.shape[:-1], share.size)
        out[..., share.indices] = columns
        return share.mesh.sum_(out)

    @staticmethod
    def backward(ctx, grad):
        return grad[..., ctx.indices], None
