"""Build or measure one system of a comparison, in a process of its own.

`python -m ultrafuser.compare.system FOLDER NAME STEP` is what `ultrafuser compare` starts, so that the memory of one
system does not count for another one, and the others go on when one dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ultrafuser.compare.keys import Step, step_key
from ultrafuser.compare.recipe import CompareRecipe, load_compare_recipe
from ultrafuser.compare.results import Measurement
from ultrafuser.compare.systems import SystemRecipe
from ultrafuser.compare.workspace import BUILT, Workspace
from ultrafuser.data.files import disk_errors, disk_problem, write_json, write_text
from ultrafuser.data.sources import RowReader
from ultrafuser.errors import DiskError, UltraFuserError
from ultrafuser.evaluate.lm.load import LoadedModel
from ultrafuser.evaluate.lm.parameters import peak_rss_mb
from ultrafuser.evaluate.losses import by_domain, by_stratum
from ultrafuser.evaluate.options import EvalOptions
from ultrafuser.evaluate.run import score_benchmarks
from ultrafuser.evaluate.tasks import TASKS, TaskOptions
from ultrafuser.printing import echo_error, show_traceback
from ultrafuser.progress import ConsoleProgress, Progress, quiet_libraries
from ultrafuser.report.data import Speed
from ultrafuser.train.metrics import read_metrics
from ultrafuser.train.rows import load_source

RECIPE = "compare.yaml"
MEASURED, ERROR_FILE = "measured.json", "error.json"


@dataclass
class Built:
    """The cost of a finished build."""

    trained_parameters: int = 0
    seconds: float = 0.0


def read_built(recipe: CompareRecipe, system: SystemRecipe) -> Built | None:
    """The result of a build. None: it is missing or belongs to another recipe."""
    tree = _read_step(recipe, system, "build", BUILT)
    return Built(**tree) if tree is not None else None


def read_measured(recipe: CompareRecipe, system: SystemRecipe) -> Measurement | None:
    """The result of a measurement. None: it is missing or belongs to another recipe."""
    tree = _read_step(recipe, system, "measure", MEASURED)
    return Measurement.from_dict(tree) if tree is not None else None


def _read_step(recipe: CompareRecipe, system: SystemRecipe, step: Step, name: str) -> dict[str, Any] | None:
    file = Workspace(recipe).system_folder(system.id) / name
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return tree if tree is not None and tree.pop("key") == step_key(recipe, system, step) else None


def build(recipe: CompareRecipe, system: SystemRecipe, progress: Progress | None = None) -> None:
    """Build a system and write its cost. An interrupted build is resumed.

    Raises:
        UltraFuserError: it cannot be built.
    """
    workspace = Workspace(recipe, progress)
    folder, key = workspace.system_folder(system.id), step_key(recipe, system, "build")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    started = folder / "build-key"
    if not started.is_file() or started.read_text(encoding="utf-8") != key:  # the files belong to another recipe
        for stale in ("run", "model"):
            shutil.rmtree(folder / stale, ignore_errors=True)
        for stale in (BUILT, MEASURED):
            (folder / stale).unlink(missing_ok=True)
        write_text(started, key)
    start = time.monotonic()
    trained = system.build(workspace)
    built = Built(trained, round(time.monotonic() - start, 1))
    write_json(folder / BUILT, {"key": key, **asdict(built)})


def measure(recipe: CompareRecipe, system: SystemRecipe, progress: Progress | None = None) -> None:
    """Measure a built system and write all measurements into one file. Cached answers are reused.

    Raises:
        UltraFuserError: it cannot be measured.
    """
    workspace, start = Workspace(recipe, progress), time.monotonic()
    loaded = system.load(workspace)
    measured = Measurement(parameters=loaded.parameters)
    measured.tokens_per_s = _speed(recipe, loaded.timed_lm or loaded.lm)
    # before the benchmarks, which hold more for some systems than for others
    gpu_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    measured.peak_memory_mb = round(gpu_bytes / 2**20) if gpu_bytes else peak_rss_mb()
    if recipe.test and loaded.read_test_rows is not None:
        test = loaded.read_test_rows()
        measured.losses = by_stratum(test.rows, test.losses)
        if test.gate_weights is not None:
            measured.sample_weights = by_domain(test.rows, test.gate_weights)
    names = recipe.tasks_of(system)
    if loaded.read_test_rows is None:  # without a likelihood, the benchmarks that need one are skipped
        names = [name for name in names if name not in TASKS or not TASKS[name].needs_log_probs]
    model = LoadedModel(system.id, loaded.lm, loaded.fingerprint)
    with contextlib.closing(workspace.answers(loaded.fingerprint)) as store:
        measured.tasks = score_benchmarks(model, eval_options(recipe, names), store, workspace.progress)
    measured.traces = loaded.traces()
    measured.chosen = loaded.chosen() if loaded.chosen is not None else None
    folder = workspace.system_folder(system.id)
    measured.training = read_metrics(folder / "run" / "metrics.jsonl")
    measured.seconds = round(time.monotonic() - start, 1)
    write_json(folder / MEASURED, {"key": step_key(recipe, system, "measure"), **measured.to_dict()})


def eval_options(recipe: CompareRecipe, names: list[str]) -> EvalOptions:
    """A comparison's settings of the benchmarks `names`."""
    task_options = TaskOptions(recipe.data_dir, recipe.unsafe_code, max_new_tokens=recipe.max_new_tokens)
    return EvalOptions(names, limit=recipe.limit, seed=recipe.seed, judge=recipe.judge, task_options=task_options)


