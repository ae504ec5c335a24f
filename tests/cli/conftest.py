"""The command line in this process, for every test of it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_results import Result
from tiny_models import shake_gate
from training_fixtures import TinyRun
from ultrafuser.cli import main as cli
from ultrafuser.specialists import fuse


@pytest.fixture(scope="session")
def folder(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused folder with a random gate."""
    model, tokenizer = fuse(tiny_run.recipe("unused"))
    shake_gate(model, scale=3.0)
    directory = tmp_path_factory.mktemp("cli") / "fused"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def columns() -> str:
    """Width of the terminal."""
    return "200"


@pytest.fixture
def run(monkeypatch, capsys, columns: str) -> Callable[..., Result]:
    """run("info", folder): the command line in this process, through its entry point."""

    def run(*words: Any, stdin: str | None = None) -> Result:
        monkeypatch.setattr(sys, "argv", ["ultrafuser", *map(str, words)])
        monkeypatch.setenv("COLUMNS", columns)
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        return Result(code, *capsys.readouterr())

    return run
