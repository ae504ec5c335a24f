"""Requests reach the specialist that was chosen for them, and answers come back in order. Best-of-K gives the best one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ultrafuser.compare.systems.best_of_lm import BestOfLM, choices
from ultrafuser.compare.systems.router_model import REQUESTS_PER_CALL, RoutedLM, ask
from ultrafuser.errors import UltraFuserError
from ultrafuser.evaluate.lm.chat import decode_chat, encode_chat
from ultrafuser.evaluate.lm.response_cache import ResponseCache


class Specialist(LM):
    """Answers with its name and what it was asked. Renders conversations in brackets of its own, or not at all."""

    def __init__(self, name: str, brackets: str | None = None, log_p: float = -1.0, says: str | None = None) -> None:
        super().__init__()
        self.name, self.brackets, self.log_p, self.says = name, brackets, log_p, says
        self.calls: list[list[tuple[Any, ...]]] = []

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.brackets is None:
            return encode_chat(chat_history)
        text = self.brackets.join(message["content"] for message in chat_history)
        return f"{self.brackets}{text}{self.brackets if add_generation_prompt else ''}"

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        self.calls.append([request.args for request in requests])
        return [self.says if self.says is not None else f"{self.name}: {request.args[0]}" for request in requests]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        self.calls.append([request.args for request in requests])
        return [(self.log_p * len(request.args[1]), self.name == "a") for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        raise NotImplementedError


class Hook:
    def __init__(self) -> None:
        self.kept: list[tuple[str, tuple[Any, ...], Any]] = []

    def add_partial(self, kind: str, args: tuple[Any, ...], result: Any) -> None:
        self.kept.append((kind, args, result))


class Letters:
    """A tokenizer of which every letter is a token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return list(range(len(text)))


def requests(contexts: Sequence[str], kind: str = "generate_until", rest: Any = None) -> list[Instance]:
    return [Instance(kind, {}, (c, rest if rest is not None else {"until": []}), i) for i, c in enumerate(contexts)]


def by_length(prompt: Any) -> str:
    return "ab"[len(prompt if isinstance(prompt, str) else prompt[-1]["content"]) % 2]


def test_every_request_is_answered_by_the_chosen_specialist_in_order():
    routed = RoutedLM({"a": Specialist("a"), "b": Specialist("b")}, by_length)
    contexts = ["x" * n for n in (1, 2, 3, 4, 5, 70, 3)]
    assert routed.generate_until(requests(contexts)) == [f"{by_length(c)}: {c}" for c in contexts]
    likelihoods = routed.loglikelihood(requests(contexts, "loglikelihood", "yes"))
    assert likelihoods == [(-3.0, by_length(c) == "a") for c in contexts]


def test_each_finished_call_is_stored_under_the_arguments_of_its_request():
    routed = RoutedLM({"a": Specialist("a", "|"), "b": Specialist("b", "#")}, by_length)
    routed.set_cache_hook(hook := Hook())
    instances = requests([encode_chat([{"role": "user", "content": "x" * n}]) for n in (1, 2, 2)])
    answers = routed.generate_until(instances)
    key = lambda instance: (instance[1][0], instance[2])  # noqa: E731
    assert sorted(hook.kept, key=key) == sorted(
        [("generate_until", instance.args, answer) for instance, answer in zip(instances, answers, strict=True)],
        key=key,
    )


def test_a_run_that_dies_has_stored_what_was_answered():
    class Dies(Specialist):
        def generate_until(self, requests: Sequence[Instance]) -> list[str]:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().generate_until(requests)

    routed = RoutedLM({"a": Dies("a"), "b": Specialist("b")}, lambda prompt: "a")
    routed.set_cache_hook(hook := Hook())
    with pytest.raises(KeyboardInterrupt):
        routed.generate_until(requests([f"{i}" for i in range(5 * REQUESTS_PER_CALL)]))
    assert len(hook.kept) == 2 * REQUESTS_PER_CALL


def test_each_specialist_renders_the_conversation_with_its_template():
    chat = [{"role": "user", "content": "one"}]
    begun = [*chat, {"role": "assistant", "content": "So"}]
    plain, untemplated = Specialist("a", "|"), Specialist("b")
    for messages, expected in ((chat, "|one|"), (begun, "|one|So")):
        [(_, answer)] = ask(plain, "generate_until", requests([encode_chat(messages)]))
        assert answer == f"a: {expected}"
        [(_, answer)] = ask(untemplated, "generate_until", requests([encode_chat(messages)]))
        assert decode_chat(answer.removeprefix("b: ")) == messages
    [(_, answer)] = ask(plain, "generate_until", requests(["just text"]))
    assert answer == "a: just text"