def _speed(recipe: CompareRecipe, lm: LM) -> Speed:
    """New tokens per second: the shortest test prompts, one at a time, always the same number of new tokens."""
    settings = recipe.decode
    rows_per_source = -(-settings.prompts // max(1, len(recipe.test)))
    reader = RowReader(recipe.training().data.on_bad_row)
    rows = [row for source in recipe.test for row in load_source(source, reader)[:rows_per_source]]
    # each row up to its first answer
    chats = [list(takewhile(lambda message: message["role"] != "assistant", row.chat())) for row in rows]
    chats = chats or [[{"role": "user", "content": "Why is the sky blue?"}]]
    chats = sorted(chats, key=lambda chat: len(chat[-1]["content"]))[: settings.prompts]
    size = settings.new_tokens
    options = {"until": [], "do_sample": False, "max_gen_toks": size, "min_new_tokens": size}
    runs = []
    for _ in range(settings.repeats + 1):
        start = time.monotonic()
        for i, chat in enumerate(chats):
            lm.generate_until([Instance("generate_until", {}, (lm.apply_chat_template(chat), dict(options)), i)])
        runs.append(len(chats) * size / (time.monotonic() - start))
    runs = runs[1:]  # the first run warms up
    return Speed(median=sorted(runs)[len(runs) // 2], runs=runs, batch_size=1)


def main(arguments: list[str]) -> int:
    """Run a step in the child process and write an error into a file for the parent."""
    quiet_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, name, step = Path(arguments[0]), arguments[1], arguments[2]
    error_file = folder / "systems" / name / ERROR_FILE
    try:
        recipe = load_compare_recipe(folder / RECIPE)
        {"build": build, "measure": measure}[step](recipe, recipe.system(name), ConsoleProgress())
    except KeyboardInterrupt:  # which has reached the parent too
        return 130
    except BaseException as error:  # the parent reports it, and a bug keeps its traceback
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"
        try:
            write_json(error_file, message)
        except DiskError:  # the disk is full, and this error probably says so
            echo_error(f"{name}: {message}")
        if isinstance(error, UltraFuserError) or disk_problem(error):
            return 2
        raise
    return 0


def _end_with_parent() -> None:
    """End this process with its parent, which holds our standard input open and would read the result."""
    while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
        pass
    os._exit(1)


def start(folder: Path, name: str, step: Step, module: str = __name__) -> str | None:
    """Run a step in a child process and wait for it.

    An interrupt reaches the child as well, and is raised here once the child has ended.

    Returns:
        The error, if any.
    """
    error_file = folder / "systems" / name / ERROR_FILE
    error_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", module, str(folder), name, step]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        try:
            code = child.wait()
        except BaseException:  # an interrupt, which has reached the child too: let it finish a write
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()
            raise
    if code == 0:
        return None
    if error_file.is_file():
        return json.loads(error_file.read_text(encoding="utf-8"))
    if code < 0:
        signal_name = signal.Signals(-code).name
        hint = ", probably out of memory" if signal_name == "SIGKILL" else ""
        return f"its process was ended by {signal_name}{hint}"
    return f"its process ended with status {code}"


if __name__ == "__main__":
    sys.excepthook = show_traceback
    sys.exit(main(sys.argv[1:]))
