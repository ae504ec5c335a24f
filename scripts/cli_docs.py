"""Write docs/cli.md from the live command line. With --check, fail if it is out of date."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.main import get_command
from typer.models import ArgumentInfo

from ultrafuser.cli.main import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
KINDS = {str: "text", int: "whole number", float: "number", Path: "path", bool: "flag"}
HEAD = """# Command line

<!-- written by scripts/cli_docs.py. Edit src/ultrafuser/cli/*.py instead -->

| Command | What it does |
|---|---|
{summary}

Every command takes `-h` or `--help`. `ultrafuser --version` prints the version, and `ultrafuser --install-completion`
sets up completion in your shell.

- Results go to stdout, progress and messages to stderr.
- The exit code is 0, or 2 with one line on stderr if the input is invalid. Set `ULTRAFUSER_DEBUG=1` for a traceback.
- `KEY=VALUE` changes a field of the recipe, see [Recipes](recipes.md#overrides).
"""


@dataclass(frozen=True)
class Parameter:
    """One argument or option as the page shows it."""

    names: tuple[str, ...]
    is_argument: bool
    kind: str
    default: str
    help: str
    required: bool
    repeated: bool


def commands() -> dict[str, Callable[..., Any]]:
    """The functions behind the commands, by name (`data stats` for one of a group), in the order of the command line."""
    functions = {name: callback for name, callback in _registered(app)}
    for group in app.registered_groups:
        functions |= {f"{group.name} {name}": callback for name, callback in _registered(group.typer_instance)}
    return functions


def _registered(typer_app: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    for info in typer_app.registered_commands:
        if info.callback is not None:
            yield info.name or info.callback.__name__, info.callback


def parameters(command: str) -> Iterator[Parameter]:
    """The arguments and options of a command: names from typer, the rest from the signature of the function."""
    callback = commands()[command]
    node: Any = get_command(app)
    for word in command.split():
        node = node.commands[word]
    options = {parameter.name: tuple(parameter.opts) for parameter in node.params}
    hints = get_type_hints(callback, include_extras=True)
    for name, parameter in inspect.signature(callback).parameters.items():
        hint = hints[name]  # Python 3.10 wraps it in Optional where the default is None
        hint = hint if hasattr(hint, "__metadata__") else get_args(hint)[0]
        annotated, info = hint.__origin__, hint.__metadata__[0]
        required = parameter.default is parameter.empty
        is_argument = isinstance(info, ArgumentInfo)
        repeated = any(getattr(kind, "__origin__", None) is list for kind in (annotated, *get_args(annotated)))
        if is_argument:
            names: tuple[str, ...] = ((info.metavar or name.upper()).strip("[]."),)
        else:
            names = options[name]
        yield Parameter(
            names=names,
            is_argument=is_argument,
            kind=_kind(annotated, info, repeated),
            default="required" if required else _default(parameter.default),
            help=info.help or "",
            required=required,
            repeated=repeated,
        )


def _kind(annotated: Any, info: Any, repeated: bool) -> str:
    plain = next((KINDS[t] for t in (annotated, *get_args(annotated)) if t in KINDS), "text")
    limits = {
        (True, False): f" >= {info.min}",
        (False, True): f" <= {info.max}",
        (True, True): f" from {info.min} to {info.max}",
    }
    plain += limits.get((info.min is not None, info.max is not None), "")
    return f"{plain}, repeatable" if repeated else plain


def _default(value: Any) -> str:
    return "" if value is None or value is False else f"`{value}`"


def usage(command: str) -> str:
    words = ["ultrafuser", command]
    for parameter in parameters(command):
        if parameter.is_argument:
            word = parameter.names[0] + ("..." if parameter.repeated else "")
            words.append(word if parameter.required else f"[{word}]")
    return " ".join([*words, "[OPTIONS]"])


def section(command: str, callback: Callable[..., Any]) -> str:
    text = inspect.getdoc(callback) or ""
    lines = [f"## {command}", "", "```console", f"$ {usage(command)}", "```", "", text, ""]
    for title, is_argument in (("Argument", True), ("Option", False)):
        rows = [parameter for parameter in parameters(command) if parameter.is_argument is is_argument]
        if rows:
            lines += [f"| {title} | Type | Default | Meaning |", "|---|---|---|---|", *map(_row, rows), ""]
    return "\n".join(lines)


def _row(parameter: Parameter) -> str:
    names = ", ".join(f"`{name}`" for name in parameter.names)
    return f"| {names} | {parameter.kind} | {parameter.default} | {_cell(parameter.help)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("[", "\\[")


def render() -> str:
    summary = "\n".join(
        f"| [`{name}`](#{name.replace(' ', '-')}) | {(inspect.getdoc(callback) or '').splitlines()[0]} |"
        for name, callback in commands().items()
    )
    sections = [section(name, callback) for name, callback in commands().items()]
    return "\n".join([HEAD.format(summary=summary), *sections]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and exit with 1 if the page is out of date"
    )
    check = parser.parse_args().check
    fresh = render()
    if check and (not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != fresh):
        sys.exit(f"{PAGE}: out of date. Run: python scripts/cli_docs.py")
    if not check:
        PAGE.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
