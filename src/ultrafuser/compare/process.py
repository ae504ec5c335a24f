"""One step of one system in a process of its own: its memory is its own, and when it dies the others go on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultrafuser.errors import UltraFuserError
from ultrafuser.progress import ConsoleProgress, quiet_libraries

ERROR_FILE = "error.json"


def run_step(step: Callable[[Any, str], Any]) -> int:
    """The body of a child: `FOLDER NAME` from the command line; an error is left in a file for the parent."""
    quiet_libraries()
    from ultrafuser.compare.workspace import Workspace

    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, name = Path(sys.argv[1]), sys.argv[2]
    error_file = folder / "systems" / name / ERROR_FILE
    try:
        step(Workspace(folder, ConsoleProgress()), name)
    except BaseException as error:  # the parent reports it; what is not the user's to mend keeps its traceback
        error_file.parent.mkdir(parents=True, exist_ok=True)
        said = " ".join(str(error).split())[:2000]
        error_file.write_text(json.dumps(f"{type(error).__name__}: {said}"), encoding="utf-8")
        if isinstance(error, UltraFuserError):
            return 2
        raise
    return 0


def _end_with_parent() -> None:
    """The parent holds our standard input; when it is gone, so is the one who would take the result."""
    while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
        pass
    os._exit(1)


def start_step(module: str, folder: Path, name: str) -> str | None:
    """Run a step's module as a child and wait for it; what went wrong, or None.

    An interrupt reaches the child as well, and is raised here once it has ended.
    """
    error_file = folder / "systems" / name / ERROR_FILE
    error_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", module, str(folder), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        try:
            code = child.wait()
        except BaseException:  # an interrupt: the child has had it too, and may want to finish a write
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()
            raise
    if code == 0:
        return None
    if error_file.is_file():
        return json.loads(error_file.read_text(encoding="utf-8"))
    if code < 0:
        name_of_signal = signal.Signals(-code).name
        hint = ", probably out of memory" if name_of_signal == "SIGKILL" else ""
        return f"its process was ended by {name_of_signal}{hint}"
    return f"its process ended with status {code}"