def test_a_prompt_is_routed_once_and_by_its_messages():
    prompts = []

    def choose(prompt: Any) -> str:
        prompts.append(prompt)
        return "a"

    routed = RoutedLM({"a": Specialist("a")}, choose)
    chat = [{"role": "user", "content": "one"}]
    assert decode_chat(routed.apply_chat_template(chat)) == chat
    routed.loglikelihood(requests([encode_chat(chat)] * 3, "loglikelihood", "yes"))
    routed.generate_until(requests([encode_chat(chat), "text"]))
    assert prompts == [chat, "text"]


def test_a_router_that_names_no_specialist():
    routed = RoutedLM({"a": Specialist("a")}, lambda prompt: "z")
    with pytest.raises(UltraFuserError, match="the router chose 'z'. There are: a"):
        routed.generate_until(requests(["x"]))
    with pytest.raises(UltraFuserError, match="a router chooses by the prompt, and rolling"):
        routed.loglikelihood_rolling([])


# ---------------------------------------------------------------- best of K


class Verdict:
    def __init__(self, *verdicts: Any) -> None:
        self.verdicts, self.items = list(verdicts), []

    def choose_all(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[int | None]:
        self.items += items
        verdicts = [self.verdicts.pop(0) for _ in items]
        return [None if v is None else list(answers).index(v) for v, (_, answers) in zip(verdicts, items, strict=True)]


def test_the_likeliest_answer_per_token_wins(tmp_path: Path):
    """Not the shortest one: `b` is likelier per token, though its whole answer is less likely."""
    store = ResponseCache(tmp_path / "answers.sqlite", "best")
    lms = {"a": Specialist("a", log_p=-2.0, says="xx"), "b": Specialist("b", log_p=-1.0, says="yyyyyy")}
    best = BestOfLM(lms, Letters(), store=store)
    best.set_cache_hook(hook := Hook())
    instances = requests(["one", "two"])
    assert best.generate_until(instances) == ["yyyyyy", "yyyyyy"]
    assert choices(store) == {"of": {"b": 2}, "by": {"log_prob": 2}}
    assert hook.kept == [("generate_until", instance.args, "yyyyyy") for instance in instances]


def test_an_empty_answer_comes_last_and_equal_answers_need_no_choice():
    lms = {"a": Specialist("a", log_p=-9.0, says=""), "b": Specialist("b", log_p=-9.0, says="y")}
    assert BestOfLM(lms, Letters()).generate_until(requests(["one"])) == ["y"]
    same = {"a": Specialist("a", says="y"), "b": Specialist("b", says="y")}
    judge = Verdict()
    assert BestOfLM(same, Letters(), judge).generate_until(requests(["one"])) == ["y"]
    assert not judge.items and len(same["a"].calls) == 1
    empty = {"a": Specialist("a", says=""), "b": Specialist("b", says="")}
    assert BestOfLM(empty, Letters()).generate_until(requests(["one"])) == [""]


def test_a_judge_decides_and_the_log_probability_where_it_does_not(tmp_path: Path):
    lms = {"a": Specialist("a", "|", log_p=-1.0, says="xx"), "b": Specialist("b", log_p=-2.0, says="yy")}
    judge, store = Verdict("yy", None, "xx", None), ResponseCache(tmp_path / "answers.sqlite", "best")
    best = BestOfLM(lms, Letters(), judge, store)
    chat = encode_chat([{"role": "user", "content": "one"}, {"role": "assistant", "content": "So"}])
    assert best.generate_until(requests([chat, "two", "three", "four"])) == ["yy", "xx", "xx", "xx"]
    assert choices(store) == {"of": {"b": 1, "a": 3}, "by": {"judge": 2, "log_prob": 2}}
    assert [question for question, _ in judge.items] == ["one", "two", "three", "four"]


def test_log_likelihoods_have_no_best_of():
    best = BestOfLM({"a": Specialist("a")}, Letters())
    with pytest.raises(UltraFuserError, match="chooses among answers, and a log-likelihood task has none"):
        best.loglikelihood(requests(["x"], "loglikelihood", "y"))
    with pytest.raises(UltraFuserError, match="rolling log-likelihood has none"):
        best.loglikelihood_rolling([])
