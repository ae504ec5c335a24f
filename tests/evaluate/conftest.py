"""The workshop of tiny specialists and rows for the tests of evaluation."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from workbench import Workshop, shared_workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Workshop:
    return shared_workshop(lambda: tmp_path_factory.mktemp("workshop"), tokenizer)
