"""Stage 1b: sampled answers, their states, the policy's gradient, and runs that stop and go on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training_fixtures import GATE, Interruption, RecordingProgress, TinyRun, metrics
from ultrafuser.errors import RecipeError, TrainingError
from ultrafuser.recipe import OutcomeStage, load_recipe
from ultrafuser.specialists import fuse, load, make_renderer
from ultrafuser.train import outcome
from ultrafuser.train.outcome import advantages, load_questions, sample_answers, train_outcome

Graded = Iterator[tuple[str, Callable[[str], float]]]
STAGE = {"name": "outcome", "steps": 3, "samples_per_domain": 2, "answers": 3, "max_new_tokens": 6, "lr": 0.01}


def graded(check: Callable[[str], float]) -> Graded:
    return ((f"how many {i}?", check) for i in itertools.count())


def vowels(seed: int) -> dict[str, Graded]:
    """Two domains. An answer is better the more vowels it has."""
    return {name: graded(lambda answer: sum(c in "aeiou" for c in answer) / 50) for name in ("text", "code")}


def no_mapping(seed: int) -> list:
    return []


def not_numbers(seed: int) -> dict[str, Graded]:
    return {"text": graded(lambda answer: float("nan"))}


def few(seed: int) -> dict[str, Graded]:
    return {"text": itertools.islice(graded(lambda answer: 1.0), 3)}


def stage(**changes: Any) -> OutcomeStage:
    return OutcomeStage(**STAGE | {"questions": f"{__name__}:vowels"} | changes)


def tiny_model(tiny_run: TinyRun, **changes: Any) -> tuple[Any, Any]:
    model, tokenizer = fuse(tiny_run.recipe("unused", **changes))
    return model.eval(), make_renderer(model, tokenizer, None)


@pytest.mark.parametrize("mixing", ["probabilities", "logits"])
def test_the_states_are_those_of_a_pass_over_the_whole_answers(tiny_run, mixing):
    """Also of answers that end early, and of rows whose neighbours have left the batch."""
    model, renderer = tiny_model(tiny_run, mixing=mixing)
    model.generation_config.eos_token_id = list(range(0, len(tiny_run.tokenizer), 9))  # so that some end early
    prompts = ["how many foxes are there?", "why?", "and the dog?"]
    torch.manual_seed(0)
    answers = sample_answers(model, renderer, prompts, stage(answers=4, max_new_tokens=12))
    assert len({len(tokens) for tokens in answers.tokens}) > 2 and max(map(len, answers.tokens)) > 4
    assert len(answers.tokens) == 12 and len(answers.sampled) == sum(map(len, answers.tokens))
    start = 0
    for i, tokens in enumerate(answers.tokens):
        prompt = renderer.prompt([{"role": "user", "content": prompts[i // 4]}])
        span = slice(start, start + len(tokens))
        start += len(tokens)
        for k, ids in enumerate(prompt):
            inputs = torch.tensor([[*ids, *tokens]])[None].expand(1, len(prompt), -1)  # each specialist reads it
            expected = model.specialist_states(inputs)[k][0, len(ids) - 1 : -1]
            assert torch.allclose(answers.states[k][span], expected, atol=1e-4)
            logits = model.heads()[k].weight @ expected.T
            reference = logits.log_softmax(0).gather(0, torch.tensor(tokens)[None])[0]
            assert torch.allclose(answers.log_probs[span, k], reference, atol=1e-3)
        states = [state[span] for state in answers.states]
        mixed = model.mix(states, model.gate(states)).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert torch.allclose(answers.sampled[span], mixed, atol=1e-4)


def test_an_answer_is_compared_with_the_others_of_its_question():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    third = 1 / 3
    expected = torch.tensor([[2 * third, -2 * third, -2 * third, 2 * third], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(advantages(rewards), expected)


@pytest.mark.parametrize("mixing", ["probabilities", "logits"])
def test_the_first_update_follows_the_policy_gradient(tiny_run, mixing):
    """The gradient is that of the mean of advantage x log p, computed here from the model's own loss."""
    model, renderer = tiny_model(tiny_run, mixing=mixing)
    torch.manual_seed(1)
    answers = sample_answers(model, renderer, ["why?", "how?"], stage())
    advantage = torch.tensor([[0.5, -1.0, 0.5], [1.0, 0.0, -1.0]])
    optimizer = torch.optim.SGD(model.gate.parameters(), lr=0.0)
    outcome._update(model, answers, advantage, stage(max_grad_norm=0), optimizer)
    gradients = [parameter.grad.clone() for parameter in model.gate.parameters()]
    model.gate.zero_grad()
    start, total = 0, torch.zeros(())
    for weight, tokens in zip(advantage.flatten(), answers.tokens, strict=True):
        span = slice(start, start + len(tokens))
        start += len(tokens)
        loss = model.loss_from_features([state[span][None] for state in answers.states], torch.tensor([tokens])).loss
        total = total + weight * loss * len(tokens)
    (total / len(answers.sampled)).backward()
    for gradient, parameter in zip(gradients, model.gate.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-5)


