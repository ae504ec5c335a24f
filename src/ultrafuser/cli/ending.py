"""How a command ends that was interrupted, or that could not write: one line that says how to go on."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from ultrafuser.errors import DiskError, Preempted, UltraFuserError
from ultrafuser.printing import echo_error

Command = TypeVar("Command", bound=Callable[..., None])
AGAIN = "Run the same command again"


def how_to_go_on(next_step: str | Callable[..., str], *, resumes: bool = True) -> Callable[[Command], Command]:
    """Decorate a command: an interrupt ends it with exit code 130 and the line that says how to go on.

    Args:
        next_step: the line, or a function that makes it from the arguments of the command.
        resumes: finished work is kept, so errors of the disk say the same.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            def line() -> str:
                return next_step if isinstance(next_step, str) else next_step(**arguments)

            try:
                command(**arguments)
            except KeyboardInterrupt:
                echo_error(f"\nultrafuser: interrupted. {line()}")
                raise typer.Exit(130) from None
            except Preempted as error:  # schedulers take another exit code for a failure
                echo_error(f"\nultrafuser: {error}. {line()}")
                raise typer.Exit(0) from None
            except DiskError as error:
                if not resumes or "--resume" in error.next_step:
                    raise
                raise DiskError(error.target, error.problem, f"Free space or make it writable. {line()}") from error

        return run  # type: ignore[return-value]

    return decorate


def report_disk(error: OSError) -> None:
    """Turn an error of the disk that no other code has turned into a line into one. Other errors are bugs.

    Raises:
        UltraFuserError: the line.
    """
    from ultrafuser.data.files import disk_problem

    if (problem := disk_problem(error)) is None:
        raise error
    if error.filename is not None:
        raise UltraFuserError(
            f"{os.fsdecode(error.filename)}: {problem}. Correct that, or choose another path"
        ) from error
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 1
    )  # if it was standard output, the interpreter would fail again at its end
    raise UltraFuserError(
        f"standard output or another file could not be written: {problem}. Free space, then run again"
    ) from error
