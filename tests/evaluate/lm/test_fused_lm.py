"""The adapter answers as lm-eval's own `hf` model does, whatever the batch; fused models read K templates."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tiny_models import force_gate, fuse, one_hot, tiny
from ultrafuser.data.chat_format import BUILTIN
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import CheckpointError, DataError
from ultrafuser.evaluate.lm.chat import decode_chat, encode_chat
from ultrafuser.evaluate.lm.fused import FusionLM
from ultrafuser.evaluate.lm.response_cache import CachedLM, ResponseCache

VOCAB = 320
QUESTIONS = ["def add(a, b):", "how many?", "The quick brown fox jumps", "1 + 2 = 3 and 4", "lazy dog " * 4]


def instance(kind: str, *args: Any, doc: int = 0) -> Instance:
    return Instance(kind, {}, args, 0, metadata=("a_task", doc, 1))


def big(seed: int, **changes: Any) -> Any:
    return tiny("llama", seed, vocab_size=VOCAB, max_position_embeddings=256, **changes)


@pytest.fixture
def plain(tokenizer) -> FusionLM:
    return FusionLM(fuse([big(0)]), Renderer(tokenizer, [tokenizer.chat_template]), batch_size=2)


@pytest.fixture
def fused(tokenizer) -> FusionLM:
    model = fuse([big(0), big(1)])
    return FusionLM(model, Renderer(tokenizer, [BUILTIN["chatml"], BUILTIN["plain"]]), batch_size=2)


def hf(lm: FusionLM) -> HFLM:
    return HFLM(pretrained=lm.model.specialist("s0"), tokenizer=lm.tokenizer, batch_size=2, max_length=256)


@pytest.mark.parametrize("as_chat", [True, False])
def test_log_likelihood_equals_lm_evals_own(plain, as_chat):
    reference = hf(plain)
    options = [" True", " False", "A", "the lazy dog"]

    def requests(lm: Any) -> list[Instance]:
        texts = [lm.apply_chat_template([{"role": "user", "content": q}]) if as_chat else q for q in QUESTIONS]
        return [instance("loglikelihood", text, option) for text in texts for option in options]

    likelihoods, expected = (
        plain.loglikelihood(requests(plain)),
        reference.loglikelihood(requests(reference), disable_tqdm=True),
    )
    assert [greedy for _, greedy in likelihoods] == [greedy for _, greedy in expected]
    assert [log_p for log_p, _ in likelihoods] == pytest.approx([log_p for log_p, _ in expected], abs=1e-5)


def test_an_empty_context_equals_lm_evals_own(plain):
    request = [instance("loglikelihood", "", "the lazy dog")]
    assert plain.loglikelihood(request)[0][0] == pytest.approx(hf(plain).loglikelihood(request)[0][0], abs=1e-5)


@pytest.mark.parametrize("as_chat", [True, False])
def test_generation_equals_lm_evals_own(plain, as_chat):
    reference = hf(plain)
    settings = {"until": ["\n\n", "dog"], "max_gen_toks": 12, "do_sample": False}

    def requests(lm: Any) -> list[Instance]:
        texts = [lm.apply_chat_template([{"role": "user", "content": q}]) if as_chat else q for q in QUESTIONS]
        return [instance("generate_until", text, dict(settings)) for text in texts]

    assert plain.generate_until(requests(plain)) == reference.generate_until(requests(reference), disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_does_not_matter(fused, batch_size):
    chats = [encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]
    weighed = [instance("loglikelihood", chat, option) for chat in chats for option in ("A", "B", "the fox")]
    requests = [instance("generate_until", chat, {"until": [], "max_gen_toks": 6}) for chat in chats]
    regrouped = FusionLM(fused.model, fused.renderer, batch_size=batch_size)
    assert [x for x, _ in regrouped.loglikelihood(weighed)] == pytest.approx(
        [x for x, _ in fused.loglikelihood(weighed)], abs=1e-5
    )
    assert regrouped.generate_until(requests) == fused.generate_until(requests)


@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_rows_leave_the_batch_when_their_answers_end(tokenizer, monkeypatch, sliding):
    """By the end token or a stop string. The answers are those of each row alone."""
    window = {"sliding_window": 8} if sliding else {}
    models = [tiny("mistral", seed, vocab_size=VOCAB, max_position_embeddings=256, **window) for seed in (0, 1)]
    model = fuse(models).double()  # no near-ties that a batch could decide
    lm = FusionLM(model, Renderer(tokenizer, [BUILTIN["chatml"], BUILTIN["plain"]]), batch_size=8)
    chats = [encode_chat([{"role": "user", "content": q}]) for q in [*QUESTIONS, "and then?", "x"]]
    generate, sizes = type(lm.model).generate, []

    def record(model: Any, **inputs: Any) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        return generate(model, **inputs)

    def answers(until: list[str], batch_size: int) -> list[str]:
        lm.batch_size = batch_size
        return lm.generate_until([instance("generate_until", c, {"until": until, "max_gen_toks": 60}) for c in chats])

    free = answers([], 1)
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in free]
    firsts = {t: [ids.index(t) if t in ids else 60 for ids in tokens] for t in {t for ids in tokens for t in ids}}
    # a token and a letter that come early in some answers and late in others
    end = max(firsts, key=lambda token: sum(i < 16 for i in firsts[token]) * sum(i > 32 for i in firsts[token]))
    usual_end = tokenizer.eos_token_id
    lm.model.generation_config.eos_token_id = [usual_end, end]
    alone = answers([], 1)
    assert len({len(text) for text in alone}) > 1
    monkeypatch.setattr(type(lm.model), "generate", record)
    assert answers([], 8) == alone
    assert sizes[0] == len(chats) and sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    lm.model.generation_config.eos_token_id = [usual_end]
    stop = tokenizer.decode([end]).strip() or "e"
    sizes.clear()
    assert answers([stop], 8) == [text.split(stop)[0] for text in free]
    assert sizes[-1] < sizes[0]


@pytest.mark.parametrize("k", [0, 1])
def test_a_one_hot_gate_is_that_specialist_with_its_own_template(tokenizer, k):
    """Of templates that agree on the blanks before an answer. Otherwise these count as prompt in the fused model alone."""
    templates = [BUILTIN["chatml"], BUILTIN["alpaca"]]
    fused = FusionLM(fuse([big(0), big(1)]), Renderer(tokenizer, templates), batch_size=2)
    alone = FusionLM(fuse([big(k)]), Renderer(tokenizer, [fused.renderer.chat_templates[k]]))
    fused.model = force_gate(fused.model, one_hot(k, 2))
    chats = [encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]
    requests = [instance("generate_until", chat, {"until": [], "max_gen_toks": 6}) for chat in chats]
    assert fused.generate_until(requests) == alone.generate_until(requests)
    # without a blank at the end of either template both weigh the very same tokens
    weighed = [instance("loglikelihood", f"{q}.", " fox") for q in QUESTIONS]
    assert [x for x, _ in fused.loglikelihood(weighed)] == pytest.approx(
        [x for x, _ in alone.loglikelihood(weighed)], abs=1e-5
    )


def test_an_answer_that_was_begun_goes_on(fused):
    begun = fused.renderer.prompt_texts(
        [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "Since"}]
    )
    assert all(text.endswith("Since") for text in begun)


def test_chats_survive_the_string():
    messages = [{"role": "user", "content": "naïve “quotes”\n{}"}]
    assert decode_chat(encode_chat(messages)) == messages
    assert decode_chat("plain text") is None


def test_what_does_not_fit_is_named_before_any_work(fused):
    long = encode_chat([{"role": "user", "content": "fox " * 300}])
    with pytest.raises(DataError, match="task 'a_task', document 7: .* do not fit into the context of 256"):
        fused.generate_until([instance("generate_until", long, {"until": [], "max_gen_toks": 5}, doc=7)])
    with pytest.raises(DataError, match="do not fit"):
        fused.loglikelihood([instance("loglikelihood", long, "A")])


def test_whole_documents_are_refused(fused):
    with pytest.raises(DataError, match="whole documents"):
        fused.loglikelihood_rolling([])


def test_an_empty_continuation_is_refused(fused):
    with pytest.raises(DataError, match="'' has no tokens"):
        fused.loglikelihood([instance("loglikelihood", "fox", "")])


# ---------------------------------------------------------------- memory


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


class Fragile(FusionLM):
    """Dies in the middle of its n-th batch, and counts what it was asked."""

    def __init__(self, *args: Any, dies_after: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remaining, self.requests = dies_after, 0

    def _generate(self, requests):
        if self.remaining == 0:
            raise Killed
        self.remaining -= 1
        self.requests += len(requests)
        return super()._generate(requests)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_killed_run_loses_no_answer_and_repeats_none(fused, tmp_path, sampled):
    chats = [encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]
    settings = {"until": [], "max_gen_toks": 6, "do_sample": sampled, "temperature": 1.0 if sampled else 0.0}
    requests = [instance("generate_until", chat, settings) for chat in chats for _ in range(3)]
    random.Random(0).shuffle(requests)
    total, runs = 0, 0
    while True:
        lm = Fragile(fused.model, fused.renderer, batch_size=2, dies_after=2)
        store = ResponseCache(tmp_path / "answers.sqlite", "me")
        try:
            answers = CachedLM(lm, store).generate_until(requests)
            break
        except Killed:
            continue
        finally:
            total, runs = total + lm.requests, runs + 1
            store.close()
    assert total == len(requests)
    assert runs > 2
    if sampled:  # repeats of one question are drawn anew, also across runs
        by_question: dict[str, list[str]] = {}
        for request, text in zip(requests, answers, strict=True):
            by_question.setdefault(request.args[0], []).append(text)
        assert all(len(set(texts)) == 3 for texts in by_question.values())
    else:
        assert answers == fused.generate_until(requests)


def test_what_was_answered_is_never_asked_again(fused, tmp_path):
    requests = [instance("loglikelihood", q, " fox") for q in QUESTIONS]
    store = ResponseCache(tmp_path / "answers.sqlite", "me")
    first = CachedLM(fused, store).loglikelihood(requests)

    class Mute(FusionLM):
        def loglikelihood(self, requests):
            raise AssertionError("asked again")

    assert CachedLM(Mute(fused.model, fused.renderer), store).loglikelihood(requests) == first


def test_answers_of_another_model_are_refused(tmp_path):
    ResponseCache(tmp_path / "answers.sqlite", "one").close()
    with pytest.raises(DataError, match="holds the answers of another model .one., expected two"):
        ResponseCache(tmp_path / "answers.sqlite", "two")


def test_a_file_that_is_no_store_is_named(tmp_path):
    (tmp_path / "answers.sqlite").write_text("no database at all, but text of some length" * 40)
    with pytest.raises(DataError, match="no response cache can be opened there"):
        ResponseCache(tmp_path / "answers.sqlite", "me")


def test_sampled_answers_follow_the_seed(fused):
    chat = encode_chat([{"role": "user", "content": "why?"}])
    requests = [
        instance("generate_until", chat, {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0})
    ]
    answers = [FusionLM(fused.model, fused.renderer, seed=seed).generate_until(requests) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.is_inference_mode_enabled() is False


def test_sampled_answers_belong_to_their_seed(fused, tmp_path):
    chat = encode_chat([{"role": "user", "content": "why?"}])
    sampled = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    store = ResponseCache(tmp_path / "answers.sqlite", "me")
    results = [
        CachedLM(FusionLM(fused.model, fused.renderer, seed=seed), store, seed=seed).generate_until(
            [instance("generate_until", chat, sampled)]
        )
        for seed in (1, 2, 1)
    ]
    assert results[0] == results[2] != results[1]


def test_a_full_disk_is_a_clear_error(fused, tmp_path):
    store = ResponseCache(tmp_path / "answers.sqlite", "me")
    store._db.execute("PRAGMA max_page_count = 4")
    with pytest.raises(DataError, match="could not be saved .* Free disk space and run again"):
        for i in range(1000):
            store.put("generate_until", str(i), "x" * 1000)
    assert store.get("generate_until", "0") == "x" * 1000


@pytest.mark.parametrize("mixing", ["logits", "probabilities"])
def test_a_likelihood_that_is_nan_is_an_error(fused, mixing):
    fused.model.config.mixing = mixing
    with torch.no_grad():
        fused.model.groups[1].model.model.norm.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match="the log-probability of ' True' is NaN.*--dtype float32"):
        fused.loglikelihood([instance("loglikelihood", "how many?", " True")])