def test_the_gate_learns_which_specialist_answers_right(tiny_run, tmp_path, monkeypatch):
    """Right is the first token that `code` alone would give. The gate starts without a preference."""
    model, renderer = tiny_model(tiny_run, gate={"type": "static"})

    def check_of(prompt: str) -> Callable[[str], float]:
        ids = renderer.prompt([{"role": "user", "content": prompt}])[1]
        state = model.specialist_states(torch.tensor([[ids] * 3]))[1][0, -1]
        wanted = renderer.answer_text([int((model.heads()[1].weight @ state).argmax())])
        return lambda answer: float(answer.startswith(wanted[:1]) and wanted != "")

    def source(seed: int) -> dict[str, Graded]:
        prompts = (f"how many {i}?" for i in itertools.count())
        return {"code": ((prompt, check_of(prompt)) for prompt in prompts)}

    monkeypatch.setattr(f"{__name__}.vowels", source)
    settings = stage(steps=12, samples_per_domain=12, answers=6, max_new_tokens=1, lr=0.1, schedule="constant")
    before = model.gate([torch.zeros(1, 32)] * 3).exp()[0, 1].item()
    train_outcome(
        model, renderer, settings, seed=0, checkpoint=tmp_path / "step.pt", metrics_file=tmp_path / "metrics.jsonl",
        progress=RecordingProgress(),
    )  # fmt: skip
    after = model.gate([torch.zeros(1, 32)] * 3).exp()[0, 1].item()
    rewards = [row["reward"] for row in metrics(tmp_path)]
    assert before == pytest.approx(1 / 3) and after > 0.6
    assert sum(rewards[-3:]) > 1.3 * sum(rewards[:3])


def test_a_run_with_the_stage(tiny_run, tmp_path):
    """It follows the gate's stage, moves the gate alone, and its checkpoint loads."""
    questions = {"questions": f"{__name__}:vowels"}
    tiny_run.train(tmp_path / "run", [GATE, STAGE | questions])
    rows = [row for row in metrics(tmp_path / "run") if row["stage"] == "outcome"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["reward"] == pytest.approx((row["reward/text"] + row["reward/code"]) / 2) for row in rows)
    assert all(0 <= row["differing"] <= 1 and row["kl"] >= 0 and row["answer_tokens"] > 0 for row in rows)
    first = load_file(tmp_path / "run" / "1-gate" / "finished.safetensors")
    second = load_file(tmp_path / "run" / "2-outcome" / "finished.safetensors")
    assert first.keys() == second.keys() and all(name.startswith("gate.") for name in second)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    model, _ = load(tmp_path / "run" / "fused", device_map="cpu")
    assert all(torch.equal(model.state_dict()[name], second[name]) for name in second)
    assert not (tmp_path / "run" / "2-outcome" / "step.pt").exists()


def test_an_interrupted_run_gives_the_same_gate(tiny_run, tmp_path):
    stages = [GATE, STAGE | {"questions": f"{__name__}:vowels"}]
    tiny_run.train(tmp_path / "whole", stages)

    class Stop(RecordingProgress):
        def advance(self, steps: int = 1, note: str = "") -> None:
            if note.startswith("reward"):
                self.count = getattr(self, "count", 0) + 1
                if self.count == 2:
                    raise Interruption

    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "cut", stages, progress=Stop())
    tiny_run.train(tmp_path / "cut", stages, resume=True)
    whole, cut = (load_file(tmp_path / name / "2-outcome" / "finished.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    without = ("tokens_per_s", "seconds")
    assert metrics(tmp_path / "cut", without) == metrics(tmp_path / "whole", without)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("nowhere_at_all:questions", "No module named 'nowhere_at_all'"),
        (f"{__name__}:nothing", "has no attribute 'nothing'"),
        (f"{__name__}:no_mapping", r"returned list \[\], expected an iterator of prompts and checks for each domain"),
        ("no_function", "Name a function as MODULE:FUNCTION that takes a seed"),
    ],
)
def test_a_source_that_is_missing_is_named(reference, problem):
    with pytest.raises(TrainingError, match=problem):
        load_questions(reference, 0)


def test_a_source_that_ends_is_named(tiny_run, tmp_path):
    with pytest.raises(TrainingError, match=r"few' ended after 1 of 2 questions of domain 'text'"):
        tiny_run.train(tmp_path / "run", [STAGE | {"questions": f"{__name__}:few"}])


def test_a_reward_that_is_no_number_is_named(tiny_run, tmp_path):
    with pytest.raises(TrainingError, match="not_numbers' returned NaN or infinity, expected 0 to 1"):
        tiny_run.train(tmp_path / "run", [STAGE | {"questions": f"{__name__}:not_numbers"}])


def test_a_loss_that_is_not_finite_is_an_error(tiny_run):
    model, renderer = tiny_model(tiny_run)
    answers = sample_answers(model, renderer, ["why?"], stage())
    answers.sampled.fill_(float("nan"))
    optimizer = torch.optim.SGD(model.gate.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match=r"not finite. Lower stages.outcome.lr"):
        outcome._update(model, answers, torch.ones(1, 3), stage(), optimizer)


def test_several_processes_are_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(outcome.PartialState, "num_processes", 2, raising=False)
    monkeypatch.setattr(outcome, "PartialState", lambda: type("State", (), {"num_processes": 2}))
    with pytest.raises(TrainingError, match="runs in one process, got 2. Start it without a launcher"):
        tiny_run.train(tmp_path / "run", [STAGE | {"questions": f"{__name__}:vowels"}])


def test_one_answer_has_nothing_to_be_compared_with(tiny_run, tmp_path):
    with pytest.raises(RecipeError, match="answers"):
        load_recipe(tiny_run.fields(tmp_path, [STAGE | {"answers": 1}]))


def test_questions_of_the_exams():
    """Of the training split, with checks that a right answer passes and a wrong one does not."""
    from ultrafuser.zoo.exams import questions

    source = load_questions("ultrafuser.zoo.exams.training:questions", 3)
    assert list(source) == ["text", "code", "math", "mixed"]
    known = next(questions("math", "train", 1_000_003))
    prompt, check = next(source["math"])
    assert prompt == known.prompt
    assert check(known.answer) == 1.0 and check("Answer: -12345") == 0.0
    assert check(f"<think>hm</think>{known.answer}") == 1.0
