"""The steps of a comparison, run in the test process."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def in_process(monkeypatch) -> list[tuple[str, str]]:
    """A comparison's steps run here, not in processes of their own; which ones did."""
    from ultrafuser.compare import run as module
    from ultrafuser.compare.build import build
    from ultrafuser.compare.measure import measure
    from ultrafuser.compare.workspace import Workspace
    from ultrafuser.errors import UltraFuserError

    steps = {module.BUILD: build, module.MEASURE: measure}
    ran: list[tuple[str, str]] = []

    def start_step(step: str, folder: Path, name: str) -> str | None:
        ran.append((step.rpartition(".")[2], name))
        try:
            steps[step](Workspace(folder), name)
        except UltraFuserError as error:
            return f"{type(error).__name__}: {error}"
        return None

    monkeypatch.setattr(module, "start_step", start_step)
    return ran
