"""The command line: the entry point and the commands. Heavy imports stay inside the commands."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer
from typer import Option

from ultrafuser import __version__
from ultrafuser.cli.chat import chat_command
from ultrafuser.cli.data import data_app
from ultrafuser.cli.ending import report_disk
from ultrafuser.cli.evaluate import compare_command, eval_command
from ultrafuser.cli.fuse import demo_command, fuse_command, info_command, train_command
from ultrafuser.cli.generate import generate_command, inspect_command
from ultrafuser.cli.plan import plan_command
from ultrafuser.cli.playground import playground_command
from ultrafuser.cli.push import push_command
from ultrafuser.cli.serve import serve_command
from ultrafuser.cli.synth import synth_app
from ultrafuser.errors import UltraFuserError
from ultrafuser.printing import echo, echo_error, show_traceback

app = typer.Typer(
    name="ultrafuser",
    help="Fuse specialised language models into one, token by token.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run a command. An error that the user can fix is one line and exit code 2. Any other error is a traceback."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the commands name text that is not UTF-8
    try:
        try:
            app()
        except OSError as error:
            report_disk(error)
    except UltraFuserError as error:
        if os.environ.get("ULTRAFUSER_DEBUG"):
            raise
        message = " ".join(str(error).split())  # messages of other libraries may have several lines
        echo_error(f"ultrafuser: error: {message}")
        sys.exit(2)
    except Exception:
        sys.excepthook = show_traceback
        raise


def _version(value: bool) -> None:
    if value:
        echo(f"ultrafuser {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


app.command(name="fuse")(fuse_command)
app.command(name="train")(train_command)
app.command(name="plan")(plan_command)
app.command(name="demo")(demo_command)
app.command(name="generate")(generate_command)
app.command(name="chat")(chat_command)
app.command(name="inspect")(inspect_command)
app.command(name="serve")(serve_command)
app.command(name="playground")(playground_command)
app.command(name="info")(info_command)
app.command(name="push")(push_command)
app.command(name="eval")(eval_command)
app.command(name="compare")(compare_command)
app.add_typer(data_app, name="data")
app.add_typer(synth_app, name="synth")
