"""What the embedded engine does besides answering: options of a request, limits, cancelling, failing, closing."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
import torch

from embedded_fixtures import END, alone, answers, collect, fused, greedy, ids, prompts, renderer_of, run, running, text
from tiny_models import force_gate, left_pad, one_hot
from ultrafuser.errors import UltraFuserError
from ultrafuser.serve.engine import EngineBusyError, EngineClosedError, GenerationError, Request, Sampling

PROMPT = prompts(3, (7, 12, 4))


@pytest.fixture
def renderer(tokenizer):
    return renderer_of(tokenizer)


@pytest.fixture
def model(tokenizer):
    return fused(tokenizer)


def endless(new=100, **changes):
    return Request(PROMPT, greedy(new, ignore_eos=True, **changes))


async def settled(condition, timeout_s=20.0):
    """Wait until a condition holds."""
    for _ in range(int(timeout_s / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition did not come to hold")


# ---------------------------------------------------------------- tokens


def test_tokens_carry_weights_and_logprobs_of_the_mixture(model, renderer):
    [answer] = answers(model, renderer, [Request(PROMPT, greedy(5, logprobs=4, specialist_logprobs=3))])
    sequences = [torch.tensor([*prompt, *ids(answer)[:-1]]) for prompt in PROMPT]
    padded, mask = left_pad(sequences)
    with torch.no_grad():
        out = model(specialist_input_ids=padded[None], specialist_attention_mask=mask[None], output_gate_weights=True)
        states = model.specialist_states(padded[None], mask[None])
    expected = out.logits[0, -len(answer) :].log_softmax(-1)
    for i, token in enumerate(answer):
        position = len(padded[0]) - len(answer) + i
        assert token.logprob == pytest.approx(expected[i, token.token_id].item(), abs=1e-4)
        assert token.weights == pytest.approx(out.gate_weights[0, position].tolist(), abs=1e-5)
        assert sum(token.weights) == pytest.approx(1, abs=1e-5)
        assert [entry.token_id for entry in token.top] == expected[i].topk(4).indices.tolist()
        for top, head, state in zip(token.specialist_top, model.heads(), states, strict=True):
            log_probs = head.logits(state[0, position]).log_softmax(-1)
            assert [entry.token_id for entry in top] == log_probs.topk(3).indices.tolist()
            assert [entry.logprob for entry in top] == pytest.approx(log_probs.topk(3).values.tolist(), abs=1e-4)
    assert [token.finish_reason for token in answer] == [None] * 4 + ["length"]


def test_one_specialist_left_is_that_specialist_alone(model, renderer):
    wanted = [Request(PROMPT, greedy(8, specialists=(name,))) for name in model.config.names]
    wanted.append(Request(PROMPT, greedy(8)))
    together = answers(model, renderer, wanted)
    assert ids(together[-1]) == alone(model, wanted[-1])
    for k, answer in enumerate(together[:-1]):
        assert all(token.weights == tuple(float(i == k) for i in range(3)) for token in answer)
        assert ids(answer) == alone(force_gate(model, one_hot(k, 3)), wanted[0])


def test_weights_are_renormalised_over_those_that_take_part(model, renderer):
    names = model.config.names
    whole, two = answers(model, renderer, [Request(PROMPT, greedy(1, specialists=s)) for s in (None, names[1:])])
    first, second = whole[0].weights, two[0].weights
    assert second == pytest.approx([0, first[1] / (first[1] + first[2]), first[2] / (first[1] + first[2])], abs=1e-5)


def test_specialists_without_any_weight_share_it(model, renderer):
    force_gate(model, one_hot(0, 3))
    [answer] = answers(model, renderer, [Request(PROMPT, greedy(2, specialists=tuple(model.config.names[1:])))])
    assert answer[0].weights == (0, 0.5, 0.5)


@pytest.mark.parametrize("end", [None, 5])
def test_an_end_ends_the_answer(model, renderer, end):
    """Any end: the shared one, and others that a specialist's checkpoint names."""
    model.generation_config.eos_token_id = END if end is None else [END, end]
    model.config.end_token_id = END
    wanted = Request(PROMPT, greedy(20, logit_bias={end or END: 1e4}))
    [answer] = answers(model, renderer, [wanted])
    assert [(token.token_id, token.text, token.finish_reason) for token in answer] == [(END, "", "stop")]
    [longer] = answers(model, renderer, [Request(PROMPT, greedy(3, ignore_eos=True, logit_bias={end or END: 1e4}))])
    assert ids(longer) == [end or END] * 3
    assert longer[-1].finish_reason == "length"


