"""The task files: what they ask, word for word, what they score, and what they say when something is missing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the eval extra is not installed")
pytest.importorskip("math_verify", reason="the eval extra is not installed")

from lm_eval.evaluator import evaluate

from task_rows import FILES, Student, write_files
from ultrafuser import sandbox
from ultrafuser.errors import DataError, MissingExtraError, SandboxError
from ultrafuser.evaluate import tasks
from ultrafuser.evaluate.lm.chat import decode_chat
from ultrafuser.evaluate.tasks import TaskOptions, truthfulqa
from ultrafuser.evaluate.tasks.code import pass_at_k

REAL = Path(__file__).parents[3] / "../shared/data/eval"
COUNTS = {"truthfulqa": 817, "humaneval": 164, "mbpp": 90, "gsm8k": 1319, "math": 500, "sat_math": 220, "aqua": 254}
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the evaluation sets are not beside the repository")
needs_sandbox = pytest.mark.skipif(sandbox.available() is not None, reason=f"no sandbox: {sandbox.available()}")
FILED = [name for name, info in tasks.TASKS.items() if info.file]  # test_exam_tasks.py has the others
SAFE = [name for name in FILED if not tasks.TASKS[name].runs_code]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("tasks"))


def run(lm: Student, loaded: dict[str, Any], **options: Any) -> Any:
    return evaluate(lm, {"tasks": loaded}, apply_chat_template=True, log_samples=True, bootstrap_iters=0, **options)


# ---------------------------------------------------------------- what is there


def test_every_task_has_its_file_and_every_file_its_task(folder):
    stems = {path.stem for path in tasks.FOLDER.glob("*.yaml")}
    assert stems == set(tasks.TASKS)
    loaded = tasks.load_tasks(FILED, TaskOptions(folder, unsafe_code=True))
    assert list(loaded) == FILED
    for name, task in loaded.items():
        info = tasks.TASKS[name]
        assert task.task_name == info.lm_eval_name == f"ultrafuser_{name}"
        assert task.VERSION == 1.0
        assert next(iter(task.aggregation())) == info.metric
        assert task.higher_is_better()[info.metric]
        assert info.needs_log_probs == (task.OUTPUT_TYPE != "generate_until")
        assert info.runs_code == ("pass@1" in task.aggregation())
        assert task.get_config("num_fewshot") == 0
    assert {name for suite in tasks.SUITES.values() for name in suite} <= set(tasks.TASKS)
    assert {tasks.TASKS[name].file for name in FILED} == set(FILES)


def test_names_with_the_prefix_and_names_given_twice(folder):
    loaded = tasks.load_tasks(["ultrafuser_aqua", "aqua", "gsm8k"], TaskOptions(folder))
    assert list(loaded) == ["aqua", "gsm8k"]


@needs_real
def test_the_real_files_have_the_known_numbers_of_rows():
    loaded = tasks.load_tasks(COUNTS, TaskOptions(REAL, unsafe_code=True))
    assert {name: len(task.eval_docs) for name, task in loaded.items()} == COUNTS
    for doc in loaded["humaneval"].eval_docs:
        *above, signature = ("\n" + doc["context"]).split("\ndef ")
        assert signature.startswith(f"{doc['entry_point']}(")
        assert doc["setup"] == "\ndef ".join(above).strip()
    assert {len(doc["options"]) for doc in loaded["sat_math"].eval_docs} == {4}
    assert {len(doc["options"]) for doc in loaded["aqua"].eval_docs} == {5}
    for name in ("sat_math", "aqua"):
        assert not [o for doc in loaded[name].eval_docs for o in doc["options"] if o.startswith(("A)", "(A)"))]


# ---------------------------------------------------------------- what is asked

QUESTIONS = {
    "humaneval": (
        "Write a function total(numbers: List[int]) -> int to solve the following problem:\nAdd them up.\n\n"
        "Start from this code, and reply with the whole function in one Python code block:\n```python\n"
        "from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n```"
    ),
    "mbpp": (
        "Write a function to square a number.\n\nThe code has to pass these tests:\n```python\n"
        "assert square(3) == 9\nassert abs(square(2)) == 4\n```\n\nReply with the whole code in one Python code block."
    ),
    "gsm8k": "Ann has 2 boxes of 600 pens. How many pens?",
    "math": "What is $\\frac{1}{2}+\\frac{1}{4}$?",
    "gsm8k_cot": (
        "Ann has 2 boxes of 600 pens. How many pens?\n\nReason step by step. Then give the result on a last line of its "
        'own, in the form "Answer: NUMBER".'
    ),
    "math_cot": (
        "What is $\\frac{1}{2}+\\frac{1}{4}$?\n\nReason step by step. Then give the result on a last line of its own, in "
        'the form "Answer: \\boxed{RESULT}".'
    ),
    "sat_math": (
        "What is $1+1$ ?\n\n(A) 2\n(B) $3$\n(C) 4\n(D) 5\n\nWhich option is correct? Reply with its letter in "
        "parentheses and nothing else."
    ),
    "aqua": (
        "Half of 10?\n\n(A) 4\n(B) 5\n(C) 6\n(D) 7\n(E) None of these\n\nWhich option is correct? Reply with its letter "
        "in parentheses and nothing else."
    ),
    "sat_math_cot": (
        "What is $1+1$ ?\n\n(A) 2\n(B) $3$\n(C) 4\n(D) 5\n\nReason step by step. Then give the letter of the correct "
        'option on a last line of its own, in the form "Answer: (LETTER)".'
    ),
    "aqua_cot": (
        "Half of 10?\n\n(A) 4\n(B) 5\n(C) 6\n(D) 7\n(E) None of these\n\nReason step by step. Then give the letter of "
        'the correct option on a last line of its own, in the form "Answer: (LETTER)".'
    ),
}


def asked(folder: Path, name: str, **options: Any) -> list[Any]:
    """The requests of the first question of a task."""
    task = tasks.load_tasks([name], TaskOptions(folder, unsafe_code=True, **options))[name]
    lm = Student(True)
    task.build_all_requests(limit=1, apply_chat_template=True, chat_template=lm.apply_chat_template)
    return task.instances


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_instruction_is_one_message_of_the_user(folder, name):
    for request in asked(folder, name):
        assert decode_chat(request.args[0]) == [{"role": "user", "content": QUESTIONS[name]}]


def test_every_option_of_truthfulqa_is_judged_true_and_false(folder):
    requests = [
        (decode_chat(context), continuation) for context, continuation in (r.args for r in asked(folder, "truthfulqa"))
    ]
    text = (
        "Question: Is the sea salty?\nProposed answer: {}\n\nIs the proposed answer true or false? Reply with one word, "
        "True or False."
    )
    assert requests == [
        ([{"role": "user", "content": text.format(option)}], answer)
        for option in ("Yes.", "No.", "It is.")
        for answer in ("True", "False")
    ]


def test_without_a_chat_template_a_space_stands_before_true(folder):
    task = tasks.load_tasks(["truthfulqa"], TaskOptions(folder))["truthfulqa"]
    task.build_all_requests(limit=1)
    assert task.instances[0].args[0].endswith("True or False.")
    assert [request.args[1] for request in task.instances] == [" True", " False"] * 3


def test_the_letters_in_parentheses_are_what_is_weighed(folder):
    assert [request.args[1] for request in asked(folder, "aqua")] == ["(A)", "(B)", "(C)", "(D)", "(E)"]


def test_a_passage_stands_before_its_question(folder):
    task = tasks.load_tasks(["sat_math"], TaskOptions(folder))["sat_math"]
    assert task.eval_docs[1]["question"] == "A line has slope 2.\n\nWhich is parallel?"


# ---------------------------------------------------------------- how it is generated


def test_generation_is_greedy_to_the_end_of_the_answer(folder):
    for name in [name for name in FILED if not tasks.TASKS[name].needs_log_probs]:
        options = asked(folder, name)[0].args[1]
        assert (options["do_sample"], options["until"]) == (False, [])
        assert options["max_gen_toks"] >= 512
        assert asked(folder, name, max_new_tokens=7)[0].args[1]["max_gen_toks"] == 7


def test_samples_repeat_the_code_tasks_alone(folder):
    for name in ("humaneval", "mbpp"):
        (request,) = asked(folder, name, samples=5)
        assert request.repeats == 5
        assert request.args[1] | {"do_sample": True, "temperature": 0.8, "top_p": 0.95} == request.args[1]
        (request,) = asked(folder, name, temperature=0.2)
        assert (request.repeats, request.args[1]["do_sample"], request.args[1]["temperature"]) == (1, True, 0.2)
    (request,) = asked(folder, "gsm8k", samples=5, temperature=1.0)
    assert (request.repeats, request.args[1]["do_sample"]) == (1, False)


def test_samples_that_would_all_be_the_same_are_refused(folder):
    for samples, temperature in ((0, None), (5, 0.0)):
        with pytest.raises(DataError, match=f"{samples} samples at temperature {temperature}"):
            tasks.load_tasks(["gsm8k"], TaskOptions(folder, samples=samples, temperature=temperature))


# ---------------------------------------------------------------- what is scored


def main_scores(results: Any) -> dict[str, float]:
    return {name: results["results"][name][f"{tasks.TASKS[name].metric},none"] for name in results["results"]}


@pytest.mark.parametrize("right", [True, False])
def test_right_answers_score_one_and_wrong_ones_nothing(folder, right):
    results = run(Student(right), tasks.load_tasks(SAFE, TaskOptions(folder)))
    assert main_scores(results) == pytest.approx(dict.fromkeys(SAFE, float(right)), abs=1e-12)
    for name in SAFE:
        rows = results["samples"][name]
        assert [row[tasks.TASKS[name].metric] for row in rows] == pytest.approx([float(right)] * 2, abs=1e-12)
        assert [row.get("unparsed", 0.0) for row in rows] == [0.0, 0.0]


@needs_sandbox
@pytest.mark.parametrize("right", [True, False])
def test_code_runs_in_the_sandbox(folder, right):
    loaded = tasks.load_tasks(["humaneval", "mbpp"], TaskOptions(folder))
    assert main_scores(run(Student(right), loaded)) == dict.fromkeys(["humaneval", "mbpp"], float(right))


@needs_real
@pytest.mark.parametrize("right", [True, False])
def test_real_rows_and_reference_answers(right):
    """The first hundred rows of each set."""
    loaded = tasks.load_tasks(SAFE, TaskOptions(REAL))
    samples = {name: list(range(min(100, len(task.eval_docs)))) for name, task in loaded.items()}
    results = run(Student(right), loaded, samples=samples)
    assert main_scores(results) == pytest.approx(dict.fromkeys(SAFE, float(right)), abs=1e-12)


@needs_real
@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_the_reference_programs_pass_and_wrong_ones_fail(right):
    results = run(Student(right), tasks.load_tasks(["humaneval", "mbpp"], TaskOptions(REAL)))
    failed = {
        name: [row["doc"]["task_id"] for row in rows if row["pass@1"] != float(right)]
        for name, rows in results["samples"].items()
    }
    assert failed == {"humaneval": [], "mbpp": []}
    assert [results["n-samples"][name]["effective"] for name in ("humaneval", "mbpp")] == [164, 90]


@needs_sandbox
def test_pass_at_k_over_several_answers(folder):
    class Wavering(Student):
        """Right in two answers of four, without code in one."""

        def generate_until(self, requests, disable_tqdm=False):
            right, wrong = Student(True), Student(False)
            turns = [right, wrong, right]
            return [
                turns[i % 4].generate_until([request])[0] if i % 4 < 3 else "I would rather not."
                for i, request in enumerate(requests)
            ]

    results = run(Wavering(True), tasks.load_tasks(["mbpp"], TaskOptions(folder, samples=4)))
    for row in results["samples"]["mbpp"]:
        assert row["pass@1"] == pytest.approx(pass_at_k(4, 2, 1)) == pytest.approx(0.5)
        assert (row["pass@4"], row["unparsed"]) == (1.0, 0.25)
    assert results["results"]["mbpp"]["pass@4,none"] == 1.0


def test_unreadable_answers_are_wrong_and_counted(folder):
    class Silent(Student):
        def generate_until(self, requests, disable_tqdm=False):
            return ["I do not know." for _ in requests]

    names = [name for name in FILED if not tasks.TASKS[name].needs_log_probs]
    results = run(
        Silent(True), tasks.load_tasks(names, TaskOptions(folder, unsafe_code=True)), confirm_run_unsafe_code=True
    )
    assert main_scores(results) == dict.fromkeys(names, 0.0)
    assert {name: results["results"][name]["unparsed,none"] for name in names} == dict.fromkeys(names, 1.0)


def test_chosen_questions_keep_their_numbers(folder):
    results = run(Student(True), tasks.load_tasks(["gsm8k"], TaskOptions(folder)), samples={"gsm8k": [1]})
    assert [(row["doc_id"], row["target"]) for row in results["samples"]["gsm8k"]] == [(1, "-2")]


def test_mc2_against_a_value_worked_out_by_hand():
    # p(True), p(False) of three options, the first and the last true: s = 0.75, 0.5, 0.2; (0.75 + 0.2) / 1.45.
    pairs = [(0.3, 0.1), (0.25, 0.25), (0.1, 0.4)]
    results = [(math.log(p), False) for pair in pairs for p in pair]
    assert truthfulqa.score({"labels": [1, 0, 1]}, results)["mc2"] == pytest.approx(0.95 / 1.45)


def test_mc2_holds_for_tiny_beliefs_and_large_ones():
    assert truthfulqa.mc2([-2000.0, -2000.0], [1, 0]) == pytest.approx(0.5)
    assert truthfulqa.mc2([900.0, -900.0], [1, 0]) == 1.0
    assert truthfulqa.mc2([0.0] * 4, [1, 1, 1, 0]) == pytest.approx(0.75)


# ---------------------------------------------------------------- what can be wrong


def test_an_unknown_task_is_named_with_its_nearest(folder):
    with pytest.raises(DataError, match=r"unknown task 'gsm8'. Did you mean 'gsm8k'\? Known: truthfulqa, humaneval, "):
        tasks.load_tasks(["gsm8"], TaskOptions(folder))


def test_without_a_sandbox_nothing_is_asked(folder, monkeypatch):
    monkeypatch.setattr(sandbox.execute, "available", lambda: "bubblewrap is gone")
    with pytest.raises(SandboxError, match="bubblewrap is gone.*--unsafe-code"):
        tasks.load_tasks(["gsm8k", "mbpp"], TaskOptions(folder))
    tasks.load_tasks(["gsm8k"], TaskOptions(folder))
    loaded = tasks.load_tasks(["mbpp"], TaskOptions(folder, unsafe_code=True))
    with pytest.raises(ValueError, match="confirm_run_unsafe_code"):  # lm-eval's own second question
        run(Student(True), loaded)


@pytest.mark.parametrize(("module", "package"), [("lm_eval", "lm-eval"), ("math_verify", "math-verify")])
def test_a_missing_package_is_named_with_the_extra(folder, monkeypatch, module, package):
    real = tasks.importlib.util.find_spec
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None if name == module else real(name))
    with pytest.raises(MissingExtraError, match=rf"needs '{package}'.*ultrafuser\[eval\]"):
        tasks.load_tasks(["gsm8k"], TaskOptions(folder))


# ---------------------------------------------------------------- tasks of one's own

OWN = """
task: my_sums
custom_dataset: !function my_sums.load
test_split: test
num_fewshot: 0
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 64}
process_results: !function ultrafuser.evaluate.tasks.mathematics.score_number
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
OWN_PYTHON = """
from datasets import Dataset

def load(**metadata):
    return {"test": Dataset.from_list([{"question": "2 + 2?", "answer": "4"}])}
"""


