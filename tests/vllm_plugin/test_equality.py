"""Fused models give the same tokens and probabilities in vLLM as in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_engines import VOCAB, WIDTHS, assert_equal, engine, greedy, prompts, save_fused, save_tiny
from transformers import PreTrainedTokenizerFast

from tiny_models import entry, force_gate, fuse_entries, one_hot, save_adapter, tiny
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def shared_engine(shared_folder: Path) -> Iterator[Any]:
    with engine(shared_folder) as llm:
        yield llm


def test_a_shared_base_gives_the_answers_of_transformers(shared_engine, shared_folder):
    """In batches, with prefix caching and chunked prefills."""
    model = UltraFuserForCausalLM.from_pretrained(shared_folder)
    assert_equal(model, prompts(), greedy(shared_engine, prompts()))


def test_a_masked_gate_leaves_one_specialist(shared_engine, shared_folder):
    """And the record of the weights says so."""
    records = []

    def masked(model: Any, keep: int) -> Any:
        run = model.compute_logits

        def compute_logits(states: torch.Tensor) -> torch.Tensor:
            model.gate_mask = torch.arange(3).expand(len(states), 3) == keep
            logits = run(states)
            records.append(model.last_gate_weights.clone())
            return logits

        model.compute_logits = compute_logits

    def unmask(model: Any) -> None:
        del model.compute_logits

    shared_engine.apply_model(lambda model: masked(model, 1))
    try:
        answers = greedy(shared_engine, prompts(4), 16)
    finally:
        shared_engine.apply_model(unmask)
    assert all(torch.equal(weights, torch.tensor([0.0, 1.0, 0.0]).expand_as(weights)) for weights in records)
    alone = force_gate(UltraFuserForCausalLM.from_pretrained(shared_folder), one_hot(1, 3))
    assert_equal(alone, prompts(4), answers)


def test_the_specialists_logits_are_recorded_when_asked(shared_engine, shared_folder):
    """Each specialist's logits belong to the rows of the last call."""
    tokens = prompts(1)[0]
    shared_engine.apply_model(lambda model: setattr(model, "record_specialists", True))
    greedy(shared_engine, [tokens], 1)
    (recorded,) = shared_engine.apply_model(lambda model: model.last_specialist_logits)
    shared_engine.apply_model(lambda model: setattr(model, "record_specialists", False))
    fused = UltraFuserForCausalLM.from_pretrained(shared_folder)
    for name, logits in zip(fused.config.names, recorded, strict=True):
        with torch.no_grad():
            expected = fused.specialist(name)(torch.tensor([tokens])).logits[:, -1]
        assert torch.allclose(logits, expected, atol=1e-3)


def test_mixed_architectures_give_the_answers_of_transformers(mixed_folder):
    """Separate specialists of other widths beside two that share a base. Mixed logits, temperatures, masked tokens."""
    with engine(mixed_folder) as llm:
        answers = greedy(llm, prompts())
    assert_equal(UltraFuserForCausalLM.from_pretrained(mixed_folder), prompts(), answers)


@pytest.fixture(scope="module")
def odd_folder(folders: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Padded tables, an end token of its own behind the common vocabulary, an adapter that PEFT merges, a static gate."""
    base = save_tiny(folders / "odd-base", seed=3)
    dora = save_adapter(
        tiny("llama", 3, max_position_embeddings=512, vocab_size=VOCAB, **WIDTHS),
        folders / "dora",
        seed=4,
        use_dora=True,
    )
    entries = [
        entry("padded", save_tiny(folders / "padded", seed=5, vocab_size=336), end_token_id=330),
        entry("dora", base, dora, separate=True, end_token_id=1, temperature=0.7),
        entry("tied", save_tiny(folders / "tied", "qwen2", seed=6, tie_word_embeddings=True), end_token_id=9),
    ]
    options = {"vocab_size": 318, "end_token_id": 1, "masked_token_ids": [7], "gate_type": "static"}
    return save_fused(fuse_entries(entries, **options), folders / "odd", tokenizer)


def test_vocabularies_and_ends_that_differ_are_mixed_as_in_transformers(odd_folder):
    tokens = [[min(token, 317) for token in prompt] for prompt in prompts()]
    with engine(odd_folder) as llm:
        answers = greedy(llm, tokens)
    assert_equal(UltraFuserForCausalLM.from_pretrained(odd_folder), tokens, answers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(mixed_folder, dtype):
    """The log-probabilities of the chosen tokens, against float32."""
    with engine(mixed_folder, dtype=dtype) as llm:
        answers = greedy(llm, prompts(4), 16)
    model = UltraFuserForCausalLM.from_pretrained(mixed_folder)
    distances = []
    for prompt, (ids, logprobs) in zip(prompts(4), answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]]), logits_to_keep=len(ids) + 1).logits[0, :-1]
        distances.append((logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0] - logprobs).abs())
    assert torch.cat(distances).mean() < (0.2 if dtype == "bfloat16" else 0.03)
