"""Two rows of every task's local file, and an LM that knows the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from ultrafuser.evaluate.lm.chat import decode_chat, encode_chat
from ultrafuser.evaluate.tasks.choices import LETTERS

TRUTHFULQA = [
    {"question": "Is the sea salty?", "mc1_targets": {}, "mc2_targets": {"Yes.": 1, "No.": 0, "It is.": 1}},
    {"question": "Do cats bark?", "mc1_targets": {}, "mc2_targets": {"They do.": 0, "They do not.": 1}},
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "instruction": "Write a function total(numbers: List[int]) -> int to solve the following problem:\nAdd them up.",
        "context": "from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n",
        "signature": "total(numbers: List[int]) -> int",
        "docstring": "Add them up.",
        "prompt": 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """ Add them up. """\n',
        "canonical_solution": "    return sum(numbers)\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
        "entry_point": "total",
    },
    {
        "task_id": "HumanEval/1",
        "instruction": "Write a function quadruple(x: int) to solve the following problem:\nTwice double.",
        "context": "def double(x: int):\n    return 2 * x\n\n\ndef quadruple(x: int):\n",
        "signature": "quadruple(x: int)",
        "docstring": "Twice double.",
        "prompt": "def double(x: int):\n    return 2 * x\n\n\ndef quadruple(x: int):\n",
        "canonical_solution": "    return double(double(x))\n",
        "test": "def check(candidate):\n    for x in range(5):\n        assert candidate(x) == double(double(x))\n",
        "entry_point": "quadruple",
    },
]
MBPP = [
    {
        "text": "Write a function to square a number.",
        "code": "import math\r\ndef helper(x):\r\n    return x\r\ndef square(x):\r\n    return helper(x) ** 2",
        "task_id": 511,
        "test_setup_code": "",
        "test_list": ["assert square(3) == 9", "assert abs(square(2)) == 4"],
        "challenge_test_list": [],
    },
    {
        "text": "Write a function to halve a number.",
        "code": "def half(x):\n    return x / 2",
        "task_id": 512,
        "test_setup_code": "import math",
        "test_list": ["assert math.isclose(half(3), 1.5)"],
        "challenge_test_list": [],
    },
]
GSM8K = [
    {"question": "Ann has 2 boxes of 600 pens. How many pens?", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"},
    {"question": "Ben had 3 eggs and ate 5. Now?", "answer": "3-5=-2\n#### -2"},
]
MATH = [
    {
        "problem": "What is $\\frac{1}{2}+\\frac{1}{4}$?",
        "solution": "It is $\\boxed{\\frac{3}{4}}$.",
        "answer": "\\frac{3}{4}",
        "subject": "Prealgebra",
        "level": "Level 1",
    },
    {
        "problem": "Where is $x \\ge 0$?",
        "solution": "",
        "answer": "[0, \\infty)",
        "subject": "Algebra",
        "level": "Level 2",
    },
]
SAT_MATH = [
    {
        "passage": "",
        "question": "What is $1+1$ ?",
        "options": ["(A)2", "(B)$3$", "(C)4", "(D)5"],
        "label": "A",
        "other": {"solution": ""},
    },
    {
        "passage": "A line has slope 2.",
        "question": "Which is parallel?",
        "options": ["(A)y=x", "(B)y=2x", "(C)y=3x", "(D)y=4x"],
        "label": "B",
        "other": None,
    },
]
AQUA = [
    {
        "question": "Half of 10?",
        "options": ["A)4", "B)5", "C)6", "D)7", "E)None of these"],
        "rationale": "10/2",
        "correct": "B",
    },
    {"question": "Twice 2?", "options": ["A)1", "B)2", "C)3", "D)5", "E)4"], "rationale": "2*2", "correct": "E"},
]
FILES: dict[str, list[dict[str, Any]]] = {
    "truthfulqa_mc.json": TRUTHFULQA,
    "instruct_humaneval.jsonl": HUMANEVAL,
    "mbpp_validation.jsonl": MBPP,
    "gsm8k_test.jsonl": GSM8K,
    "math500.jsonl": MATH,
    "sat_math.jsonl": SAT_MATH,
    "aqua_test.jsonl": AQUA,
}


def write_files(folder: Path) -> Path:
    """The files of all tasks in a folder."""
    for name, rows in FILES.items():
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


class Student(LM):
    """Answers from the reference, or wrongly on purpose; keeps what it was asked."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right
        self.asked: list[Any] = []

    @property
    def tokenizer_name(self) -> str:
        return "student"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        assert add_generation_prompt
        return encode_chat(chat_history)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.asked += requests
        return [self._answer(request) for request in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.asked += requests
        return [(0.0 if self._likes(request) == self.right else -50.0, False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def _answer(self, request: Any) -> str:
        doc = request.doc
        if "reference" in doc:
            wrong = f"def {doc['entry_point']}(*args, **kwargs):\n    raise ValueError"
            return f"Here it is:\n\n```python\n{doc['reference'] if self.right else wrong}\n```\n\nDone."
        if "options" in doc:
            index = doc["target"] if self.right else (doc["target"] + 1) % len(doc["options"])
            return f"I think that it is a good question.\n\nAnswer: ({LETTERS[index]})"
        answer = doc["answer"] if self.right else "-98765"
        return f"So 1 + 1 = 2.\n\nAnswer: $\\boxed{{{answer}}}$"

    def _likes(self, request: Any) -> bool:
        context, continuation = request.args
        doc = request.doc
        if "target" in doc:
            return continuation == doc["choices"][doc["target"]]
        prompt = decode_chat(context)[0]["content"]
        option = prompt.split("\nProposed answer: ")[1].split("\n\n")[0]
        return (continuation == "True") == bool(doc["labels"][doc["options"].index(option)])
