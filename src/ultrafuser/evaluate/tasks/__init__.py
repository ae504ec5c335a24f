"""The benchmarks of the paper and the exams as lm-eval task files, with Python that reads rows and scores answers."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ultrafuser.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from lm_eval.api.task import Task

PREFIX = "ultrafuser_"  # of our tasks' names in lm-eval's namespace
FOLDER = Path(__file__).parent


class Hub(NamedTuple):
    """A data set on the hub: its id, its configuration if it has several, and the split with the questions."""

    id: str
    config: str | None
    split: str


@dataclass(frozen=True)
class TaskInfo:
    """A task before it is loaded.

    Attributes:
        file: the name of its local file in a `--data-dir`. None: its questions are generated.
        hub: the data set with its questions. None: they are generated.
        metric: the main metric, a number from 0 to 1 for every question. Higher is better.
        needs_log_probs: it scores given text by its likelihood, which an endpoint cannot do.
        runs_code: it runs answers as programs.
    """

    name: str
    file: str | None
    hub: Hub | None
    metric: str
    description: str
    needs_log_probs: bool = False
    runs_code: bool = False

    @property
    def lm_eval_name(self) -> str:
        return PREFIX + self.name


_TRUTHFULQA = ("truthfulqa_mc.json", Hub("truthfulqa/truthful_qa", "multiple_choice", "validation"))
_HUMANEVAL = ("instruct_humaneval.jsonl", Hub("codeparrot/instructhumaneval", None, "test"))
_MBPP = ("mbpp_validation.jsonl", Hub("google-research-datasets/mbpp", "full", "validation"))
_GSM8K = ("gsm8k_test.jsonl", Hub("openai/gsm8k", "main", "test"))
_MATH = ("math500.jsonl", Hub("HuggingFaceH4/MATH-500", None, "test"))
_SAT_MATH = ("sat_math.jsonl", Hub("hails/agieval-sat-math", None, "test"))
_AQUA = ("aqua_test.jsonl", Hub("deepmind/aqua_rat", "raw", "test"))
_EXAM = (None, None)

TASKS: dict[str, TaskInfo] = {
    info.name: info
    for info in (
        TaskInfo(
            "truthfulqa", *_TRUTHFULQA, "mc2", "share of the belief that goes to true answers", needs_log_probs=True
        ),
        TaskInfo(
            "humaneval", *_HUMANEVAL, "pass@1", "InstructHumanEval: functions that pass their tests", runs_code=True
        ),
        TaskInfo("mbpp", *_MBPP, "pass@1", "MBPP validation: short programs that pass their tests", runs_code=True),
        TaskInfo("gsm8k", *_GSM8K, "exact_match", "GSM8K: grade-school word problems"),
        TaskInfo("math", *_MATH, "exact_match", "MATH-500: competition problems"),
        TaskInfo("sat_math", *_SAT_MATH, "acc", "SAT-Math: the most likely of four letters", needs_log_probs=True),
        TaskInfo("aqua", *_AQUA, "acc", "AQuA-RAT: the most likely of five letters", needs_log_probs=True),
        TaskInfo("gsm8k_cot", *_GSM8K, "exact_match", "GSM8K, asked to reason step by step"),
        TaskInfo("math_cot", *_MATH, "exact_match", "MATH-500, asked to reason step by step"),
        TaskInfo("sat_math_cot", *_SAT_MATH, "acc", "SAT-Math, asked to reason and then to state a letter"),
        TaskInfo("aqua_cot", *_AQUA, "acc", "AQuA-RAT, asked to reason and then to state a letter"),
        TaskInfo("exam_text", *_EXAM, "acc", "small tasks with words, for models of 135M parameters"),
        TaskInfo("exam_code", *_EXAM, "acc", "small functions, for models of 135M parameters", runs_code=True),
        TaskInfo("exam_math", *_EXAM, "acc", "small arithmetic, for models of 135M parameters"),
        TaskInfo("exam_mixed", *_EXAM, "acc", "tasks that need text, code and mathematics at once", runs_code=True),
    )
}
SUITES: dict[str, list[str]] = {
    "paper": ["truthfulqa", "humaneval", "gsm8k", "math", "sat_math", "aqua"],
    "paper-cot": ["gsm8k_cot", "math_cot", "sat_math_cot", "aqua_cot"],
    "code": ["humaneval", "mbpp"],
    "exams": ["exam_text", "exam_code", "exam_math", "exam_mixed"],
}


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are loaded and answered.

    Attributes:
        data_dir: folder with our benchmarks' files. None: load them from the hub.
        unsafe_code: run generated programs without the sandbox. The exams' programs always run in it.
        samples: answers to each question of the code tasks. Several give pass@1 and pass@samples.
        temperature: of those answers. None: 0 for one answer, 0.8 for several.
        max_new_tokens: of every generated answer. None: each task's own limit.
        include_path: folder with the user's own task files.
    """

    data_dir: str | Path | None = None
    unsafe_code: bool = False
    samples: int = 1
    temperature: float | None = None
    max_new_tokens: int | None = None
    include_path: str | Path | None = None