def test_a_task_file_of_ones_own(folder, tmp_path):
    (tmp_path / "my_sums.yaml").write_text(OWN)
    (tmp_path / "my_sums.py").write_text(OWN_PYTHON)
    loaded = tasks.load_tasks(["my_sums", "aqua"], TaskOptions(folder, include_path=tmp_path, max_new_tokens=9))
    assert list(loaded) == ["my_sums", "aqua"]
    results = run(Student(True), loaded)
    assert results["results"]["my_sums"]["exact_match,none"] == 1.0
    assert results["configs"]["my_sums"]["generation_kwargs"]["max_gen_toks"] == 9
    with pytest.raises(DataError, match="Did you mean 'my_sums'"):
        tasks.load_tasks(["my_sum"], TaskOptions(folder, include_path=tmp_path))
    with pytest.raises(DataError, match=r"--include-path .*none: no such folder"):
        tasks.load_tasks(["my_sums"], TaskOptions(include_path=tmp_path / "none"))


def test_the_list_of_tasks_is_cheap_to_import():
    code = (
        "import sys; from ultrafuser.evaluate.tasks import TASKS, SUITES; "
        "assert not {'lm_eval', 'torch', 'datasets', 'numpy', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_results_are_json(folder):
    from lm_eval.utils import handle_non_serializable

    results = run(Student(True), tasks.load_tasks(SAFE, TaskOptions(folder)))
    json.dumps(results, default=handle_non_serializable)
