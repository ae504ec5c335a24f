"""UltraFuserForCausalLM: run the specialists, weigh them token by token, mix their predictions.

Shapes are written as: K specialists, B batch, T tokens, R response tokens, N labelled tokens, V vocabulary,
D hidden (D_k where specialists differ).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .cache import UltraFuserCache
from .checkpoint import load_fused
from .configuration_ultrafuser import UltraFuserConfig
from .errors import CheckpointError, UltraFuserError
from .gate import Gate, StaticGate
from .generation import FusedGeneration
from .hub import Access, push_fused
from .inputs import OUTPUTS, check_mask_length, refuse_keywords, select_inputs
from .loss import all_logits, label_log_prob, mixed_log_prob, select_responses
from .mixing import mix_logits
from .parallel import AbsentGroup, Share
from .saving import Origin, plain_model, save_fused
from .shared_base import SpecialistGroup


@dataclass
class UltraFuserOutput(ModelOutput):
    """The output of a forward pass.

    Attributes:
        loss: mean cross entropy of the labels in nats, when labels are given.
        logits: (B, T, V), not normalised: their softmax is the mixed distribution. None when labels are given, because
            the loss never holds them. Call the model without labels to get them.
        past_key_values: the cache of all specialists.
        gate_weights: (B, T, K), or (B, R, K) at the labels, with `output_gate_weights=True`.
        token_loss: (B, R) nats at the labels, zero at other positions, with `output_gate_weights=True`.
        response_states: K tensors (N, D_k), the specialists' states at the N labels, with `output_gate_weights=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    gate_weights: torch.Tensor | None = None
    token_loss: torch.Tensor | None = None
    response_states: list[torch.Tensor] | None = None


