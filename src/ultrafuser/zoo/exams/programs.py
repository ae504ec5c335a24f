"""Whether a program of an answer gives the expected results: in the sandbox, and without a way to the tests."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ultrafuser import sandbox
from ultrafuser.data.answer_text import parse_python

# Modules of which a program may import names. Those of `_MODULES` it may also import whole.
IMPORTS: Mapping[str, Collection[str]] = {
    "functools": {"reduce"},
    "math": {"prod", "gcd", "floor", "ceil", "inf"},
    "typing": {"List", "Union", "Optional", "Any"},
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "itertools": {"accumulate", "chain", "islice", "takewhile"},
    "__future__": {"annotations"},
}
_FORBIDDEN = {
    "eval",
    "exec",
    "getattr",
    "setattr",
    "vars",
    "globals",
    "locals",
    "compile",
    "open",
    "breakpoint",
    "type",
    "super",
}
_MODULES = {"functools", "math"}


def is_plain(code: str, imports: Mapping[str, Collection[str]] = IMPORTS) -> bool:
    """Whether the code has no class, no unusual import, and no way to the frames of the tests, which hold the results.

    Args:
        imports: the names that it may import, by module.
    """
    tree = parse_python(code)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.ImportFrom):
            if not {alias.name for alias in node.names} <= set(imports.get(node.module or "", ())):
                return False
        elif isinstance(node, ast.Import):
            if any(alias.name not in _MODULES & imports.keys() or alias.asname for alias in node.names):
                return False
        elif isinstance(node, ast.Attribute):
            if node.attr.startswith(("_", "gi_", "f_", "tb_", "format", "update_wrapper", "wraps")):
                return False
        elif isinstance(node, ast.Name):
            if node.id in _FORBIDDEN or (node.id.startswith("__") and node.id != "__name__"):
                return False
        elif isinstance(node, (ast.ClassDef, ast.MatchClass)):
            return False
    return tree is not None


def gives(
    code: str,
    function: str,
    cases: Iterable[tuple[Sequence[Any], Any]],
    imports: Mapping[str, Collection[str]] = IMPORTS,
) -> bool:
    """Whether plain code defines a function that gives the results of all cases: the arguments of a call, and its result.

    Raises:
        SandboxError: there is no sandbox on this machine, or it failed twice.
    """
    if not is_plain(code, imports):
        return False
    calls, results = [], []
    for arguments, result in cases:
        calls.append(f"{function}({', '.join(map(repr, arguments))})")
        results.append(result)
    # The answer can replace built-in functions and the equality of its objects, but no method of a list or text.
    tests = f"assert [{', '.join(calls)}].__repr__() == {str(results)!r}"
    return sandbox.decide(code, tests, f"function {function!r}").passed
