"""A group of specialists on one set of weights: k adapters as rows of one batch. A plain model is a group of one without adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import CheckpointError, UltraFuserError
from .few_rows import use_few_rows
from .fingerprint import WeightMarks
from .loss import Head
from .parallel import gather_outer_weights
from .quantized import dense_state, is_quantized, linear_shape


@dataclass
class AdapterWeights:
    """One LoRA adapter: A (r, in) and B (out, r) of each adapted layer. Its output is scaling * B A x."""

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    scaling: float = 1.0


class GroupedLora(nn.Module):
    """k LoRA adapters on one linear layer: row block i of the input goes through adapter i.

    y_i = base(x_i) + scaling_i * B_i A_i x_i, with x (k * B, T, in), A (k, r, in), B (k, out, r): two batched products
    for all adapters together, with gradients for each. Adapters of smaller rank are padded with zeros that stay zero.

    Source: LoRA, arXiv 2106.09685, equation 3.
    """

    def __init__(
        self,
        base: nn.Module,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
        scalings: Sequence[float],
        dropout: float,
        rows: _Rows,
    ) -> None:
        """
        Args:
            pairs: (A, B) of each adapter, None if it does not change this layer.
            rows: which adapters the coming rows belong to, shared by all layers of a group.
        """
        super().__init__()
        self.base = base
        present = [pair for pair in pairs if pair is not None]
        rank = max(a.shape[0] for a, _ in present)
        a0, b0 = present[0]
        lora_a = a0.new_zeros(len(pairs), rank, a0.shape[1])
        lora_b = b0.new_zeros(len(pairs), b0.shape[0], rank)
        for i, pair in enumerate(pairs):
            if pair is not None:
                lora_a[i, : pair[0].shape[0]], lora_b[i, :, : pair[1].shape[1]] = pair
        self.lora_A = nn.Parameter(lora_a)
        self.lora_B = nn.Parameter(lora_b)
        self.ranks = [0 if pair is None else pair[0].shape[0] for pair in pairs]
        self.scalings = tuple(scalings)
        self._scaling = scalings[0] if len(set(scalings)) == 1 else None  # of all
        self._scale: torch.Tensor
        self.register_buffer("_scale", a0.new_tensor(self.scalings)[:, None, None], persistent=False)  # (k, 1, 1)
        self.dropout = nn.Dropout(dropout)
        self._rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(k * B, T, in) -> (k * B, T, out)."""
        y = self.base(x)
        active = self._rows.active
        if not active:
            return y
        lora_a: torch.Tensor = self.lora_A
        lora_b: torch.Tensor = self.lora_B
        scale = self._scale
        if len(active) < len(self.ranks):
            lora_a, lora_b, scale = lora_a[active], lora_b[active], scale[active]
        grouped = self.dropout(x).to(lora_a.dtype).reshape(len(active), -1, x.shape[-1])  # (k, B * T, in)
        low = torch.bmm(grouped, lora_a.transpose(1, 2))  # (k, B * T, r)
        if self._scaling is not None and y.dtype == low.dtype:  # one product does it all
            wide = y.reshape(len(active), -1, y.shape[-1])  # (k, B * T, out)
            return torch.baddbmm(wide, low, lora_b.transpose(1, 2), alpha=self._scaling).reshape(y.shape)
        return y + torch.bmm(low * scale.to(lora_a), lora_b.transpose(1, 2)).reshape(y.shape).to(y.dtype)

    def delta(self, coefficients: Sequence[float]) -> torch.Tensor:
        """sum_i c_i * scaling_i * B_i A_i: (out, in)."""
        c = self.lora_A.new_tensor([c * s for c, s in zip(coefficients, self.scalings, strict=True)])
        return torch.einsum("k,kor,kri->oi", c, self.lora_B, self.lora_A)


@dataclass
class _Rows:
    """The adapters that the rows of the next batch belong to. Empty: the bare base."""

    active: list[int]


