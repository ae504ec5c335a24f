"""The steps of a comparison, run in the test process."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def in_process(monkeypatch) -> list[tuple[str, str]]:
    """Runs a comparison's steps in this process. The list names those that ran."""
    from ultrafuser.compare import system as process
    from ultrafuser.compare.recipe import load_compare_recipe
    from ultrafuser.errors import UltraFuserError

    steps = {"build": process.build, "measure": process.measure}
    ran: list[tuple[str, str]] = []

    def start(folder: Path, name: str, step: str) -> str | None:
        ran.append((step, name))
        recipe = load_compare_recipe(folder / process.RECIPE)
        try:
            steps[step](recipe, recipe.system(name))
        except UltraFuserError as error:
            return f"{type(error).__name__}: {error}"
        return None

    monkeypatch.setattr(process, "start", start)
    return ran
