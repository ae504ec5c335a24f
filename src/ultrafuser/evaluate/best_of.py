"""Best of K: every specialist answers, and one of the answers is chosen, by log-probability or by a judge."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ultrafuser.errors import UltraFuserError
from ultrafuser.evaluate.chat import decode_chat, encode_chat
from ultrafuser.evaluate.routed_lm import REQUESTS_PER_CALL, ask


class Judge(Protocol):
    """Whoever chooses among answers."""

    def choose(self, question: str, answers: Sequence[str]) -> int | None:
        """The index of the best answer; None where there is no verdict."""
        ...


class BestOfLM(LM):
    """Answers of all language models, of which one is given back.

    Without a judge it is the answer with the highest mean log-probability per token under the model that gave it. With
    one, the judge sees the answers in an order drawn for each question; where it gives no verdict, the
    log-probability decides.

    Attributes:
        chosen: how often each model's answer was given back.
        judged, fallbacks: questions that the judge decided, and that it did not.

    Source: table 5 of arXiv 2403.08281 (there by a reward model and by GPT-4o).
    """

    def __init__(self, lms: Mapping[str, LM], tokenizer: Any, judge: Judge | None = None, seed: int = 0) -> None:
        """
        Args:
            lms: the specialists by name.
            tokenizer: theirs, to count the tokens of an answer.
        """
        super().__init__()
        self.lms, self.tokenizer, self.judge, self.seed = dict(lms), tokenizer, judge, seed
        self.chosen: Counter[str] = Counter()
        self.judged = self.fallbacks = 0

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which lm-eval caches requests."""
        return "ultrafuser-chat"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one string; every specialist renders it its own way."""
        return encode_chat(chat_history)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The chosen answer to each request."""
        out: list[str] = []
        for start in range(0, len(requests), REQUESTS_PER_CALL):
            part = requests[start : start + REQUESTS_PER_CALL]
            answers = [[""] * len(self.lms) for _ in part]
            for k, lm in enumerate(self.lms.values()):
                for i, answer in ask(lm, "generate_until", part):
                    answers[i][k] = answer
            for request, own, k in zip(part, answers, self._choose(part, answers), strict=True):
                self.chosen[list(self.lms)[k]] += 1
                self.cache_hook.add_partial("generate_until", request.args, own[k])
                out.append(own[k])
        return out

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """
        Raises:
            UltraFuserError: there are no answers to choose from.
        """
        raise UltraFuserError(
            "best-of-K chooses among answers, and a log-likelihood task has none; measure it on tasks that generate"
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """
        Raises:
            UltraFuserError: there are no answers to choose from.
        """
        raise UltraFuserError(
            "best-of-K chooses among answers, and rolling log-likelihood has none; measure it on tasks that generate"
        )

    def _choose(self, requests: Sequence[Instance], answers: Sequence[Sequence[str]]) -> list[int]:
        """For each request the index of the answer to give back."""
        chosen: list[int | None] = [0 if len(set(own)) == 1 else None for own in answers]
        if self.judge is not None:
            for i, request in enumerate(requests):
                if chosen[i] is None:
                    chosen[i] = self._verdict(self.judge, question_of(request.args[0]), answers[i])
        open_ones = [i for i, k in enumerate(chosen) if k is None]
        by_log_prob = self._by_log_prob([requests[i] for i in open_ones], [answers[i] for i in open_ones])
        for i, k in zip(open_ones, by_log_prob, strict=True):
            chosen[i] = k
        return [k or 0 for k in chosen]

    def _verdict(self, judge: Judge, question: str, answers: Sequence[str]) -> int | None:
        order = list(range(len(answers)))
        random.Random(f"{self.seed}/{question}").shuffle(order)
        place = judge.choose(question, [answers[k] for k in order])
        if place is None or not 0 <= place < len(order):
            self.fallbacks += 1
            return None
        self.judged += 1
        return order[place]

    def _by_log_prob(self, requests: Sequence[Instance], answers: Sequence[Sequence[str]]) -> list[int]:
        """The answer that its own model finds likeliest, per token; an empty answer comes last."""
        scores = [[-float("inf")] * len(self.lms) for _ in requests]
        for k, lm in enumerate(self.lms.values()):
            mine = [i for i, own in enumerate(answers) if own[k]]
            asked = [Instance("loglikelihood", {}, (requests[i].args[0], answers[i][k]), j) for j, i in enumerate(mine)]
            for j, (log_p, _) in ask(lm, "loglikelihood", asked):
                scores[mine[j]][k] = log_p / max(1, self._num_tokens(answers[mine[j]][k]))
        return [max(range(len(own)), key=own.__getitem__) for own in scores]

    def _num_tokens(self, answer: str) -> int:
        return len(self.tokenizer.encode(answer, add_special_tokens=False))


def question_of(context: str) -> str:
    """What a judge is shown: the last question of a conversation, or the text."""
    messages = decode_chat(context)
    if messages is None:
        return context
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
