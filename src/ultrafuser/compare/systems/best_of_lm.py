"""Best of K behind lm-eval's interface: every specialist answers, and a rule or a judge chooses an answer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ultrafuser.compare.systems.router_model import REQUESTS_PER_CALL, SpecialistsLM, ask
from ultrafuser.errors import UltraFuserError
from ultrafuser.evaluate.judged.judge import Judge
from ultrafuser.evaluate.lm.chat import decode_chat
from ultrafuser.evaluate.lm.response_cache import ResponseCache

CHOICE = "choice"  # of the values in the store


class BestOfLM(SpecialistsLM):
    """Returns one of the answers of all language models.

    Without a judge it is the answer with the highest mean log-probability per token under the model that gave it. With
    a judge, this rule decides where the judge gives no verdict. The store records the choices, which `choices` counts.

    Source: table 5 of arXiv 2403.08281 (there by a reward model and by GPT-4o).
    """

    def __init__(
        self, lms: Mapping[str, LM], tokenizer: Any, judge: Judge | None = None, store: ResponseCache | None = None
    ) -> None:
        super().__init__(lms)
        self.tokenizer, self.judge, self.store = tokenizer, judge, store

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The chosen answer to each request.

        Raises:
            EndpointError: the judge did not answer some requests. Its other verdicts are kept.
        """
        results: list[str] = []
        for start in range(0, len(requests), REQUESTS_PER_CALL):
            batch = requests[start : start + REQUESTS_PER_CALL]
            answers = [[""] * len(self.lms) for _ in batch]
            for k, lm in enumerate(self.lms.values()):
                for i, answer in ask(lm, "generate_until", batch):
                    answers[i][k] = answer
            for request, texts, (k, rule) in zip(batch, answers, self._choose(batch, answers), strict=True):
                if self.store is not None:
                    key = hashlib.sha256(json.dumps(request.args, sort_keys=True).encode()).hexdigest()
                    self.store.put(CHOICE, key, {"of": list(self.lms)[k], "by": rule})
                self.cache_hook.add_partial("generate_until", request.args, texts[k])
                results.append(texts[k])
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not possible: there are no answers to choose from."""
        raise _no_answers("a log-likelihood task")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not possible: there are no answers to choose from."""
        raise _no_answers("rolling log-likelihood")

    def _choose(self, requests: Sequence[Instance], answers: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
        """For each request the index of the chosen answer, and the rule that chose it."""
        choices = {i: (0, "equal") for i, texts in enumerate(answers) if len(set(texts)) == 1}
        if self.judge is not None:
            open_requests = [i for i in range(len(requests)) if i not in choices]
            verdicts = self.judge.choose_all([(question_of(requests[i].args[0]), answers[i]) for i in open_requests])
            choices |= {i: (k, "judge") for i, k in zip(open_requests, verdicts, strict=True) if k is not None}
        rest = [i for i in range(len(requests)) if i not in choices]
        likeliest = self._likeliest([requests[i] for i in rest], [answers[i] for i in rest])
        choices |= {i: (k, "log_prob") for i, k in zip(rest, likeliest, strict=True)}
        return [choices[i] for i in range(len(requests))]

    def _likeliest(self, requests: Sequence[Instance], answers: Sequence[Sequence[str]]) -> list[int]:
        """The answer with the highest log-probability per token under its own model. An empty answer comes last."""
        scores = [[-float("inf")] * len(self.lms) for _ in requests]
        for k, lm in enumerate(self.lms.values()):
            rows = [i for i, texts in enumerate(answers) if texts[k]]
            scored = [
                Instance("loglikelihood", {}, (requests[i].args[0], answers[i][k]), j) for j, i in enumerate(rows)
            ]
            for j, (log_p, _) in ask(lm, "loglikelihood", scored):
                tokens = self.tokenizer.encode(answers[rows[j]][k], add_special_tokens=False)
                scores[rows[j]][k] = log_p / max(1, len(tokens))
        return [max(range(len(values)), key=values.__getitem__) for values in scores]


def _no_answers(task: str) -> UltraFuserError:
    return UltraFuserError(f"best-of-K chooses among answers, and {task} has none. Measure it on tasks that generate")


def question_of(context: str) -> str:
    """The question to show to a judge: the last one of a conversation, or the text."""
    messages = decode_chat(context)
    if messages is None:
        return context
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def choices(store: ResponseCache) -> dict[str, dict[str, int]]:
    """Count the answers chosen `of` each model, and `by` each rule: `judge`, `log_prob`, or `equal` answers."""
    records = list(store.values(CHOICE))
    return {field: dict(Counter(record[field] for record in records)) for field in ("of", "by")}
