"""What the tests of evaluation share: tiny specialists and rows, and steps of a comparison run in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from scripted_endpoint import scripted_endpoint
from workbench import Workshop, shared_workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Workshop:
    return shared_workshop(lambda: tmp_path_factory.mktemp("workshop"), tokenizer)


@pytest.fixture
def server():
    """A server of our own behind the OpenAI protocol."""
    pytest.importorskip("openai", reason="the openai extra is not installed")
    with scripted_endpoint() as server:
        yield server


@pytest.fixture
def in_process(monkeypatch) -> list[tuple[str, str]]:
    """A comparison's steps run here, not in processes of their own; which ones did."""
    from ultrafuser.errors import UltraFuserError
    from ultrafuser.evaluate import compare as module
    from ultrafuser.evaluate.system_build import build
    from ultrafuser.evaluate.system_measure import measure
    from ultrafuser.evaluate.workplace import Workplace

    steps = {module.BUILD: build, module.MEASURE: measure}
    ran: list[tuple[str, str]] = []

    def start_step(step: str, folder: Path, name: str) -> str | None:
        ran.append((step.rpartition("_")[2], name))
        try:
            steps[step](Workplace(folder), name)
        except UltraFuserError as error:
            return f"{type(error).__name__}: {error}"
        return None

    monkeypatch.setattr(module, "start_step", start_step)
    return ran
