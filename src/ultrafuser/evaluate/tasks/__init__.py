"""The benchmarks of the paper as lm-eval task files, each with the Python that reads its rows and scores its answers."""

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
    """A data set on the hub: its id, its configuration if it has several, and the split that is asked."""

    id: str
    config: str | None
    split: str


@dataclass(frozen=True)
class TaskInfo:
    """What there is to know about a task before loading it.

    Attributes:
        file: the name of its local file in a `--data-dir`.
        metric: the main metric, a number in [0, 1] for every question; higher is better.
        needs_log_probs: it asks for log-likelihoods, which an endpoint that only chats does not give.
        runs_code: it runs answers as programs.
    """

    name: str
    file: str
    hub: Hub
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
    )
}
SUITES: dict[str, list[str]] = {
    "paper": ["truthfulqa", "humaneval", "gsm8k", "math", "sat_math", "aqua"],
    "paper-cot": ["gsm8k_cot", "math_cot", "sat_math_cot", "aqua_cot"],
    "code": ["humaneval", "mbpp"],
}


def load_tasks(
    names: Iterable[str],
    *,
    data_dir: str | Path | None = None,
    unsafe_code: bool = False,
    samples: int = 1,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    include_path: str | Path | None = None,
) -> dict[str, Task]:
    """Tasks ready for `lm_eval.evaluator.evaluate(lm, {"tasks": tasks}, apply_chat_template=True)`, by their names.

    Args:
        names: ours with or without `ultrafuser_`, or those of task files in `include_path`.
        data_dir: the folder with our tasks' files; None loads them from the hub.
        unsafe_code: run generated programs without the sandbox; `evaluate` wants `confirm_run_unsafe_code=True` too.
        samples: answers to each question of the code tasks; several give pass@1 and pass@samples.
        temperature: of those answers; None is greedy for one and 0.8 for several.
        max_new_tokens: of every generated answer, instead of each task's own limit.
        include_path: a folder with task files of one's own.

    Raises:
        DataError: an unknown task, a missing file, a malformed row (with file and line), or samples that would all be
            the same.
        SandboxError: a task runs code, there is no sandbox here, and `unsafe_code` is not set.
        MissingExtraError: lm-eval or math-verify is not installed.
    """
    if samples < 1 or (samples > 1 and temperature == 0):
        raise DataError(f"{samples} samples at temperature {temperature}: expected at least 1, and more only above 0")
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise DataError(f"--include-path {include_path}: no such folder; expected one with lm-eval task files")
    options: dict[str, Any] = {"samples": samples, "temperature": temperature, "unsafe_code": unsafe_code}
    if data_dir is not None:
        options["data_dir"] = str(data_dir)
    folders: list[str | Path] = [FOLDER] if include_path is None else [FOLDER, include_path]
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=options)
    chosen = {_known(name, manager.all_tasks): None for name in names}
    _check_needs([TASKS[name] for name in chosen if name in TASKS], unsafe_code)
    tasks: dict[str, Task] = {}
    for name in chosen:
        own = name in TASKS
        for full_name, task in manager.load(TASKS[name].lm_eval_name if own else name)["tasks"].items():
            if max_new_tokens is not None and task.get_config("output_type") == "generate_until":
                task.config.generation_kwargs["max_gen_toks"] = max_new_tokens
            tasks[name if own else full_name] = task
    return tasks


def _known(name: str, others: Iterable[str]) -> str:
    short = name.removeprefix(PREFIX)
    if short in TASKS:
        return short
    known = list(TASKS) + [other for other in others if other.removeprefix(PREFIX) not in TASKS]
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise DataError(f"unknown task {name!r}; {f'did you mean {near[0]!r}? ' if near else ''}Known: {', '.join(known)}")


def _check_needs(chosen: list[TaskInfo], unsafe_code: bool) -> None:
    """What would otherwise be found missing only when the answers are scored."""
    if any(info.metric == "exact_match" for info in chosen):
        _require("math_verify", "math-verify", "comparing mathematical answers")
    if not unsafe_code and any(info.runs_code for info in chosen):
        from ultrafuser import sandbox

        sandbox.run("pass")


def require_lm_eval() -> None:
    """
    Raises:
        MissingExtraError: lm-eval is not installed.
    """
    _require("lm_eval", "lm-eval", "evaluation")


def _require(module: str, package: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(package, "eval", purpose)