class UltraFuserForCausalLM(
    PreTrainedModel, FusedGeneration, GenerationMixin
):  # transformers looks for the last by name
    """K causal language models fused at the token level by a gate.

    A `PreTrainedModel` with `from_pretrained`, `save_pretrained` and `generate`. Each specialist may read its own prompt
    (`specialist_input_ids`) and stays an ordinary model (see `specialist`).

    Source: section 3.1 of arXiv 2403.08281.
    """

    config: UltraFuserConfig
    groups: Any  # nn.ModuleList of SpecialistGroup, which type checkers cannot express
    gate: Gate | StaticGate

    config_class = UltraFuserConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: UltraFuserConfig, groups: Sequence[SpecialistGroup | AbsentGroup] | None = None) -> None:
        """
        Args:
            groups: the loaded specialists. By default they are built from the configuration with random weights.

        Raises:
            CheckpointError: no specialist (K = 0).
        """
        if not config.specialists:
            raise CheckpointError(
                "a fused model needs at least one specialist, got none (K = 0). Add some to the recipe"
            )
        super().__init__(config)
        self.origin = Origin(None, Access())
        self.specialist_tokenizers: dict[str, Any] = {}  # of the specialists whose tokenizers differ from the first's
        if groups is None:
            models = [
                AutoModelForCausalLM.from_config(specialist, trust_remote_code=False)
                for specialist in config.specialist_configs()
            ]
            groups = [SpecialistGroup(model, [name]) for model, name in zip(models, config.names, strict=True)]
        self.groups = nn.ModuleList(groups)
        # the location of each specialist: (group, row in the group)
        self._locations = {name: (g, i) for g, group in enumerate(self.groups) for i, name in enumerate(group.names)}
        self._order = [self._locations[name] for name in config.names]
        self.share: Share | None = None  # set where several processes share the specialists
        self._contexts = config.contexts
        widths = [self.groups[g].width for g, _ in self._order]
        self.gate = StaticGate(len(widths)) if config.gate_type == "static" else Gate(widths, config.gate_hidden_size)
        first = self.local_groups[0].model.generation_config
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self.generation_config, key, None) is None:
                setattr(self.generation_config, key, getattr(first, key, None))
        self.post_init()

    def init_weights(self) -> None:
        """Do nothing: every part has initialised or loaded itself, and starting over would destroy the specialists."""

    @property
    def local_groups(self) -> list[SpecialistGroup]:
        """The groups that this process holds: all, unless several processes share the specialists."""
        return [group for group in self.groups if not isinstance(group, AbsentGroup)]

    @property
    def local_indices(self) -> list[int]:
        """The indices of the specialists in these groups. Lists of states and heads follow this order."""
        return [k for k, (g, _) in enumerate(self._order) if not isinstance(self.groups[g], AbsentGroup)]

    def get_input_embeddings(self) -> nn.Module:
        """The first specialist's embeddings. Each specialist has its own."""
        return self.local_groups[0].model.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None, because there are K output layers. See `heads`."""

    @property
    def device(self) -> torch.device:
        """The device of the first specialist's embeddings."""
        return self.local_groups[0].device

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """The device of each part, if they are on several. transformers and accelerate do not move such a model.

        Raises:
            AttributeError: all parts are on one device. Those libraries ask whether the attribute exists.
        """
        parts = {
            ".".join(filter(None, [f"groups.{g}.model", part])): device
            for g, group in enumerate(self.groups)
            if not isinstance(group, AbsentGroup)
            for part, device in (getattr(group.model, "hf_device_map", None) or {"": group.device}).items()
        }
        if len({str(device) for device in parts.values()}) < 2:
            raise AttributeError("hf_device_map: all parts are on one device")
        return parts

    def place(self, device: torch.device | str) -> None:
        """Move the model to a device, unless its parts were placed on several."""
        if not hasattr(self, "hf_device_map"):
            self.to(device)

    def heads(self) -> list:
        """The output layers of `local_indices` over the common vocabulary, each with its temperature."""
        size, masked = self.config.vocab_size, tuple(self.config.masked_token_ids)
        ends, temperatures = self.config.ends, self.config.temperatures
        return [
            self.groups[self._order[k][0]].head(size, ends[k], masked)._replace(temperature=temperatures[k])
            for k in self.local_indices
        ]

    # ---------------------------------------------------------------- run, weigh, mix

    def specialist_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: UltraFuserCache | None = None,
        position_ids: torch.Tensor | None = None,
        known: Mapping[tuple[int, int], torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Last hidden states of the specialists in `local_indices`: of all, unless several processes share them.

        Args:
            input_ids: (B, T) for all alike, or (B, K, T).
            attention_mask: the same shape, preceded by the cached tokens or not. None if none of these is padding.
            position_ids: (B, T). By default the positions count the tokens that are no padding.
            known: what `run_groups` returned for groups that have read these tokens. They do not run again.

        Returns:
            K tensors (B, T, D_k).

        Raises:
            UltraFuserError: a mask of another length, or positions for a specialist that takes none.
        """
        if attention_mask is not None:
            check_mask_length(attention_mask, input_ids.shape[-1], 0 if cache is None else cache.get_seq_length())
        if cache is not None:
            if input_ids.dim() == 2:
                input_ids = input_ids[:, None].expand(-1, len(self._order), -1)
            attention_mask = cache.full_mask(attention_mask, input_ids)
        states = dict(known or {})
        missing = [
            g for g, group in enumerate(self.groups) if not isinstance(group, AbsentGroup) and (g, 0) not in states
        ]
        states |= self.run_groups(missing, input_ids, attention_mask, cache, position_ids)
        if cache is not None:
            cache.record(input_ids, attention_mask)
        return [states[location] for location in self._order if location in states]

    def run_groups(
        self,
        groups: Sequence[int],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: UltraFuserCache | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Last hidden states (B, T, D_k) of some groups, by group and row in the group.

        The cache gets their keys and values, but does not record the tokens. The inputs are those of `specialist_states`,
        and the mask is None or covers the cached tokens too.
        """
        states: dict[tuple[int, int], torch.Tensor] = {}
        for g in groups:
            group = self.groups[g]
            indices = [self.config.names.index(name) for name in group.names]
            ids = _per_specialist(input_ids, indices)  # (k, B, T)
            mask = None if attention_mask is None else _per_specialist(attention_mask, indices)
            positions = None if position_ids is None else _per_specialist(position_ids, indices)
            out = group(ids, mask, None if cache is None else cache.groups[g], positions)
            states |= {(g, i): out[i] for i in range(group.size)}
        return states

    def log_weights(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Log weights of all specialists at the states of `local_indices`: (..., K)."""
        if self.share is None:
            return self.gate(states)
        return self.share.gather(self.gate.score_states(states, self.local_indices)).log_softmax(dim=-1)

    def mix(
        self, states: Sequence[torch.Tensor], log_weights: torch.Tensor, indices: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Mixed logits of K states (..., D_k) by log weights (..., K): (..., V). See `mix_logits`.

        Args:
            indices: the specialists that the states are of. Default: all.
        """
        heads = self.heads()
        logits = all_logits(states, heads if indices is None else [heads[k] for k in indices])  # K x (..., V)
        return mix_logits(logits, log_weights, self.config.mixing, self.config.masked_token_ids)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        specialist_input_ids: torch.LongTensor | None = None,
        specialist_attention_mask: torch.Tensor | None = None,
        response_index: torch.LongTensor | None = None,
        output_gate_weights: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
        return_dict: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        specialist_hidden_states: Sequence[torch.Tensor] | None = None,
        specialist_log_probs: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> UltraFuserOutput | tuple:
        """Run every specialist, weigh them, and mix.

        Args:
            input_ids, attention_mask, position_ids: (B, T), the same tokens for every specialist.
            specialist_input_ids, specialist_attention_mask: (B, K, T), each specialist's own prompt instead.
            labels: (B, T) as usual (shifted here), or (B, R) with `response_index`. -100 is ignored.
            response_index: (B, K, R), where each specialist's state predicts the r-th label.
            logits_to_keep: compute the logits of the last tokens only (0: of all).
            num_items_in_batch: divide the summed loss by this, not by the number of labels.
            specialist_hidden_states, specialist_log_probs: as for `loss_from_features`, instead of tokens.
            kwargs: refused, unless None or False.

        Raises:
            UltraFuserError: no input ids, an input that would have no effect, or a sequence longer than the smallest context.
        """
        refuse_keywords({key: getattr(self.config, key, None) for key in OUTPUTS} | kwargs)
        if labels is None:
            refuse_keywords({"response_index": response_index, "specialist_hidden_states": specialist_hidden_states})
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        if specialist_hidden_states is not None and labels is not None:
            # by way of `forward`, because distributed wrappers synchronise the gradients of its calls alone
            out = self.loss_from_features(specialist_hidden_states, labels, specialist_log_probs, num_items_in_batch)
        else:
            refuse_keywords({"specialist_log_probs": specialist_log_probs})
            masks = (attention_mask, specialist_attention_mask)
            ids, mask, positions = select_inputs(
                len(self._order), input_ids, masks[0], position_ids, specialist_input_ids, masks[1]
            )
            cache = self._cache(past_key_values, use_cache)
            self.check_length(ids, cache)
            states = self.specialist_states(ids, mask, cache, positions)  # K x (B, T, D_k)
            if labels is None:
                out = self._logits(states, logits_to_keep, output_gate_weights)
            elif response_index is None:  # the labels of one sequence: each state predicts the next token
                shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
                out = self.loss_from_features(states, shifted, num_items_in_batch=num_items_in_batch)
            else:  # response tokens at each specialist's own positions
                index = response_index[:, self.local_indices]
                selected = select_responses(states, index, labels != -100)  # K x (N, D_k)
                out = self._cross_entropy(selected, labels, None, num_items_in_batch)
            out.past_key_values = cache
        if labels is not None and not output_gate_weights:
            out.gate_weights = out.token_loss = out.response_states = None
        return out if return_dict else out.to_tuple()

    def _logits(
        self, states: Sequence[torch.Tensor], logits_to_keep: int | torch.Tensor, output_gate_weights: bool
    ) -> UltraFuserOutput:
        if self.share is not None:
            raise UltraFuserError(
                "several processes share the specialists of this model, so it gives losses, but no logits. Load the model whole "
                "to generate"
            )
        tokens = logits_to_keep if torch.is_tensor(logits_to_keep) else slice(-logits_to_keep, None)
        states = [state[:, tokens] for state in states]
        log_weights = self.gate(states)  # (B, T, K)
        weights = log_weights.exp() if output_gate_weights else None
        return UltraFuserOutput(logits=self.mix(states, log_weights), gate_weights=weights)

    def loss_from_features(
        self,
        states: Sequence[torch.Tensor],
        labels: torch.Tensor,
        log_probs: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> UltraFuserOutput:
        """The loss from states that were computed before (the feature cache), without running a specialist.

        Where several processes share the specialists, states and log-probabilities are those of `local_indices`.

        Args:
            states: K tensors (B, R, D_k), each state at the label that it predicts.
            labels: (B, R). -100 is ignored.
            log_probs: (B, R, K) log-probabilities of the labels. With probability mixing they replace the output layers.
            num_items_in_batch: as for `forward`.
        """
        labelled = labels != -100  # (B, R)
        selected = [state[labelled.to(state.device)] for state in states]  # K x (N, D_k)
        return self._cross_entropy(selected, labels, log_probs, num_items_in_batch)

    def _cross_entropy(
        self,
        selected: list[torch.Tensor],
        labels: torch.Tensor,
        log_probs: torch.Tensor | None,
        num_items: int | torch.Tensor | None,
    ) -> UltraFuserOutput:
        """Cross entropy (Eq. 2) of the N labelled tokens alone, from K tensors (N, D_k)."""
        labels = labels.to(next(self.gate.parameters()).device)
        labelled = labels != -100  # (B, R)
        log_weights = self.log_weights(selected)  # (N, K)
        log_probs = None if log_probs is None else log_probs[labelled]
        log_p = self.label_log_probs(selected, labels[labelled], log_weights, log_probs)  # (N)
        count = labelled.sum().clamp(min=1) if num_items is None else num_items  # no label: a loss of 0, not NaN
        token_loss = log_p.new_zeros(labels.shape)
        token_loss[labelled] = -log_p.detach()
        gate_weights = log_p.new_zeros(*labels.shape, log_weights.shape[-1])
        gate_weights[labelled] = log_weights.detach().exp().to(gate_weights)
        return UltraFuserOutput(
            loss=-log_p.sum() / count, gate_weights=gate_weights, token_loss=token_loss, response_states=selected
        )

    def label_log_probs(
        self,
        states: Sequence[torch.Tensor],
        labels: torch.Tensor,
        log_weights: torch.Tensor,
        log_probs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log-probability of each label under the fused model, in nats: (N).

        Args:
            states: K tensors (N, D_k).
            labels: (N).
            log_weights: of the gate, (N, K).
            log_probs: (N, K), those of the labels under each specialist. With probability mixing they replace the output
                layers.
        """
        if log_probs is not None and self.config.mixing == "probabilities":
            columns = log_probs.to(log_weights)
            return torch.logsumexp(
                log_weights + (columns if self.share is None else self.share.gather(columns)), dim=-1
            )
        return mixed_log_prob(states, self.heads(), log_weights, labels, self.config.mixing, share=self.share)

    @torch.no_grad()
    def specialist_log_probs(self, states: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Log-probability of each label under every specialist alone: K x (N, D_k), (N,) -> (N, K), in nats."""
        columns = [label_log_prob(state, head, labels) for state, head in zip(states, self.heads(), strict=True)]
        return torch.stack([column.to(labels.device) for column in columns], dim=-1)

    def check_length(self, ids: torch.Tensor, cache: UltraFuserCache | None) -> None:
        """Raises UltraFuserError: the cached and the new tokens (..., T) do not fit into a specialist's context."""
        length = ids.shape[-1] + (cache.get_seq_length() if cache is not None else 0)
        for name, context in self._contexts.items():
            if length > context:
                raise UltraFuserError(
                    f"specialist {name!r}: {length} tokens do not fit into its context of {context}. Shorten the prompt "
                    "or lower max_length / max_new_tokens"
                )

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> UltraFuserCache | None:
        if cache is not None and not isinstance(cache, UltraFuserCache):
            raise UltraFuserError(
                f"past_key_values is a {type(cache).__name__}. Pass model.new_cache(), or the UltraFuserCache that forward "
                "returned"
            )
        return self.new_cache() if cache is None and use_cache else cache

    # ---------------------------------------------------------------- specialists, loading, saving

    def specialist(self, name: str) -> PreTrainedModel:
        """One specialist as an ordinary transformers model, e.g. to draft for the fused one.

        A specialist that shares its base with others is returned as a merged copy, any other as the model that runs here.

        Raises:
            UltraFuserError: no specialist has that name.
        """
        if name not in self._locations:
            raise UltraFuserError(f"no specialist {name!r}. Known: {', '.join(self.config.names)}")
        g, i = self._locations[name]
        group = self.groups[g]
        return group.model if not group.loras else plain_model(group, {i: 1.0})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any
    ) -> UltraFuserForCausalLM:
        """Load a fused checkpoint: its manifest, every specialist from where it is, and the gate.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id (then `revision`, `token`, `cache_dir`,
                `local_files_only`, `subfolder` apply).
            dtype, device_map, quantization_config, attn_implementation, trust_remote_code: apply to every specialist
                whose manifest entry does not set them. Weights are read from safetensors or GGUF only, and a
                specialist's own code never runs unless `trust_remote_code=True`.

        Raises:
            CheckpointError: half-written folder, reference gone, checksum differs, pickled weights.
        """
        return load_fused(cls, pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the manifest, the gate, and the specialists that changed. The others stay references.

        Args:
            save_directory: created if needed. A save that fails leaves the folder as it was.
            copy: also copy the specialists that did not change.
            left_out: a list. Specialists that cannot be written are added to it instead of ending the save, and the
                checkpoint refers to their sources as they were.
            max_shard_size: split the weights of specialists that training changed into files of this size at most.

        Raises:
            CheckpointError: the disk is full, or weights that several specialists share were changed.
        """
        save_fused(self, save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save to a temporary folder and upload it, with the folders of its specialists.

        Args:
            copy, max_shard_size: see `save_pretrained`. Without `copy`, specialists at local paths stay on this machine.
            commit_message, commit_description, private, token, revision, create_pr, tags: as in transformers.

        Raises:
            CheckpointError: the hub refuses.
        """
        return push_fused(self, repo_id, **kwargs)


def _per_specialist(tensor: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    """(B, T) or (B, K, T) -> (k, B, T)."""
    if tensor.dim() == 2:
        return tensor.expand(len(indices), *tensor.shape)
    return tensor[:, list(indices)].transpose(0, 1)


AutoConfig.register(UltraFuserConfig.model_type, UltraFuserConfig, exist_ok=True)
AutoModelForCausalLM.register(UltraFuserConfig, UltraFuserForCausalLM, exist_ok=True)