class SpecialistGroup(nn.Module):
    """One causal language model that serves k specialists in one pass.

    Attributes:
        model: the transformers model, usable by itself.
        names: the k specialists.
        marks: of the weights as they were loaded. Empty if they were not loaded.
    """

    def __init__(
        self, model: PreTrainedModel, names: Sequence[str], adapters: Sequence[AdapterWeights | None] = ()
    ) -> None:
        super().__init__()
        self.model = model
        use_few_rows(model)
        self.names = list(names)
        self.loras: dict[str, GroupedLora] = {}
        self.marks = WeightMarks()
        self._rows = _Rows(list(range(len(self.names))))
        parameters = inspect.signature(model.base_model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        if "past_key_values" not in parameters:
            raise CheckpointError(
                f"specialist {self.names[0]!r}: {type(model).__name__} keeps no key-value cache (no past_key_values in "
                "its forward). ultrafuser runs causal models with attention caches"
            )
        if any(adapter is not None for adapter in adapters):
            self.add_adapters(adapters)

    @property
    def size(self) -> int:
        """The number of specialists, k."""
        return len(self.names)

    @property
    def width(self) -> int:
        """Size of the last hidden state, D."""
        return self.model.get_output_embeddings().weight.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: object | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states of the active specialists.

        Args:
            input_ids: (k, B, T).
            attention_mask: (k, B, T with the cached tokens), or None if nothing is padded on the left.
            position_ids: (k, B, T). By default the positions count the tokens that are no padding.

        Returns:
            (k, B, T, D).

        Raises:
            UltraFuserError: positions, but the model takes none.
        """
        if position_ids is not None and not self._takes_positions:
            raise UltraFuserError(
                f"specialist {self.names[0]!r}: {type(self.model).__name__} takes no position_ids. Leave them out"
            )
        rows = input_ids.flatten(0, 1).to(self.device)  # (k * B, T)
        inputs = {"input_ids": rows, "past_key_values": cache, "use_cache": cache is not None}
        if attention_mask is not None:
            mask = attention_mask.flatten(0, 1).to(self.device)
            inputs["attention_mask"] = mask
            if self._takes_positions:
                inputs["position_ids"] = ((mask != 0).cumsum(-1) - 1).clamp(min=0)[:, -rows.shape[1] :]
        if position_ids is not None:
            inputs["position_ids"] = position_ids.flatten(0, 1).to(self.device)
        states = self.model.base_model(**inputs).last_hidden_state
        return states.unflatten(0, input_ids.shape[:2])  # (k, B, T, D)

    def head(self, vocab_size: int, end: tuple[int, int] | None = None, masked: tuple[int, ...] = ()) -> Head:
        """The output layer, without padding rows.

        Args:
            vocab_size, end, masked: of the common vocabulary. See `Head`.
        """
        gather_outer_weights(self)
        rows = vocab_size if end is None else max(vocab_size, end[1] + 1)
        layer, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        bias = getattr(layer, "bias", None)
        scale = getattr(config, "logit_scale", None)  # Cohere
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            scale = 1.0 / divisor
        return Head(
            layer.weight[:rows],
            None if bias is None else bias[:rows],
            1.0 if scale is None else float(scale),
            getattr(config, "final_logit_softcapping", None),  # Gemma 2
            vocab_size=vocab_size,
            end=end,
            masked=masked,
        )

    @contextmanager
    def only(self, active: Sequence[int]) -> Iterator[None]:
        """Run the adapters `active` alone within the context. Empty: the bare base."""
        previous, self._rows.active = self._rows.active, list(active)
        try:
            yield
        finally:
            self._rows.active = previous

    def add_adapters(self, adapters: Sequence[AdapterWeights | None], dropout: float = 0.0) -> None:
        """Put k adapters beside the linear layers of the base. None leaves a specialist as the bare base.

        Raises:
            CheckpointError: an adapter names a layer that the base does not have, or has in another shape.
        """
        names = sorted({name for adapter in adapters if adapter for name in adapter.layers})
        modules = dict(self.model.named_modules())
        for name in names:
            layer = modules.get(name)
            if layer is not None and layer is self.model.get_output_embeddings():
                raise CheckpointError(
                    f"specialist {self.names[0]!r}: an adapter changes {name!r}, the output layer, which the mixture reads "
                    "directly. Merge that adapter into its base with PEFT (merge_and_unload) and fuse the result"
                )
            shape = linear_shape(layer)
            pairs = [adapter.layers.get(name) if adapter else None for adapter in adapters]
            for owner, pair in zip(self.names, pairs, strict=True):
                if pair is not None and (shape is None or (pair[0].shape[1], pair[1].shape[0]) != shape):
                    got = "no such linear layer" if shape is None else f"a layer of {shape}"
                    raise CheckpointError(
                        f"specialist {owner!r}: its adapter changes {name!r} from {pair[0].shape[1]} to "
                        f"{pair[1].shape[0]} features, but its base has {got}. Is it the right base?"
                    )
            parent, _, leaf = name.rpartition(".")
            scalings = [adapter.scaling if adapter else 0.0 for adapter in adapters]
            assert layer is not None  # the loop above compared it with an adapter that names it
            device = next(layer.parameters()).device
            pairs = [pair and (pair[0].to(device), pair[1].to(device)) for pair in pairs]
            self.loras[name] = GroupedLora(layer, pairs, scalings, dropout, self._rows)
            setattr(modules[parent], leaf, self.loras[name])

    def linear_layers(self, names: str | Sequence[str]) -> dict[str, tuple[int, int]]:
        """(in, out) of the backbone's linear layers with one of the given last names. `all-linear`: of all."""
        return {
            name: shape
            for name, module in self.model.base_model.named_modules()
            if (shape := linear_shape(module)) is not None
            and (names == "all-linear" or name.rpartition(".")[2] in names)
        }

    def new_adapters(self, r: int, alpha: float, dropout: float, target_modules: str | Sequence[str]) -> None:
        """Start a fresh adapter for the one specialist of this group: A random, B zero, so that nothing changes yet.

        Raises:
            CheckpointError: no layer has one of the given names.
        """
        backbone = self.model.base_model
        prefix = next(name for name, module in self.model.named_modules() if module is backbone)
        layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, shape in self.linear_layers(target_modules).items():
            weight = next(backbone.get_submodule(name).parameters())
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            a = torch.empty(r, shape[0], dtype=dtype, device=weight.device)
            nn.init.kaiming_uniform_(a, a=5**0.5)
            layers[f"{prefix}.{name}" if prefix else name] = (a, a.new_zeros(shape[1], r))
        if not layers:
            raise CheckpointError(f"specialist {self.names[0]!r}: no linear layer is called {target_modules!r}")
        self.add_adapters([AdapterWeights(layers, alpha / r)], dropout)

    def adapter(self, i: int) -> AdapterWeights:
        """Adapter i as it is now, without the padding."""
        out = AdapterWeights()
        for name, lora in self.loras.items():
            if rank := lora.ranks[i]:
                out.layers[name] = (lora.lora_A[i, :rank].detach(), lora.lora_B[i, :, :rank].detach())
                out.scaling = lora.scalings[i]
        return out

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The weights of all adapters."""
        return [p for lora in self.loras.values() for p in (lora.lora_A, lora.lora_B)]

    def base_state(self, coefficients: Mapping[int, float]) -> dict[str, torch.Tensor]:
        """Weights of the base by their ordinary names, with adapters added by `coefficients`.

        This is one specialist with its adapter merged ({i: 1}), or an average of several ({0: 1/3, 1: 1/3, ...}). Quantised
        weights are given as plain ones.
        """
        adapter_weights = {id(p) for p in self.adapter_parameters()}
        state = self.model.state_dict(keep_vars=True)
        if is_quantized(self.model):
            state = dense_state(self.model)
        out = {
            name.replace(".base.", ".")
            if any(name.startswith(f"{layer}.base.") for layer in self.loras)
            else name: tensor
            for name, tensor in state.items()
            if id(tensor) not in adapter_weights
        }
        if coefficients:
            for name, lora in self.loras.items():
                delta = lora.delta([coefficients.get(i, 0.0) for i in range(self.size)])
                weight = out[f"{name}.weight"]
                delta = delta.T if isinstance(lora.base, Conv1D) else delta
                out[f"{name}.weight"] = weight.detach() + delta.detach().to(weight.dtype)
        return {name: tensor.detach() for name, tensor in out.items()}
