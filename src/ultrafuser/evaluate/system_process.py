"""One step of one system in a process of its own: its memory is its own, and when it dies the others go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultrafuser.errors import UltraFuserError
from ultrafuser.progress import ConsoleProgress, quiet_libraries

ERROR_FILE = "error.json"


def run_step(step: Callable[[Any, str], Any]) -> int:
    """The body of a child: `FOLDER NAME` from the command line; an error is left in a file for the parent."""
    quiet_libraries()
    from ultrafuser.evaluate.workplace import Workplace

    place, name = Workplace(Path(sys.argv[1]), ConsoleProgress()), sys.argv[2]
    error_file = place.home(name) / ERROR_FILE
    error_file.unlink(missing_ok=True)
    try:
        step(place, name)
    except UltraFuserError as error:
        error_file.parent.mkdir(parents=True, exist_ok=True)
        error_file.write_text(json.dumps(f"{type(error).__name__}: {error}"), encoding="utf-8")
        return 2
    return 0


def start_step(module: str, folder: Path, name: str) -> str | None:
    """Run a step's module as a child and wait for it; what went wrong, or None.

    An interrupt reaches the child as well, and is raised here once it has ended.
    """
    error_file = folder / "systems" / name / ERROR_FILE
    error_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", module, str(folder), name]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    if done.returncode == 0:
        return None
    if error_file.is_file():
        return json.loads(error_file.read_text(encoding="utf-8"))
    if done.returncode < 0:
        name_of_signal = signal.Signals(-done.returncode).name
        hint = ", probably out of memory" if name_of_signal == "SIGKILL" else ""
        return f"its process was ended by {name_of_signal}{hint}"
    return f"its process ended with status {done.returncode}; its traceback is above"
