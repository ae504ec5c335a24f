"""The chat template that lets vLLM write the prompts that a fused model was trained with."""

from __future__ import annotations

from typing import Any

from ultrafuser.data.templates import Renderer
from ultrafuser.errors import DataError, UltraFuserError

_SAMPLES = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add 2 and 3.\nThen stop."}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": " What is 15% of 80? "},
    ],
)
# The policies of `SystemPolicy` for system turns, as the beginning of a template.
_SYSTEM = {
    "keep": "",
    "drop": "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
    "merge": (
        "{% set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') %}"
        "{% set merged = namespace(turns=[], left=system != '') %}"
        "{% for turn in messages if turn.role != 'system' %}"
        "{% if merged.left and turn.role == 'user' %}{% set merged.left = false %}"
        "{% set merged.turns = merged.turns + [dict(turn, content=system ~ '\n\n' ~ turn.content)] %}"
        "{% else %}{% set merged.turns = merged.turns + [turn] %}{% endif %}{% endfor %}"
        "{% set messages = merged.turns %}"
    ),
}


def chat_template(renderer: Renderer) -> tuple[str, dict[str, Any]]:
    """The Jinja text and its further variables, with which vLLM writes the prompts of `renderer`.

    Raises:
        UltraFuserError: vLLM cannot write them: the specialists read different prompts, or no template gives theirs.
    """
    first = renderer.formats[0]
    template, variables = first.pinned_template()
    template = _SYSTEM[first.system] + template
    for messages in _SAMPLES:
        try:
            prompts = renderer.prompt(messages)
        except DataError:
            continue  # the template takes no system turn
        for chat_format, prompt in zip(renderer.formats, prompts, strict=True):
            if prompt != prompts[0]:
                raise UltraFuserError(
                    f"specialist {chat_format.name!r} reads other prompts than {first.name!r}: {_both(renderer, prompt, prompts[0])}. "
                    "vLLM gives all specialists the same tokens. Serve the model with --engine embedded, or fuse it with one "
                    "chat_template for all"
                )
        written = first.tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **variables,
        )
        if written != prompts[0]:
            raise UltraFuserError(
                f"the chat template of {first.name!r} does not write the prompts that the model was trained with: "
                f"{_both(renderer, written, prompts[0])}. Serve the model with --engine embedded"
            )
    return template, variables


def _both(renderer: Renderer, got: list[int], expected: list[int]) -> str:
    """Two prompts from a little before their first difference on."""
    same = next((i for i, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), -1)
    start = max(0, (min(len(got), len(expected)) if same < 0 else same) - 3)
    decode = renderer.tokenizer.decode
    return f"got {decode(got[start : start + 12])!r}, expected {decode(expected[start : start + 12])!r}"
