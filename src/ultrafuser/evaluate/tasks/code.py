"""Programming tasks: extract the code of an answer, run it with its tests in the sandbox, and score pass@k."""

from __future__ import annotations

import ast
import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from lm_eval.api.task import ConfigurableTask

from ultrafuser import sandbox
from ultrafuser.data.answer_text import after_thinking, code_blocks, parse_python

SAMPLING_TEMPERATURE = 0.8
MAX_PARSED_CHARS = 400_000  # in all attempts to find the end of code
_OPENING = re.compile(r"^(?:import |from \w[\w.]* import |def |async def |class |@\w)", re.M)


class CodeTask(ConfigurableTask):
    """A task whose answers are programs. lm-eval's metadata has `samples`, `temperature` and `unsafe_code`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = config.get("metadata") or {}
        samples, temperature = int(options.get("samples") or 1), options.get("temperature")
        if temperature is None and samples > 1:
            temperature = SAMPLING_TEMPERATURE
        sampling = {"do_sample": True, "temperature": float(temperature), "top_p": 0.95} if temperature else {}
        unsafe, ks = bool(options.get("unsafe_code")), sorted({1, samples})
        metrics = [{"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in ks]
        metrics.append({"metric": "unparsed", "aggregation": "mean", "higher_is_better": False})
        changes = {
            "repeats": samples,
            "generation_kwargs": config["generation_kwargs"] | sampling,
            "process_results": partial(score, ks=ks, unsafe=unsafe),
            "metric_list": metrics,
            # By default, lm-eval scores the first answer only.
            "filter_list": [{"name": "none", "filter": [{"function": "custom", "filter_fn": _all_answers}]}],
            "unsafe_code": unsafe,
        }
        super().__init__(config={key: value for key, value in config.items() if key != "class"} | changes)


def _all_answers(resps: Iterable[list[str]], _docs: Any) -> list[list[str]]:
    return list(resps)


def score(
    doc: Mapping[str, Any], results: Sequence[Sequence[str]], *, ks: Sequence[int] = (1,), unsafe: bool = False
) -> dict[str, float]:
    """pass@k of the answers to one task, and the share of them without code."""
    codes = [extract_code(answer, doc["entry_point"], doc.get("context", "")) for answer in results[0]]
    different = list(dict.fromkeys(code for code in codes if code is not None))
    with ThreadPoolExecutor(max(1, min(len(different), os.cpu_count() or 1))) as pool:
        passed = dict(zip(different, pool.map(lambda code: passes(code, doc, unsafe=unsafe), different), strict=True))
    num_passed = sum(passed[code] for code in codes if code is not None)
    scores = {f"pass@{k}": pass_at_k(len(codes), num_passed, k) for k in ks}
    return scores | {"unparsed": sum(code is None for code in codes) / len(codes)}


def passes(code: str, doc: Mapping[str, Any], *, unsafe: bool = False) -> bool:
    """Whether the code passes the tests of a HumanEval or MBPP row.

    Raises:
        SandboxError: there is no sandbox and `unsafe` is not set, or it failed twice.
    """
    tests = f"{doc['test']}\n\ncheck({doc['entry_point']})\n" if "test" in doc else doc["tests"]
    return sandbox.decide(code, tests, str(doc["task_id"]), setup=doc["setup"], unsafe=unsafe).passed


def pass_at_k(num_answers: int, num_passed: int, k: int) -> float:
    """The chance that one of k answers drawn from n without replacement passes (Chen et al., 2021, unbiased)."""
    return 1.0 - math.comb(num_answers - num_passed, k) / math.comb(num_answers, k)


def extract_code(answer: str, entry_point: str, context: str = "") -> str | None:
    """The program in an answer, or None if there is no code.

    The first of these that exists:

    1. the first Python block that defines the function, after the earlier blocks that hold nothing but definitions
    2. bare code, from its first import, definition or decorator
    3. an indented text as the body of the signature that ends `context`
    4. the first block unchanged
    """
    text = after_thinking(answer).replace("\r\n", "\n")
    blocks = [
        _at_margin(block.body.rstrip(), entry_point)
        for block in code_blocks(text)
        if block.may_be_python and block.body.strip()
    ]
    for i, block in enumerate(blocks):
        if _defines(block, entry_point):
            return "\n\n".join([*filter(_only_defines, blocks[:i]), block])
    if (bare := _bare_code(text)) and _defines(bare, entry_point):
        return bare
    if context:
        for body in [*blocks, text]:
            if filled := _as_body(context, body):
                return filled
    return blocks[0] if blocks else bare


def _at_margin(code: str, entry_point: str) -> str:
    """The code without its indentation if it defines the function. Otherwise it may be the body of a signature."""
    dedented = textwrap.dedent(code)
    return dedented if _defines(dedented, entry_point) else code


def _defines(code: str, name: str) -> bool:
    name = re.escape(name)
    return re.search(rf"^(?:(?:async )?def|class) {name}\b|^{name} *=[^=]", code, re.M) is not None


def _only_defines(code: str) -> bool:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    tree = parse_python(code)
    return tree is not None and all(isinstance(node, kinds) for node in tree.body)


def _bare_code(text: str) -> str | None:
    """Code without a fence, and without the prose before and after it."""
    if not (start := _OPENING.search(text)):
        return None
    lines = text[start.start() :].rstrip().split("\n")
    end, chars = len(lines), 0
    while end > 0 and chars < MAX_PARSED_CHARS:
        code = "\n".join(lines[:end])
        chars += len(code)
        try:
            ast.parse(code)
            return code.rstrip()
        except SyntaxError as error:  # no text with that line parses
            end = min(end, error.lineno or end) - 1
        except (ValueError, RecursionError, MemoryError):
            end -= 1
    return "\n".join(lines)


def _as_body(context: str, body: str) -> str | None:
    """An indented text that completes the signature at the end of `context`, up to its first line at the margin."""
    lines = body.strip("\n").split("\n")
    if not lines[0].startswith((" ", "\t")):
        return None
    at_margin = (i for i, line in enumerate(lines) if line.strip() and not line.startswith((" ", "\t")))
    end = next(at_margin, len(lines))
    code = context.rstrip() + "\n" + "\n".join(lines[:end]) + "\n"
    return code if parse_python(code) else None
