"""Options that several commands share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ultrafuser.errors import DataError, MissingExtraError, RecipeError
from ultrafuser.progress import ConsoleProgress, Progress, quiet_libraries

if TYPE_CHECKING:
    from ultrafuser.data.sources import RowReader

SERVER_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
DTYPES = ("auto", "float32", "bfloat16", "float16")
Folder = Annotated[str, Argument(help="A fused checkpoint: a folder or a hub id.")]
Json = Annotated[bool, Option("--json", help="Print JSON on stdout instead of text.")]
Dtype = Annotated[str, Option(help="Precision of the specialists: auto, float32, bfloat16 or float16.")]
TrustRemoteCode = Annotated[
    bool, Option("--trust-remote-code", help="Run the Python code in the repositories of the models. Read it first.")
]
TRUST = ["trust_remote_code=true"]  # the same as an override of a recipe
Device = Annotated[str, Option(help="Torch device: cpu, cuda or another one. auto: a GPU if there is one.")]


def overrides_like(example: str) -> Any:
    """The argument KEY=VALUE, with an example for the recipes of the command."""
    return Argument(help=f"Change fields of the recipe, e.g. {example}.", metavar="KEY=VALUE")


Overrides = Annotated[list[str] | None, overrides_like("stages.gate.lr=2e-5 or stages=\\[joint]")]
Prompt = Annotated[
    list[str] | None, Option("--prompt", "-p", help="User message. Repeat the option for several prompts.")
]
System = Annotated[str | None, Option(help="System message before every prompt.")]
MaxNewTokens = Annotated[int, Option(min=1, help="Generate at most this many tokens.")]
Temperature = Annotated[float, Option(min=0.0, help="Sampling temperature. 0: always take the most likely token.")]
TopP = Annotated[
    float, Option(min=0.0, max=1.0, help="Sample from the most likely tokens with this total probability.")
]
OnBadRow = Annotated[
    str,
    Option(help="What to do with a row that cannot be used: stop, or skip it. Skipped rows are counted and listed."),
]
Seed = Annotated[int, Option(help="Seed of the random numbers.")]


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """
    Raises:
        RecipeError: a value that the option does not take.
    """
    if value not in choices:
        raise RecipeError(f"{option} {value!r}: expected one of {', '.join(choices)}")


def check_packages(packages: Mapping[str, str], extra: str, command: str) -> None:
    """
    Args:
        packages: what pip calls each module.

    Raises:
        MissingExtraError: a module is not installed.
    """
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, extra, command)


def check_characters(texts: Mapping[str, str | None]) -> None:
    """Check texts of the user before a model is loaded.

    Raises:
        DataError: a text is not UTF-8.
    """
    from ultrafuser.data.json_text import has_lone_surrogate

    for name, text in texts.items():
        if text and has_lone_surrogate(text):
            raise DataError(f"{name} {text!a:.80}: not UTF-8, or half of a character. Remove it")


def load_folder(folder: str, dtype: str, device: str, seed: int | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """The fused model and the renderer of its prompts.

    Args:
        seed: of torch and its neighbours. None: they stay as they are.

    Raises:
        RecipeError: no such precision.
        CheckpointError: no such folder, or one that cannot be loaded.
    """
    quiet_libraries()
    from transformers import set_seed

    from ultrafuser.specialists import load, pick_device

    check_choice("--dtype", dtype, DTYPES)
    if seed is not None:
        set_seed(seed)
    with ConsoleProgress().waiting(f"loading {folder}"):
        return load(folder, dtype=dtype, device_map=pick_device(device), trust_remote_code=trust_remote_code)


def row_reader(on_bad_row: str) -> RowReader:
    """
    Raises:
        RecipeError: neither stop nor skip.
    """
    from ultrafuser.data.sources import RowReader

    check_choice("--on-bad-row", on_bad_row, ("stop", "skip"))
    return RowReader("skip" if on_bad_row == "skip" else "stop")


def report_reading(reader: RowReader, progress: Progress, output: Path | None = None) -> None:
    """Show what was not used of the rows, and list skipped rows in `OUTPUT.bad_rows`."""
    for note in reader.notes():
        progress.log(note)
    if output is not None:
        bad_rows = output.with_name(f"{output.name}.bad_rows")
        reader.write_bad_rows(bad_rows)
        if reader.bad_rows:
            progress.log(f"skipped rows: {bad_rows}")