def test_texts_are_the_answer_and_stop_texts_end_it(model, renderer):
    [whole] = answers(model, renderer, [endless(30)])
    assert text(whole) == renderer.answer_text(ids(whole))
    stop = text(whole)[8:11]
    [stopped] = answers(model, renderer, [endless(30, stop=(stop,))])
    assert text(stopped) == text(whole)[: text(whole).index(stop)]
    assert stopped[-1].finish_reason == "stop"
    assert ids(stopped) == ids(whole)[: len(stopped)]


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(PROMPT[:2], greedy()), "the request has 2 prompts, expected one for each of 3 specialists"),
        (Request([*PROMPT[:2], []], greedy()), "the prompt of specialist 's2' is empty"),
        (Request([[4], [5], [10**6]], greedy()), "specialist 's2' has the token 1000000, expected tokens from 0 to 319"),
        (Request([[4], [-5], [6]], greedy()), "specialist 's1' has the token -5"),
        (Request(PROMPT, greedy(181)), "has 12 tokens and max_new_tokens is 181, but the context is 192 tokens. Lower max_new_tokens to at most 180"),
        (Request(prompts(0, (1, 200, 1)), greedy(1)), "specialist 's1' has 200 tokens and max_new_tokens is 1, but the context is 192 tokens. Shorten the prompt"),
        (Request(PROMPT, greedy(1, specialists=("s0", "law"))), "no specialist 'law'. Known: s0, s1, s2"),
        (Request(PROMPT, greedy(1, specialists=())), "no specialist takes part. Name at least one of: s0, s1, s2"),
        (Request(PROMPT, Sampling(1, top_p=0)), "top_p is 0"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_requests_that_cannot_run(model, renderer, request_, message):
    async def main():
        async with running(model, renderer) as engine:
            with pytest.raises(UltraFuserError) as error:
                engine.stream(request_)
            assert message in str(error.value)
            assert not isinstance(error.value, (EngineBusyError, GenerationError))

    run(main)


def test_an_answer_may_fill_the_context(model, renderer):
    [answer] = answers(model, renderer, [endless(180)])
    assert len(answer) == 180


def test_a_full_queue(model, renderer):
    async def main():
        async with running(model, renderer, max_batch_size=1, max_waiting=2) as engine:
            streams = [engine.stream(endless()) for _ in range(3)]
            with pytest.raises(EngineBusyError, match="which is the limit. Try again later"):
                engine.stream(endless())
            await streams[0].aclose()
            await settled(lambda: engine.waiting + engine.running < 3)
            for stream in [*streams, engine.stream(endless())]:
                await stream.aclose()

    run(main)


@pytest.mark.parametrize("max_cached_tokens", [0, 1000])
def test_rows_that_outgrow_the_batch_go_back_to_the_queue(model, renderer, max_cached_tokens):
    wanted = [Request(prompts(seed, (5 + seed, 3, 9)), greedy(25, ignore_eos=True)) for seed in range(4)]
    wanted.append(Request(prompts(9, (40, 30, 1)), Sampling(60, seed=1, ignore_eos=True)))
    expected = [ids(answers(model, renderer, [request])[0]) for request in wanted]
    widest = []

    async def main():
        async with running(model, renderer, max_batch_tokens=80, max_cached_tokens=max_cached_tokens) as engine:
            step = engine._batch.step

            def counted():
                rows = engine._batch.rows
                widest.append(len(rows) * max(row.length for row in rows))
                assert len(rows) == 1 or widest[-1] < 80
                return step()

            engine._batch.step = counted
            out = await asyncio.gather(*(collect(engine, request) for request in wanted))
            assert [ids(answer) for answer in out] == expected
            assert [text(answer) for answer in out] == [renderer.answer_text(ids(answer)) for answer in out]
            assert engine.prompt_tokens == sum(max(map(len, request.prompts)) for request in wanted)

    run(main)
    assert max(widest) == 99, "the longest request, which runs alone"


# ---------------------------------------------------------------- cancelling


@pytest.mark.parametrize("way", ["close", "cancel the task", "drop"])
def test_a_cancelled_request_leaves_and_its_memory_returns(model, renderer, way):
    async def read(stream):
        async for _ in stream:
            pass

    async def main():
        async with running(model, renderer, max_cached_tokens=0) as engine:
            stream = engine.stream(endless(170))
            await anext(stream)
            assert engine.running == 1
            if way == "close":
                await stream.aclose()
                assert [token async for token in stream] == []
            elif way == "cancel the task":
                task = asyncio.create_task(read(stream))
                await asyncio.sleep(0.01)
                task.cancel()
            else:
                del stream
                gc.collect()
            await settled(lambda: engine.running == 0)
            assert engine.generated_tokens < 170
            assert engine._batch.rows == [] and engine._batch._cache is None
            assert ids(await collect(engine, Request(PROMPT, greedy(5)))) == alone(model, Request(PROMPT, greedy(5)))

    run(main)


def test_requests_that_wait_can_be_cancelled(model, renderer):
    async def main():
        async with running(model, renderer, max_batch_size=1) as engine:
            first, second = engine.stream(endless(60)), engine.stream(endless())
            await anext(first)
            await second.aclose()
            await settled(lambda: engine.waiting == 0)
            assert engine.running == 1 and len([token async for token in first]) == 59

    run(main)


def test_a_loop_that_is_gone(model, renderer):
    """A reader whose event loop was closed: its request leaves, others are served."""
    from ultrafuser.serve.embedded import EmbeddedEngine

    engine = EmbeddedEngine(model, renderer)

    async def begin():
        return engine.stream(endless(170))

    stream = asyncio.run(begin())

    async def main():
        await settled(lambda: engine.running == 0)
        assert len(await collect(engine, Request(PROMPT, greedy(4, ignore_eos=True)))) == 4
        await engine.close()

    run(main)
    del stream


# ---------------------------------------------------------------- failing


def failing(model, when):
    """Let a forward pass of the specialists run out of memory when `when(ids)` says so."""

    def check(module, args):
        if when(args[0]):
            raise torch.OutOfMemoryError("out of memory, tried to allocate 20 GiB")

    return model.groups[0].register_forward_pre_hook(check)


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(model, renderer):
    async def main():
        async with running(model, renderer) as engine:
            streams = [engine.stream(endless(100)) for _ in range(3)]
            for stream in streams:
                await anext(stream)
            hook = failing(model, lambda tokens: tokens.shape[-1] == 1)
            for stream in streams:
                with pytest.raises(
                    GenerationError, match="the forward pass failed: OutOfMemoryError: out of memory, tried"
                ):
                    async for _ in stream:
                        pass
            hook.remove()
            assert engine.running == 0
            assert ids(await collect(engine, Request(PROMPT, greedy(5)))) == alone(model, Request(PROMPT, greedy(5)))

    run(main)


def test_a_prompt_that_fails_does_not_touch_the_others(model, renderer):
    async def main():
        async with running(model, renderer) as engine:
            good = engine.stream(endless(60))
            await anext(good)
            hook = failing(model, lambda tokens: tokens.shape[-1] > 12)
            with pytest.raises(GenerationError, match="OutOfMemoryError"):
                await collect(engine, Request(prompts(4, (20, 20, 20)), greedy(4)))
            hook.remove()
            assert len([token async for token in good]) == 59

    run(main)


def test_nan_fails_one_request(model, renderer):
    """A token whose embedding is NaN: only the request with it fails."""
    for group in model.groups:
        group.model.get_input_embeddings().weight.data[300] = torch.nan

    async def main():
        async with running(model, renderer) as engine:
            good = asyncio.create_task(collect(engine, endless(30, logit_bias={300: -1e4})))
            with pytest.raises(GenerationError, match="the model predicts NaN for the next token"):
                await collect(engine, Request([[300, 4]] * 3, greedy(4)))
            assert len(await good) == 30

    run(main)


# ---------------------------------------------------------------- closing


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "ultrafuser-engine"]


