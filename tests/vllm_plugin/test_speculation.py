"""vLLM's speculation leaves the answers of a fused model as they are."""

from __future__ import annotations

import pytest
from fused_engines import assert_equal, engine, greedy, prompts

from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM

pytestmark = pytest.mark.vllm


def test_a_saved_specialist_drafts(shared_folder, folders, tokenizer):
    """The answers are exact, and some of the drafted tokens are accepted."""
    fused = UltraFuserForCausalLM.from_pretrained(shared_folder)
    fused.specialist("math").save_pretrained(folders / "drafter")
    tokenizer.save_pretrained(folders / "drafter")
    settings = {"method": "draft_model", "model": str(folders / "drafter"), "num_speculative_tokens": 3}
    with engine(shared_folder, speculative_config=settings, disable_log_stats=False) as llm:
        answers = greedy(llm, prompts(6), 32)
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert_equal(fused, prompts(6), answers)
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0
