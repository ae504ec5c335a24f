"""The extension fields of a request to vLLM's server, and the request that vLLM gets in its place."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ultrafuser.serve.api_errors import APIError
from ultrafuser.serve.protocol import HARMLESS_FIELDS, MAX_SPECIALIST_LOGPROBS
from ultrafuser.vllm_plugin.gate_records import KEY, MASK, TOP

EXTENSION_FIELDS = ("gate_weights", "specialists", "specialist_logprobs")


@dataclass(frozen=True)
class AnswerPlan:
    """What the answer to one request needs beyond what vLLM gives.

    Attributes:
        key: under which the workers collect its gate weights. None: it needs none.
        gate_weights: whether each token comes with its weights.
        num_top: how many of each specialist's most likely tokens come with them.
        samples, prompts: from the request. Choice i is sample `i % samples` of prompt `i // samples`.
        adds_token_ids: whether vLLM gives token ids that the client did not ask for.
        keeps_special_tokens: whether special tokens are part of the texts.
    """

    key: str | None
    gate_weights: bool
    num_top: int
    samples: int
    prompts: int
    adds_token_ids: bool
    keeps_special_tokens: bool

    @property
    def num_choices(self) -> int:
        return self.samples * self.prompts

    def choice(self, index: int) -> str:
        """A choice as the workers name it, see `gate_records.choice_of`."""
        return f"{index // self.samples}:{index % self.samples}"


def check_fields(body: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises APIError: a field that neither vLLM nor this extension knows. vLLM would ignore it."""
    accepted = {*known, *EXTENSION_FIELDS, *HARMLESS_FIELDS}
    for field, value in body.items():
        if value is not None and field not in accepted:
            message = f"{field} is unknown here, and this server ignores no fields. Leave it out"
            raise APIError(400, message, param=field, code="unknown_parameter")


def prepare(
    body: Mapping[str, Any], names: Sequence[str], always_usage: bool = False
) -> tuple[dict[str, Any], AnswerPlan]:
    """The body for vLLM, and what its answer needs.

    Args:
        always_usage: whether vLLM streams the usage to clients that do not ask for it.

    Raises:
        APIError: an extension field with a wrong value, or next to an option that it does not work with.
    """
    extended = {field: body[field] for field in EXTENSION_FIELDS if body.get(field) is not None}
    plain = {field: value for field, value in body.items() if field not in EXTENSION_FIELDS}
    gate_weights, num_top = _gate_weights(extended)
    mask = _mask(extended.get("specialists"), names)
    stream, echo, beams = (bool(_typed(body, field, bool)) for field in ("stream", "echo", "use_beam_search"))
    if (extended.get("gate_weights") or mask) and beams:
        raise APIError(
            400, "use_beam_search cannot be combined with gate_weights or specialists", param="use_beam_search"
        )
    if gate_weights and echo:
        raise APIError(
            400, "echo cannot be combined with gate_weights: prompts have no gate weights here", param="echo"
        )
    if mask and (body.get("prompt_logprobs") is not None or (echo and body.get("logprobs") is not None)):
        raise APIError(400, "the log-probabilities of prompts cannot be combined with specialists", param="specialists")
    samples = max(1, _typed(body, "n", int) or 1)  # vLLM refuses numbers below 1
    prompts = _num_prompts(body.get("prompt"))
    # Without token ids, the usage tells how many tokens a lone choice has. vLLM leaves out an echo next to token ids.
    needs_ids = gate_weights or (samples * prompts > 1 and not echo)
    has_usage = not stream or always_usage or _streams_usage(body)
    needs_weights = gate_weights or (has_usage and (needs_ids or samples * prompts == 1))
    plan = AnswerPlan(
        key=uuid.uuid4().hex if needs_weights and not beams else None,
        gate_weights=gate_weights,
        num_top=num_top,
        samples=samples,
        prompts=prompts,
        adds_token_ids=needs_weights and needs_ids and body.get("return_token_ids") is not True,
        keeps_special_tokens=_typed(body, "skip_special_tokens", bool) is False,
    )
    if plan.adds_token_ids:
        plain["return_token_ids"] = True
    if samples > 1 and _is_greedy(body.get("temperature")):
        plain |= {"temperature": 1.0, "top_k": 1}  # the same tokens. vLLM refuses several greedy choices
    if _continues(body):
        plain |= {"add_generation_prompt": False, "continue_final_message": True}
    return _with_arguments(plain, plan, mask), plan


def _typed(body: Mapping[str, Any], field: str, kind: type) -> Any:
    """A field that decides how the answer is read. vLLM would also take `"true"` or `"2"`."""
    value = body.get(field)
    if value is not None and type(value) is not kind:
        expected = "true or false" if kind is bool else "a whole number"
        raise APIError(400, f"{field} is {value!r}, expected {expected}", param=field)
    return value


def _gate_weights(extended: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether weights are wanted, and how many of each specialist's most likely tokens."""
    wanted = _typed(extended, "gate_weights", bool) or False
    num_top = extended.get("specialist_logprobs", 0)
    if type(num_top) is not int or not 0 <= num_top <= MAX_SPECIALIST_LOGPROBS:
        raise APIError(
            400,
            f"specialist_logprobs is {num_top!r}, expected a number from 0 to {MAX_SPECIALIST_LOGPROBS}",
            param="specialist_logprobs",
        )
    if num_top and not wanted:
        raise APIError(
            400, 'specialist_logprobs comes with gate weights. Add "gate_weights": true', param="specialist_logprobs"
        )
    return wanted, num_top


def _mask(specialists: Any, names: Sequence[str]) -> list[int] | None:
    if specialists is None:
        return None
    if not isinstance(specialists, list) or not all(isinstance(name, str) for name in specialists):
        raise APIError(400, f"specialists is {specialists!r}, expected a list of names", param="specialists")
    if not specialists:
        raise APIError(
            400,
            f"specialists is empty, so no specialist is left. Expected some of: {', '.join(names)}",
            param="specialists",
        )
    if unknown := [name for name in specialists if name not in names]:
        raise APIError(
            400,
            f"there is no specialist {unknown[0][:60]!r}. Expected some of: {', '.join(names)}",
            param="specialists",
        )
    return None if set(specialists) == set(names) else [int(name in specialists) for name in names]


def _is_greedy(temperature: Any) -> bool:
    """Whether vLLM takes the most likely tokens at this temperature."""
    return isinstance(temperature, (int, float)) and 0 <= temperature < 1e-5


def _num_prompts(prompt: Any) -> int:
    """A text or a list of token ids is one prompt."""
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def _continues(body: Mapping[str, Any]) -> bool:
    """Whether the last message is the beginning of the answer, as in all of this project. vLLM has to be told."""
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    is_set = body.get("add_generation_prompt") is not None or body.get("continue_final_message") is not None
    return isinstance(last, dict) and last.get("role") == "assistant" and not is_set


def _streams_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def _with_arguments(plain: dict[str, Any], plan: AnswerPlan, mask: list[int] | None) -> dict[str, Any]:
    """The body with what the workers are told. See `gate_records`."""
    arguments = plain.get("vllm_xargs") or {}
    if not isinstance(arguments, dict):
        return plain  # vLLM tells what is wrong
    if reserved := sorted({KEY, MASK, TOP} & arguments.keys()):
        raise APIError(400, f"vllm_xargs cannot set {reserved[0]!r}, which belongs to the server", param="vllm_xargs")
    added = {KEY: plan.key, MASK: mask, TOP: plan.num_top or None}
    arguments = {**arguments, **{name: value for name, value in added.items() if value is not None}}
    return {**plain, "vllm_xargs": arguments} if arguments else plain
