"""What the commands share: their options, and how they print."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ultrafuser.progress import quiet_libraries

DTYPES = ("auto", "float32", "bfloat16", "float16")
Folder = Annotated[str, typer.Argument(help="A fused checkpoint: a folder or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text.")]
Dtype = Annotated[str, typer.Option(help="Precision of the specialists: auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, or another torch device.")]


def overrides_like(example: str) -> Any:
    """The argument KEY=VALUE, with an example that the command's recipes have."""
    return typer.Argument(help=f"Recipe fields to change, e.g. {example}.", metavar="KEY=VALUE")


Overrides = Annotated[list[str] | None, overrides_like("stages.gate.lr=2e-5 or stages=\\[joint]")]
Prompt = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What the user says; may be repeated.")]
System = Annotated[str | None, typer.Option(help="A system message before every prompt.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 takes the likeliest token.")]
TopP = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens with this total probability."),
]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers.")]


def echo(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # what takes long may come after it


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own bars and hints off the terminal; ours say what goes on."""
    quiet_libraries()
    yield
