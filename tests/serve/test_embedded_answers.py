"""The embedded engine answers each of many requests as if it were alone."""

from __future__ import annotations

import asyncio

import pytest

from embedded_fixtures import alone, answers, collect, fused, greedy, ids, prompts, renderer_of, run, running
from tiny_models import entry, fuse, fuse_entries, save_adapter, tiny
from ultrafuser.serve.engine import Request, Sampling

LENGTHS = [(5, 9, 2), (1, 1, 1), (30, 4, 17), (8, 8, 8), (3, 40, 6), (12, 2, 25)]
KINDS = {
    "llama": {"kinds": ("llama", "llama", "llama")},
    "three architectures": {"kinds": ("llama", "gpt2", "gemma2")},
    "no positions": {"kinds": ("qwen2", "bloom", "llama")},
    "logits": {"kinds": ("llama", "qwen2", "mistral"), "mixing": "logits"},
    "static gate": {"kinds": ("llama", "llama", "llama"), "gate_type": "static"},
}


@pytest.fixture
def renderer(tokenizer):
    return renderer_of(tokenizer)


@pytest.fixture(params=[*KINDS, "sliding windows", "shared base"])
def model(request, tokenizer, save, tmp_path):
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 192}
    if request.param == "sliding windows":
        return fuse([tiny("mistral", seed, sliding_window=6, **size) for seed in range(3)])
    if request.param == "shared base":
        base, plain = save("base", **size), tiny(**size)
        first, last = (
            entry(name, base, save_adapter(plain, tmp_path / name, seed)) for seed, name in enumerate("ac", 1)
        )
        return fuse_entries([first, entry("b", save("b", seed=3, **size)), last])
    return fused(tokenizer, **KINDS[request.param])


def requests(new=12):
    return [Request(prompts(seed, lengths), greedy(new)) for seed, lengths in enumerate(LENGTHS)]


@pytest.mark.parametrize(
    "options", [{}, {"max_batch_size": 2}, {"prefill_tokens": 3}, {"max_cached_tokens": 0}], ids=str
)
def test_together_as_alone(model, renderer, options):
    expected = [alone(model, request) for request in requests()]
    assert [ids(answer) for answer in answers(model, renderer, requests(), **options)] == expected


def test_rows_that_come_and_go(model, renderer):
    """Requests of other lengths begin at other times, and one of them is cancelled."""
    wanted = [Request(prompts(seed, lengths), greedy(3 + 5 * seed)) for seed, lengths in enumerate(LENGTHS)]
    expected = [alone(model, request) for request in wanted]

    async def late(engine, request, delay):
        stream = engine.stream(wanted[0])
        for _ in range(delay):
            await anext(stream, None)
        await stream.aclose()
        return await collect(engine, request)

    async def main():
        async with running(model, renderer, max_batch_size=4) as engine:
            return await asyncio.gather(*(late(engine, request, i % 3) for i, request in enumerate(wanted)))

    assert [ids(answer) for answer in run(main)] == expected


def test_the_next_turn_continues_the_last_one(model, renderer):
    first = Request(prompts(1, (20, 14, 30)), greedy(10))

    async def main():
        async with running(model, renderer) as engine:
            answer = ids(await collect(engine, first))
            more = prompts(2, (5, 9, 1))
            second = Request([[*a, *answer, *b] for a, b in zip(first.prompts, more, strict=True)], greedy(10))
            before = engine.reused_tokens
            again = ids(await collect(engine, second))
            return second, again, engine.reused_tokens - before

    second, answer, reused = run(main)
    assert answer == alone(model, second)
    assert reused >= 25, "at least the shared columns of the shortest growth"


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next"])
def test_recurrent_layers_run_one_request_at_a_time(tokenizer, renderer, kind):
    layers = {
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0},
    }[kind]
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 192}
    model = fuse(
        [
            tiny(kind, 1, **size, **layers),
            tiny("llama", 2, vocab_size=len(tokenizer), max_position_embeddings=192),
            tiny(kind, 3, **size, **layers),
        ]
    )
    wanted = requests(6)
    given = answers(model, renderer, wanted, prefill_tokens=3)
    assert [ids(answer) for answer in given] == [alone(model, request) for request in wanted]


def test_sampled_answers_do_not_depend_on_their_neighbours(tokenizer, renderer):
    model = fused(tokenizer)
    ways = [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.05}, {"temperature": 0.0}, {"repetition_penalty": 1.3}]
    wanted = [
        Request(prompts(seed, lengths), Sampling(15, **{"temperature": 0.9, "seed": seed, **way}))
        for seed, (lengths, way) in enumerate(zip(LENGTHS, ways, strict=True))
    ]
    single = [answers(model, renderer, [request])[0] for request in wanted]
    together = answers(model, renderer, wanted)
    assert [ids(answer) for answer in together] == [ids(answer) for answer in single]
    assert len({tuple(ids(answer)) for answer in together}) == len(wanted)
