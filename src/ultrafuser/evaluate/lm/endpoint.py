"""A model behind an OpenAI-compatible endpoint for lm-eval. It answers chats, but gives no log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from ultrafuser.endpoint.client import Endpoint
from ultrafuser.endpoint.messages import Reply, Request
from ultrafuser.errors import EndpointError, RequestError, UltraFuserError
from ultrafuser.evaluate.lm.chat import decode_chat, encode_chat

MAX_STOPS = 4  # the API takes no more. The text is truncated here at the others
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "seed"}


class EndpointLM(LM):
    """An lm-eval model that asks for chat completions. A text that is not a chat becomes one user message."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self.endpoint = endpoint

    @property
    def tokenizer_name(self) -> str:
        recipe = self.endpoint.recipe
        return f"{recipe.model}@{recipe.base_url}".replace("/", "__")  # as lm-eval does, for cache files

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return encode_chat(chat_history)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, up to its stop strings. A filtered answer is empty.

        Raises:
            EndpointError: the endpoint cannot be used, or did not serve some requests. Answers were reported to the
                cache hook as they came.
        """
        outgoing = [self._request(request) for request in requests]
        answers: list[Any] = [None] * len(requests)
        failed: list[RequestError] = []
        try:
            for i, outcome in self.endpoint.ask_all(outgoing):
                if isinstance(outcome, Reply):
                    stops = [outcome.text.find(stop) for stop in _options(requests[i])["until"]]
                    answers[i] = outcome.text[: min((stop for stop in stops if stop >= 0), default=None)]
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                else:
                    failed.append(outcome)
        except EndpointError as error:
            raise EndpointError(f"{error} ({_count(answers)})") from error
        if failed:
            raise EndpointError(f"{failed[0]} ({len(failed)} of the requests failed. {_count(answers)})") from failed[0]
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not possible: an endpoint scores only text that it wrote itself."""
        raise self._no_log_probs(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not possible: an endpoint scores only text that it wrote itself."""
        raise self._no_log_probs(requests)

    def _no_log_probs(self, requests: list[Instance]) -> UltraFuserError:
        task = f"task {requests[0].task_name!r}" if requests and requests[0].task_name else "this task"
        return UltraFuserError(
            f"{self.endpoint.name}: {task} compares the log-probabilities of given answers, which chat endpoints do not "
            "give. Choose tasks that let the model write: gsm8k, math, sat_math_cot, aqua_cot, humaneval, mbpp, "
            "alpaca_eval, mt_bench"
        )

    def _request(self, request: Instance) -> Request:
        context = request.args[0]
        messages = decode_chat(context) or [{"role": "user", "content": context}]
        options = _options(request)
        fields: dict[str, Any] = {
            "temperature": options["temperature"] if options["do_sample"] else 0.0,
            "stop": options["until"][:MAX_STOPS] or None,
            "top_p": options.get("top_p") if options["do_sample"] else None,
            "seed": options.get("seed"),
        }
        if options["max_gen_toks"]:
            fields["max_tokens"] = options["max_gen_toks"]
        if messages[-1]["role"] == "assistant":  # a prefix to continue: vLLM and SGLang can, others refuse
            fields |= {"add_generation_prompt": False, "continue_final_message": True}
        return Request(messages, fields)


def _options(request: Instance) -> dict[str, Any]:
    """lm-eval's generation arguments, checked. max_gen_toks is 0 where there is no limit."""
    arguments: Mapping[str, Any] = request.args[1]
    options: dict[str, Any] = {"temperature": 1.0, **normalize_gen_kwargs(dict(arguments), 0)}
    if unknown := sorted(set(options) - _KNOWN):
        raise UltraFuserError(
            f"task {request.task_name!r}: the generation option {unknown[0]!r} does not exist for a chat endpoint. "
            f"Known: {', '.join(sorted(_KNOWN))}. Remove it from the task's generation_kwargs"
        )
    options["until"] = [stop for stop in options["until"] if stop]
    return options


def _count(answers: list[Any]) -> str:
    count = f"{sum(answer is not None for answer in answers)} of {len(answers)}"
    return f"{count} requests were answered. A run with a response cache asks only the others again"
