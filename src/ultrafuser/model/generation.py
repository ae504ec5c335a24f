"""Generation with a fused model: prompts of each specialist's own, caches that outlive a turn, drafting models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from .cache import UltraFuserCache
from .configuration_ultrafuser import UltraFuserConfig
from .errors import UltraFuserError
from .inputs import refuse_keywords, select_inputs
from .speculation import Speculation, decode_speculatively, read_speculation

_CACHES = (None, "dynamic", "dynamic_full", "offloaded")
_FORWARD_ONLY = (
    "labels", "response_index", "num_items_in_batch", "output_gate_weights", "specialist_hidden_states",
    "specialist_log_probs",
)  # fmt: skip


class FusedGeneration(GenerationMixin):
    """transformers' generation, for K specialists that may each read a prompt of their own."""

    config: UltraFuserConfig
    groups: Any  # nn.ModuleList of SpecialistGroup, which type checkers cannot express

    @property
    def end_token_ids(self) -> set[int]:
        """The tokens that end an answer."""
        ends = self.generation_config.eos_token_id
        return set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}

    def new_cache(self, offloading: bool = False, record: bool = False, growing: bool = False) -> UltraFuserCache:
        """An empty cache for every specialist.

        Pass the same one to `generate` at every turn of a conversation (`past_key_values`): each turn then reads only
        what the cache does not hold yet.

        Args:
            offloading: move the states of a layer to the CPU while the layer does not run.
            record: also keep the states that sliding windows have passed, so that a later turn need not read them again.
            growing: write into buffers, for caches of many rows (see `GrowingLayer`).

        Raises:
            UltraFuserError: offloading, but the model is on the CPU.
        """
        if offloading and self.device.type == "cpu":
            raise UltraFuserError("an offloaded cache needs an accelerator, but the model is on the CPU. Use 'dynamic'")
        configs = [group.model.config.get_text_config(decoder=True) for group in self.groups]
        members = [[self.config.names.index(name) for name in group.names] for group in self.groups]
        cache = UltraFuserCache(configs, members, offloading=offloading, growing=growing)
        if record:
            cache.activate_past_recording()
        return cache

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in _CACHES:
            raise UltraFuserError(
                f"cache_implementation={kind!r} is not available for fused models. Use 'dynamic' or 'offloaded'"
            )
        if model_kwargs.get("past_key_values") is not None:
            if generation_config.use_cache is False:
                raise UltraFuserError(
                    "past_key_values needs use_cache=True, got use_cache=False. Leave out one of them"
                )
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        elif generation_config.use_cache is not False:
            record = bool(generation_config.is_assistant)
            model_kwargs["past_key_values"] = self.new_cache(offloading=kind == "offloaded", record=record)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Any, model_kwargs: dict) -> None:
        """None: each specialist's positions count the real tokens of its own mask."""

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        refuse_keywords({key: model_kwargs.get(key) for key in _FORWARD_ONLY}, "generate")
        super()._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key != "speculation"})

    def generate(self, *args: Any, speculative: Any = None, **kwargs: Any) -> Any:
        """transformers' `generate`, and speculative decoding.

        Args:
            speculative: `auto`, `ngram`, `specialist` or a `Speculation`: draft tokens that are cheap to guess, and check
                several in one pass. Greedy answers stay the same, and sampled ones have the same distribution.

        Raises:
            UltraFuserError: an unknown mode, or an argument that does not go with it.
        """
        if speculative is None or speculative is False:
            return super().generate(*args, **kwargs)
        for name in ("assistant_model", "custom_generate", "prompt_lookup_num_tokens"):
            if kwargs.get(name) is not None:
                raise UltraFuserError(f"speculative and {name} do not go together. Leave out one of them")
        return super().generate(*args, speculation=read_speculation(self, speculative), **kwargs)

    def _sample(self, input_ids: torch.LongTensor, speculation: Speculation | None = None, **kwargs: Any) -> Any:
        if speculation is None:
            return super()._sample(input_ids, **kwargs)
        return decode_speculatively(self, input_ids, speculation=speculation, **kwargs)

    # ---------------------------------------------------------------- prompts

    def _prefill(
        self, input_ids: torch.LongTensor, generation_config: Any, model_kwargs: dict, is_first_iteration: bool = True
    ) -> Any:
        self._prepare_prompts(input_ids, generation_config, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _prepare_prompts(self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict) -> None:
        """Check the prompts before the first token, and reduce a cache of an earlier turn to what they share with it."""
        ids = model_kwargs.get("specialist_input_ids")
        masks = (model_kwargs.get("attention_mask"), model_kwargs.get("specialist_attention_mask"))
        ids, mask, positions = select_inputs(
            len(self.config.specialists), input_ids, masks[0], model_kwargs.get("position_ids"), ids, masks[1]
        )
        if ids.dim() == 3:
            ids, mask = _with_answer(ids, mask, input_ids)
            model_kwargs["specialist_input_ids"], model_kwargs["specialist_attention_mask"] = ids, mask
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, UltraFuserCache) or positions is not None:
            return
        length = getattr(generation_config, "_mask_length", -1) if masks[0] is None else masks[0].shape[1]
        if length == input_ids.shape[1]:  # otherwise the ids are the new tokens alone
            size = (-1, len(self.config.specialists), -1)
            ids = ids if ids.dim() == 3 else ids[:, None].expand(size)
            mask = torch.ones_like(ids) if mask is None else mask if mask.dim() == 3 else mask[:, None].expand(size)
            cache.keep_prefix(ids, mask)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        specialist_input_ids: torch.LongTensor | None = None,
        specialist_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Continue each specialist's own prompt with the tokens generated so far, which are the same for all."""
        for key in ("tokenizer", "assistant_tokenizer"):  # of the stop strings, they come along with the model's inputs
            kwargs.pop(key, None)
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        cached = 0 if cache is None else cache.get_seq_length()
        if next_sequence_length is None and cached and mask is not None and mask.shape[1] == input_ids.shape[1]:
            next_sequence_length = input_ids.shape[1] - cached  # assisted decoding passes the cached tokens again
        inputs = super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)
        if specialist_input_ids is None:
            return inputs
        end = cached + inputs["input_ids"].shape[1]
        ids: Any = specialist_input_ids
        mask = specialist_attention_mask
        if end > ids.shape[-1]:
            ids, mask = _with_answer(ids, mask, input_ids)
        inputs["specialist_input_ids"] = ids[..., cached:end]
        if mask is not None:
            inputs["specialist_attention_mask"] = mask[..., :end]
        inputs.pop("attention_mask", None)
        return inputs

    # ---------------------------------------------------------------- drafting models

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: Any
    ) -> None:
        """Accept a drafting model with another number of table rows, because `_assisted_decoding` fits its logits."""
        for key in ("assistant_early_exit", "use_mtp"):
            refuse_keywords({key: getattr(generation_config, key, None)}, "generate")
        kwargs = dict(generation_mode_kwargs)
        if "assistant_tokenizer" not in kwargs:
            kwargs.pop("assistant_model", None)
        super()._validate_generation_mode(generation_mode, generation_config, kwargs)

    def _assisted_decoding(
        self,
        input_ids: torch.LongTensor,
        *,
        generation_config: Any,
        inputs_tensor: torch.Tensor | None = None,
        assistant_model: PreTrainedModel | None = None,
        assistant_tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        self._prepare_prompts(input_ids, generation_config, kwargs)
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() and kwargs.get("attention_mask") is None:
            length = getattr(generation_config, "_mask_length", input_ids.shape[1])
            kwargs["attention_mask"] = input_ids.new_ones(len(input_ids), length)
        same_tokens = assistant_model is not None and assistant_tokenizer is None
        with _fit_vocabulary(assistant_model, self.config.vocab_size) if same_tokens else nullcontext():
            return super()._assisted_decoding(
                input_ids,
                generation_config=generation_config,
                inputs_tensor=inputs_tensor,
                assistant_model=assistant_model,
                assistant_tokenizer=assistant_tokenizer,
                **kwargs,
            )

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict, **kwargs: Any) -> Any:
        """A drafting model is an ordinary model: it reads `input_ids`, not the specialists' prompts."""
        fused_only = ("specialist_input_ids", "specialist_attention_mask")
        plain = {key: value for key, value in model_kwargs.items() if key not in fused_only}
        return super()._get_candidate_generator(*args, model_kwargs=plain, **kwargs)


