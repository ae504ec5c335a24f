"""vLLM in this process, the fused model of transformers as its oracle, and the comparison of the two."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tiny_models import shake_gate, tiny
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM

VOCAB = 320
# vLLM's attention on CPUs has heads of at least 32
WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
WIDE = {**WIDTHS, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON = {"max_position_embeddings": 512, "vocab_size": VOCAB}
_KINDS: dict[str, dict[str, Any]] = {
    "llama": WIDTHS,
    "qwen2": WIDE,
    # vLLM's attention on CPUs approximates the soft cap of attention scores, the one of logits is exact
    "gemma2": {**WIDTHS, "query_pre_attn_scalar": 32, "sliding_window": 64, "attn_logit_softcapping": None},
    "gpt2": {"n_embd": 128, "n_head": 4, "n_positions": 512},
}


def save_tiny(folder: Path, kind: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A tiny model on disk, of a size that vLLM takes."""
    tiny(kind, seed, **(_COMMON | _KINDS[kind] | changes)).save_pretrained(folder)
    return folder


def save_fused(model: UltraFuserForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A fused checkpoint with a gate that has opinions."""
    shake_gate(model, scale=3.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM's `LLM` in this process: float32, eager, small, with prefix caching and prefills in chunks of 64 tokens."""
    from vllm import LLM

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8}
    llm = LLM(str(folder), **{**defaults, "max_num_batched_tokens": 64, "enable_prefix_caching": True, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompts(count: int = 20, seed: int = 0) -> list[list[int]]:
    """Prompts of 3 to 150 tokens. Every fourth begins like an earlier one, which prefix caching reuses."""
    generator = torch.Generator().manual_seed(seed)
    made: list[list[int]] = []
    for i in range(count):
        length = int(torch.randint(3, 150, (), generator=generator))
        made.append(torch.randint(4, VOCAB, (length,), generator=generator).tolist())
        if i % 4 == 3:
            made[-1] = (made[i - 2][:100] + made[-1])[:150]
    return made


def greedy(llm: Any, tokens: Sequence[Sequence[int]], length: int = 64) -> list[tuple[list[int], torch.Tensor]]:
    """The greedy answers of `length` tokens, and the log-probabilities of their tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=1)
    requests = [{"prompt_token_ids": list(prompt)} for prompt in tokens]
    answers = []
    for output in llm.generate(requests, sampling, use_tqdm=False):
        ids, logprobs = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        answers.append((ids, torch.tensor([row[token].logprob for row, token in zip(logprobs, ids, strict=True)])))
    return answers


@torch.no_grad()
def assert_equal(
    model: UltraFuserForCausalLM,
    tokens: Sequence[Sequence[int]],
    answers: Sequence[tuple[list[int], torch.Tensor]],
    tolerance: float = 1e-3,
    exact: bool = True,
) -> None:
    """Check each answer against the plain fused model, in one pass over the prompt and the answer.

    Args:
        tolerance: of the log-probabilities, in nats.
        exact: whether each token must be the most likely one. Otherwise its log-probability is within the tolerance of it.
    """
    for prompt, (ids, logprobs) in zip(tokens, answers, strict=True):
        logits = model(torch.tensor([[*prompt, *ids]]), logits_to_keep=len(ids) + 1).logits[0, :-1].float()
        expected = logits.log_softmax(-1)  # (answer, V)
        if exact:
            assert expected.argmax(-1).tolist() == ids
        chosen = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (chosen - logprobs).abs().max() <= tolerance
        assert (expected.amax(-1) - chosen).max() <= tolerance
