"""From a fused model to token traces: which specialist led at each token of an answer, given or generated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ultrafuser.data.collate import collate_rows, prompt_inputs
from ultrafuser.data.schema import Row
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.progress import Progress


def answer(
    model: UltraFuserForCausalLM,
    renderer: Renderer,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    progress: Progress | None = None,
    **options: Any,
) -> list[list[int]]:
    """Generate the next answer of each conversation, as token ids without padding and end-of-sequence.

    Args:
        progress: counts the new tokens of the batch.
        options: of `generate`, e.g. `max_new_tokens`, `do_sample`, `temperature`, `streamer`.
    """
    inputs = prompt_inputs(renderer, conversations, model.device)
    if progress is not None:
        progress.start(f"tokens of {len(conversations)} answers", options["max_new_tokens"])
        options["stopping_criteria"] = StoppingCriteriaList([_StepCounter(progress)])
    out = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    if progress is not None:
        progress.finish()
    ends = model.end_token_ids
    return [list(takewhile(lambda token: token not in ends, ids)) for ids in out.tolist()]


class _StepCounter(StoppingCriteria):
    """Reports each step of `generate`, and stops nothing."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.progress.advance()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def trace_tokens(
    model: UltraFuserForCausalLM,
    renderer: Renderer,
    messages: Sequence[Mapping[str, str]],
    response: Sequence[int],
    *,
    domain: str | None = None,
    title: str = "",
) -> TokenTrace:
    """The weights at each token of one given response (figures 8 and 9 of the paper)."""
    prompts = renderer.prompt(messages)
    row = Rendered(
        row_id="",
        domain=domain or "",
        input_ids=tuple((*ids, *response[:-1]) for ids in prompts),
        response_index=tuple(tuple(range(len(ids) - 1, len(ids) - 1 + len(response))) for ids in prompts),
        labels=tuple(response),
    )
    question = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    return _trace(model, renderer, row, question, title)


def trace_rows(model: UltraFuserForCausalLM, renderer: Renderer, rows: Sequence[Row]) -> Iterator[TokenTrace]:
    """The weights over the answers in rows of a data set. Rows that do not fit are skipped."""
    for row in rows:
        rendered = renderer.render(row)
        if rendered is not None:
            with torch.no_grad():
                yield _trace(model, renderer, rendered, row.messages[-2][1], row.id)


def _trace(model: UltraFuserForCausalLM, renderer: Renderer, row: Rendered, prompt: str, title: str) -> TokenTrace:
    inputs = {key: value.to(model.device) for key, value in collate_rows([row]).items()}
    weights = model(**inputs, output_gate_weights=True).gate_weights[0]  # (R, K)
    return TokenTrace(
        tokens=pieces(renderer, row.labels),
        weights=weights.float().tolist(),
        specialists=list(model.config.names),
        prompt=prompt,
        domain=row.domain or None,
        title=title,
    )


def pieces(renderer: Renderer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character of several tokens belongs to the last of them."""
    out, read = [], ""
    for end in range(1, len(ids) + 1):
        text = renderer.tokenizer.decode(list(ids[:end]), skip_special_tokens=False)
        text = text.rstrip("�") if end < len(ids) else text
        out.append(text[len(read) :])
        read = text
    return out
