"""Several language models behind lm-eval's interface, of which one answers each request: what a router does."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ultrafuser.errors import UltraFuserError
from ultrafuser.evaluate.lm.chat import decode_chat, encode_chat

REQUESTS_PER_CALL = 32  # an evaluation that is killed asks at most so many again

Prompt = Sequence[Mapping[str, str]] | str


class RoutedLM(LM):
    """Each request is answered by the one language model that `choose` names for its prompt.

    Attributes:
        chosen: how many requests each one answered.
    """

    def __init__(self, lms: Mapping[str, LM], choose: Callable[[Prompt], str], *, remember: bool = True) -> None:
        """
        Args:
            lms: the specialists by name.
            choose: messages, or text where the prompt is no conversation -> a name; asked once for each prompt.
            remember: False asks it for every request, as a server would; for timing.
        """
        super().__init__()
        self.lms, self.choose, self.remember = dict(lms), choose, remember
        self.chosen: Counter[str] = Counter()
        self._names: dict[str, str] = {}

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which lm-eval caches requests."""
        return "ultrafuser-chat"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one string; every specialist renders it its own way."""
        return encode_chat(chat_history)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, each by the chosen specialist."""
        return self._ask("generate_until", requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihoods, each under the chosen specialist."""
        return self._ask("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """
        Raises:
            UltraFuserError: a whole text has no prompt by which to choose.
        """
        raise UltraFuserError("a router chooses by the prompt, and rolling log-likelihood has none; use another task")

    def _ask(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._name(request.args[0]), []).append(i)
        out: list[Any] = [None] * len(requests)
        for name, mine in groups.items():
            for j, result in ask(self.lms[name], kind, [requests[i] for i in mine]):
                out[mine[j]] = result
                self.chosen[name] += 1
                self.cache_hook.add_partial(kind, requests[mine[j]].args, result)
        return out

    def _name(self, context: str) -> str:
        """
        Raises:
            UltraFuserError: `choose` gave a name that no specialist has.
        """
        if context not in self._names or not self.remember:
            messages = decode_chat(context)
            name = self.choose(context if messages is None else messages)
            if name not in self.lms:
                raise UltraFuserError(f"the router chose {name!r}; there are: {', '.join(self.lms)}")
            self._names[context] = name
        return self._names[context]


def ask(lm: LM, kind: str, requests: Sequence[Instance]) -> Iterator[tuple[int, Any]]:
    """Have one language model answer, a few requests of similar length at a time: (index, result), in any order.

    Conversations are rendered the way that model wants them.
    """
    order = sorted(range(len(requests)), key=lambda i: -len(str(requests[i].args[0])))
    for start in range(0, len(order), REQUESTS_PER_CALL):
        part = order[start : start + REQUESTS_PER_CALL]
        yield from zip(part, getattr(lm, kind)([rendered(requests[i], lm) for i in part]), strict=True)


def rendered(request: Instance, lm: LM) -> Instance:
    """The request with its conversation as `lm` renders it; an answer that was begun is continued."""
    context, *rest = request.args
    messages = decode_chat(context)
    if messages is None:
        return request
    out = copy.copy(request)
    begun = messages[-1]["role"] == "assistant"
    out.arguments = (lm.apply_chat_template(messages, add_generation_prompt=not begun), *rest)
    return out
