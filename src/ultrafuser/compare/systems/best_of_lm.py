"""Best of K: every specialist answers, and one of the answers is chosen, by log-probability or by a judge."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ultrafuser.compare.systems.router_model import REQUESTS_PER_CALL, ask
from ultrafuser.errors import UltraFuserError
from ultrafuser.evaluate.judged.judge import Judge
from ultrafuser.evaluate.lm.chat import decode_chat, encode_chat
from ultrafuser.evaluate.lm.response_cache import ResponseCache

CHOICE = "choice"  # of the values in the store


class BestOfLM(LM):
    """Answers of all language models, of which one is given back.

    Without a judge it is the answer with the highest mean log-probability per token under the model that gave it; with
    one, that holds where the judge gives no verdict.

    Source: table 5 of arXiv 2403.08281 (there by a reward model and by GPT-4o).
    """

    def __init__(
        self, lms: Mapping[str, LM], tokenizer: Any, judge: Judge | None = None, store: ResponseCache | None = None
    ) -> None:
        """
        Args:
            lms: the specialists by name.
            tokenizer: theirs, to count the tokens of an answer.
            store: keeps which answer was chosen and by whom, see `choices`.
        """
        super().__init__()
        self.lms, self.tokenizer, self.judge, self.store = dict(lms), tokenizer, judge, store

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which lm-eval caches requests."""
        return "ultrafuser-chat"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one string; every specialist renders it its own way."""
        return encode_chat(chat_history)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The chosen answer to each request.

        Raises:
            EndpointError: the judge was not there for some; its verdicts so far are kept.
        """
        out: list[str] = []
        for start in range(0, len(requests), REQUESTS_PER_CALL):
            part = requests[start : start + REQUESTS_PER_CALL]
            answers = [[""] * len(self.lms) for _ in part]
            for k, lm in enumerate(self.lms.values()):
                for i, answer in ask(lm, "generate_until", part):
                    answers[i][k] = answer
            for request, own, (k, by) in zip(part, answers, self._choose(part, answers), strict=True):
                if self.store is not None:
                    self.store.put(CHOICE, _key(request), {"of": list(self.lms)[k], "by": by})
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

    def _choose(self, requests: Sequence[Instance], answers: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
        """For each request the index of the answer to give back, and who chose it."""
        chosen = {i: (0, "equal") for i, own in enumerate(answers) if len(set(own)) == 1}
        if self.judge is not None:
            asked = [i for i in range(len(requests)) if i not in chosen]
            verdicts = self.judge.choose_all([(question_of(requests[i].args[0]), answers[i]) for i in asked])
            chosen |= {i: (k, "judge") for i, k in zip(asked, verdicts, strict=True) if k is not None}
        rest = [i for i in range(len(requests)) if i not in chosen]
        by_log_prob = self._by_log_prob([requests[i] for i in rest], [answers[i] for i in rest])
        chosen |= {i: (k, "log_prob") for i, k in zip(rest, by_log_prob, strict=True)}
        return [chosen[i] for i in range(len(requests))]

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


def choices(store: ResponseCache) -> dict[str, dict[str, int]]:
    """How many answers were chosen `of` each model, and `by` whom: `judge`, `log_prob`, or neither where all were equal."""
    found = list(store.values(CHOICE))
    return {part: dict(Counter(own[part] for own in found)) for part in ("of", "by")}


def _key(request: Instance) -> str:
    return hashlib.sha256(json.dumps(request.args, sort_keys=True).encode()).hexdigest()