def load_tasks(names: Iterable[str], options: TaskOptions | None = None) -> dict[str, Task]:
    """Tasks ready for `lm_eval.evaluator.evaluate(lm, {"tasks": tasks}, apply_chat_template=True)`, by their names.

    With `unsafe_code`, `evaluate` needs `confirm_run_unsafe_code=True` too.

    Args:
        names: ours with or without `ultrafuser_`, or those of task files in `include_path`.

    Raises:
        DataError: an unknown task, a missing file, a malformed row (with file and line), or samples that would all be
            the same.
        SandboxError: a task runs code, there is no sandbox on this machine, and `unsafe_code` is not set or it is an exam.
        MissingExtraError: lm-eval or math-verify is not installed.
    """
    options = options or TaskOptions()
    if options.samples < 1 or (options.samples > 1 and options.temperature == 0):
        raise DataError(
            f"{options.samples} samples at temperature {options.temperature}: expected at least 1, and several only above 0"
        )
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [FOLDER]
    if options.include_path is not None:
        if not Path(options.include_path).is_dir():
            raise DataError(
                f"--include-path {options.include_path}: no such folder. Expected one with lm-eval task files"
            )
        folders.append(options.include_path)
    # lm-eval hands these to the Python code of our task files.
    metadata: dict[str, Any] = {name: getattr(options, name) for name in ("samples", "temperature", "unsafe_code")}
    if options.data_dir is not None:
        metadata["data_dir"] = str(options.data_dir)
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    requested = list(dict.fromkeys(_resolve_name(name, manager.all_tasks) for name in names))
    infos = [TASKS[name] for name in requested if name in TASKS]
    if any(info.metric == "exact_match" for info in infos):
        _require("math_verify", "math-verify", "comparing mathematical answers")
    if any(info.runs_code and (info.file is None or not options.unsafe_code) for info in infos):
        from ultrafuser import sandbox

        sandbox.run("pass")
    tasks: dict[str, Task] = {}
    for name in requested:
        lm_eval_name = TASKS[name].lm_eval_name if name in TASKS else name
        for full_name, task in manager.load(lm_eval_name)["tasks"].items():
            if options.max_new_tokens is not None and task.get_config("output_type") == "generate_until":
                task.config.generation_kwargs["max_gen_toks"] = options.max_new_tokens
            tasks[name if name in TASKS else full_name] = task
    return tasks


def _resolve_name(name: str, loadable: Iterable[str]) -> str:
    """The short name of one of our tasks, or the name of another one that lm-eval can load."""
    short = name.removeprefix(PREFIX)
    if short in TASKS:
        return short
    names = list(TASKS) + [candidate for candidate in loadable if candidate.removeprefix(PREFIX) not in TASKS]
    if name in names:
        return name
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {similar[0]!r}? " if similar else ""
    raise DataError(f"unknown task {name!r}. {hint}Known: {', '.join(names)}")


def require_lm_eval() -> None:
    """Check that evaluation is installed.

    Raises:
        MissingExtraError: lm-eval is not installed.
    """
    _require("lm_eval", "lm-eval", "evaluation")


def _require(module: str, package: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(package, "eval", purpose)
