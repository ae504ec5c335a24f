"""The workshop of tiny specialists and rows for the tests of training."""

from __future__ import annotations

import gc

import pytest
from transformers import PreTrainedTokenizerFast

from workbench import Workshop, shared_workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Workshop:
    return shared_workshop(lambda: tmp_path_factory.mktemp("workshop"), tokenizer)


@pytest.fixture(scope="session", autouse=True)
def quick_collection() -> None:
    """Each training ends with a full garbage collection; not looking at all of transformers makes it three times faster."""
    gc.collect()
    gc.freeze()
