"""Compiled fused models give the same tokens and probabilities in vLLM as in transformers."""

from __future__ import annotations

import pytest
from fused_engines import assert_equal, engine, greedy, prompts

from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("kind", ["shared", "mixed"])
def test_greedy_answers_are_those_of_transformers(request, kind):
    """In batches, with prefix caching and chunked prefills."""
    folder = request.getfixturevalue(f"{kind}_folder")
    with engine(folder, enforce_eager=False) as llm:
        answers = greedy(llm, prompts())
    assert_equal(UltraFuserForCausalLM.from_pretrained(folder), prompts(), answers)