def _with_answer(
    prompts: torch.Tensor, mask: torch.Tensor | None, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each specialist's prompt, continued by the tokens of `input_ids` after it: (B, K, P) -> (B, K, T).

    Raises:
        UltraFuserError: `input_ids` is shorter than the prompts, or the mask has another length.
    """
    length = prompts.shape[-1]
    if input_ids.shape[1] < length:
        raise UltraFuserError(
            f"specialist_input_ids holds prompts of {length} tokens, but input_ids has {input_ids.shape[1]}. Pass input_ids "
            "of the same length, e.g. one specialist's prompts"
        )
    if mask is not None and mask.shape[-1] != length:
        raise UltraFuserError(
            f"specialist_attention_mask covers {mask.shape[-1]} tokens, but specialist_input_ids has {length}. Pass the "
            "whole prompts, also those tokens that past_key_values holds"
        )
    new = input_ids[:, None, length:].expand(-1, prompts.shape[1], -1).to(prompts.device)  # (B, K, new)
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(new).to(mask)], dim=-1)
    return torch.cat([prompts, new], dim=-1), mask


@contextmanager
def _fit_vocabulary(model: Any, size: int) -> Iterator[None]:
    """Let a model with another number of table rows draft for one of `size` tokens.

    Its logits are cut, or filled with -inf, to `size`, so that it drafts no token that the fused model lacks. Tokens past
    its table are read as token 0. Drafts are only proposals, so this changes how many are accepted, not the answer.
    """
    rows = model.config.get_text_config().vocab_size

    def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = kwargs.get("input_ids")
        return args, kwargs if ids is None else kwargs | {"input_ids": ids.masked_fill(ids >= rows, 0)}

    def write(module: nn.Module, args: tuple, output: Any) -> Any:
        logits = output.logits[..., :size]
        output.logits = nn.functional.pad(logits, (0, size - logits.shape[-1]), value=-float("inf"))
        return output

    hooks = []
    if rows != size:
        hooks.append(model.register_forward_hook(write))
    if rows < size:
        hooks.append(model.register_forward_pre_hook(read, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