def test_close_finishes_what_is_accepted(model, renderer):
    async def main():
        async with running(model, renderer, max_batch_size=1) as engine:
            tasks = [asyncio.create_task(collect(engine, endless(15))) for _ in range(3)]
            await settled(lambda: engine.running + engine.waiting == 3)
            await engine.close(grace_s=30)
            assert [len(await task) for task in tasks] == [15] * 3
            with pytest.raises(EngineClosedError, match="shutting down and takes no more requests"):
                engine.stream(endless())

    run(main)
    assert not threads()


def test_close_cancels_what_takes_longer(model, renderer):
    async def main():
        async with running(model, renderer, max_batch_size=1) as engine:
            tasks = [asyncio.create_task(collect(engine, endless(170))) for _ in range(2)]
            await settled(lambda: engine.running + engine.waiting == 2)
            await engine.close(grace_s=0.05)
            for task in tasks:
                with pytest.raises(EngineClosedError, match="closed before the answer was complete"):
                    await task

    run(main)
    assert not threads()


def test_gauges(model, renderer):
    async def main():
        async with running(model, renderer, max_batch_size=1, max_cached_tokens=100) as engine:
            first, second = engine.stream(endless(20)), engine.stream(endless(20))
            await anext(first)
            assert (engine.running, engine.waiting) == (1, 1)
            for stream in (first, second):
                async for _ in stream:
                    pass
            await settled(lambda: engine.running == 0)
            assert (engine.waiting, engine.generated_tokens, engine.prompt_tokens) == (0, 40, 24)
            await settled(lambda: engine.cached_tokens == 31)  # the second answer is the same as the first one
            assert engine.reused_tokens == 11
            for seed in range(5):
                await collect(engine, Request(prompts(seed, (30, 20, 9)), greedy(10)))
                assert engine.cached_tokens <= 100

    run(main)
