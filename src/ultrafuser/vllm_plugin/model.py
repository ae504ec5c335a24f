"""The fused model inside vLLM: run the specialists, weigh them, mix their logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig

from ultrafuser.errors import CheckpointError, UltraFuserError
from ultrafuser.model.adapters import read_adapter
from ultrafuser.model.checkpoint import check_recorded_files, fused_folder
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.model.gate import Gate, StaticGate
from ultrafuser.model.hub import Access
from ultrafuser.model.loss import to_common
from ultrafuser.model.mixing import mix_logits, restrict_weights

from .config import check_request, hf_config, specialist_vllm_config
from .lora import add_adapters
from .separate import SeparateSpecialist
from .shared import SharedBase
from .weights import is_converted, specialist_weights


class UltraFuserForCausalLM(nn.Module):
    """K causal language models fused at the token level, as vLLM runs them.

    `forward` gives the K last hidden states side by side, `compute_logits` applies the gate and the output layers.

    Code of the same worker (`model_runner.get_model()`) steers the gate and reads it: it sets `gate_mask`, which the next
    call of `compute_logits` applies to its rows and then forgets, and reads the record of the rows of the last call.

    Attributes:
        gate_mask: (rows, K) booleans, False for specialists that take no part. The weights are renormalised. None: all.
        last_gate_weights: (rows, K) in float32, of the last call of `compute_logits`.
        record_specialists: whether to keep `last_specialist_logits`.
        last_specialist_logits: K tensors (rows, V), each specialist's logits over the common vocabulary. They are copies.
    """

    groups: Any  # nn.ModuleList of SharedBase and SeparateSpecialist, which type checkers cannot express

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """
        Raises:
            UltraFuserError: vLLM cannot serve this model so. See `check_request`.
        """
        super().__init__()
        model_config = vllm_config.model_config
        self.config: UltraFuserConfig = model_config.hf_config
        check_request(self.config, vllm_config)
        self.load_config = vllm_config.load_config
        self.access = Access(token=model_config.hf_token, trust_remote_code=model_config.trust_remote_code)
        self.folder: Path = fused_folder(model_config.model, self.access, model_config.revision)
        self.groups = nn.ModuleList(self._build(vllm_config, indices) for indices in self.config.groups())
        # the location of each specialist: (group, row in the group)
        self._order = {k: (g, i) for g, group in enumerate(self.config.groups()) for i, k in enumerate(group)}
        self._widths = [hf_config(entry).get_text_config().hidden_size for entry in self.config.specialists]
        self._masked = tuple(self.config.masked_token_ids)
        size, width = len(self._widths), self.config.gate_hidden_size
        gate = StaticGate(size) if self.config.gate_type == "static" else Gate(self._widths, width)
        self.gate = gate.to(torch.float32)
        self.gate_mask: torch.Tensor | None = None
        self.last_gate_weights: torch.Tensor | None = None
        self.record_specialists = False
        self.last_specialist_logits: list[torch.Tensor] = []

    def _build(self, vllm_config: VllmConfig, indices: Sequence[int]) -> nn.Module:
        """A group of specialists: adapters on one base, or one specialist alone."""
        entries = [self.config.specialists[k] for k in indices]
        names = [entry["name"] for entry in entries]
        tag = f"specialist_{names[0]}"
        shared = bool(entries[0]["source"].get("adapter")) and not entries[0].get("separate")
        adapters = [(entry.get("files") or {}).get("adapter") for entry in entries]
        config = specialist_vllm_config(
            vllm_config, entries[0], tag, [names, adapters], quantized=not is_converted(entries[0])
        )
        kind = SharedBase if shared else SeparateSpecialist
        with set_model_tag(tag):
            return kind(vllm_config=config, prefix=tag, names=names)

    # ---------------------------------------------------------------- run, weigh, mix

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Refused: each specialist embeds the tokens itself.

        Raises:
            UltraFuserError: always.
        """
        raise UltraFuserError("a fused model has no embeddings of its own. Give vLLM tokens or text")

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens (T), positions (T) -> last hidden states side by side (T, sum D_k)."""
        states = [group(input_ids, positions) for group in self.groups]  # (k, T, D_k) each
        return torch.cat([states[g][i] for g, i in (self._order[k] for k in range(len(self._order)))], dim=-1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Last hidden states (rows, sum D_k) -> mixed logits (rows, V) in float32. None where vLLM keeps them elsewhere."""
        states = hidden_states.split(self._widths, dim=-1)  # K x (rows, D_k)
        log_weights = self._weigh(states)  # (rows, K)
        logits = self._specialist_logits(states)
        if logits is None:
            return None
        self.last_specialist_logits = [z.clone() for z in logits] if self.record_specialists else []
        return mix_logits(logits, log_weights, self.config.mixing, self._masked)

    def _weigh(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Log weights (rows, K), masked and recorded."""
        log_weights = self.gate(states)
        mask, self.gate_mask = self.gate_mask, None
        if mask is not None:
            log_weights = restrict_weights(log_weights, mask)
        self.last_gate_weights = log_weights.exp()
        return log_weights

    def _specialist_logits(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """K tensors (rows, V) over the common vocabulary: one product for all specialists of a group."""
        rows: list[torch.Tensor] = []
        for group, indices in zip(self.groups, self.config.groups(), strict=True):
            z = group.model.compute_logits(torch.cat([states[k] for k in indices]))  # (k * rows, V_g)
            if z is None:
                return None
            rows += z.float().unflatten(0, (len(indices), -1)).unbind()
        located = {k: z for k, z in zip((k for group in self.config.groups() for k in group), rows, strict=True)}
        common = []
        for k, (end, temperature) in enumerate(zip(self.config.ends, self.config.temperatures, strict=True)):
            z = located[k] if temperature == 1.0 else located[k] / temperature
            common.append(to_common(z, self.config.vocab_size, end, self._masked))
        return common

    # ---------------------------------------------------------------- loading

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the gate from the checkpoint that vLLM reads, and each specialist from where the manifest says.

        Args:
            weights: of the fused checkpoint's own safetensors, which hold the gate.

        Raises:
            CheckpointError: a reference is gone, a file changed, a weight or the gate is missing.
        """
        state = {name.removeprefix("gate."): tensor for name, tensor in weights if name.startswith("gate.")}
        try:
            self.gate.load_state_dict(state)
        except RuntimeError as error:  # names or shapes
            raise CheckpointError(
                f"{self.folder}: its gate does not fit the manifest: {' '.join(str(error).split())}. Was it written by another "
                "fusion?"
            ) from error
        loaded = {f"gate.{name}" for name in state}
        checked: set[Path] = set()
        for g, (group, indices) in enumerate(zip(self.groups, self.config.groups(), strict=True)):
            entries = [self.config.specialists[k] for k in indices]
            for entry in entries:
                check_recorded_files(entry, self.folder, checked)
            names = group.model.load_weights(specialist_weights(entries[0], self.folder, self.access, self.load_config))
            if names is None:  # the model does not say
                names = {name for name, _ in group.model.named_parameters()}
            if isinstance(group, SharedBase):
                adapters = [read_adapter(entry, self.folder, torch.float32, self.access) for entry in entries]
                names = {*names, *add_adapters(group.model, group.names, adapters)}
            loaded |= {f"groups.{g}.model.{name}" for name in names}
        return loaded
