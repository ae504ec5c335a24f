"""Imports follow the layers, `import ultrafuser` is cheap, and its public names exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ultrafuser

PACKAGE = Path(ultrafuser.__file__).parent
_BASE = {"errors", "progress", "typed_yaml", "model"}
_CORE = _BASE | {"recipe", "data", "specialists"}
# What each part may import besides itself. The order is the architecture: a part never imports one below it.
MAY_IMPORT = {
    "model": set(),
    "_register": set(),
    "errors": {"model"},
    "printing": {"errors"},
    "progress": {"errors", "printing"},
    "typed_yaml": {"errors"},
    "recipe": {"errors", "typed_yaml"},
    "data": _BASE,
    "vocabulary": {"data", "errors"},
    "specialists": _CORE - {"specialists"} | {"vocabulary"},
    "info": _BASE,
    "train": _CORE,
    "endpoint": {"errors", "progress", "typed_yaml"},
    "sandbox": {"errors"},
    "display": {"errors"},
    "inspect": _CORE | {"display"},
    "report": {"errors", "display", "inspect"},
    "publish": _CORE | {"display", "report", "train"},
    "datamap": _CORE | {"display", "inspect"},
    "zoo": {"errors", "data", "sandbox"},
    "evaluate": _CORE | {"endpoint", "sandbox", "train", "zoo"},
    "compare": _CORE | {"endpoint", "evaluate", "inspect", "printing", "report", "train"},
    "synth": _CORE | {"endpoint", "evaluate", "sandbox"},
    "demo": _CORE | {"compare", "evaluate", "inspect", "report", "train", "zoo"},
    "vllm_plugin": {"errors", "model"},
    "serve": _CORE | {"endpoint", "inspect", "printing", "vllm_plugin"},
    "chat": _CORE | {"display", "endpoint", "inspect", "printing", "serve"},
    "playground": _CORE | {"display", "endpoint", "inspect", "printing", "serve"},
}  # fmt: skip
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"_register"}
MAY_IMPORT["__main__"] = {"cli"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """`ultrafuser.data.schema` -> `data`."""
    return module.split(".")[1]


def name_of(file: Path) -> str:
    return ".".join(["ultrafuser", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def imported_modules(file: Path) -> Iterator[str]:
    """Modules of this package that a file imports, inside functions too."""
    package = name_of(file) if file.name == "__init__.py" else name_of(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ultrafuser."))
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*up, *([node.module] if node.module else [])])
            if module == "ultrafuser":
                yield from (f"ultrafuser.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
            elif module.startswith("ultrafuser."):
                yield from {
                    f"{module}.{alias.name}" if _is_module(f"{module}.{alias.name}") else module for alias in node.names
                }


def _is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_the_layers_name_the_parts_that_exist():
    parts = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES} - {"__init__"}
    assert parts == set(MAY_IMPORT)


def test_the_layers_have_no_circle():
    order = list(MAY_IMPORT)
    for part, allowed in MAY_IMPORT.items():
        above = [name for name in allowed if order.index(name) > order.index(part)]
        assert not above, f"{part} may import {above}, which come after it"


@pytest.mark.parametrize("file", [f for f in FILES if f.parent != PACKAGE or f.stem != "__init__"], ids=name_of)
def test_imports_go_one_way(file):
    part = part_of(name_of(file))
    for module in imported_modules(file):
        assert part_of(module) in MAY_IMPORT[part] | {part}, f"{name_of(file)} imports {module}"


def test_modules_have_no_import_circle():
    """Imports inside functions count too."""
    names = {name_of(file) for file in FILES}
    imports = {name_of(file): {module for module in imported_modules(file) if module in names} for file in FILES}
    state: dict[str, bool] = {}  # False while a module's imports are followed

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module, True), f"circle of imports: {' -> '.join([*path, module])}"
        if module in state:
            return
        state[module] = False
        for target in imports[module]:
            follow(target, (*path, module))
        state[module] = True

    for module in imports:
        follow(module, ())


def test_model_imports_its_neighbours_relatively():
    """Its files are copied into checkpoints and must work there as remote code."""
    for file in (PACKAGE / "model").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.startswith("ultrafuser")], file


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_library_code_never_prints(file):
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    printed = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not printed, f"{file}: print( in lines {printed}"


@pytest.mark.parametrize("name", ultrafuser.__all__)
def test_every_public_name_resolves(name):
    assert getattr(ultrafuser, name) is not None
    assert name in dir(ultrafuser)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ultrafuser' has no attribute 'fusion'"):
        ultrafuser.fusion  # noqa: B018


def run(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


# tests/conftest.py imports transformers first, so every test of a checkpoint covers the other order.
def test_importing_it_imports_neither_torch_nor_transformers_and_the_auto_classes_learn_of_it():
    out = run(
        "import sys, ultrafuser\n"
        "from ultrafuser import load_recipe\n"
        "load_recipe({'specialists': [{'name': 'a', 'model': 'b'}]})\n"
        "import ultrafuser.cli\n"
        "sys.stdout.write(' '.join(m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules) + '|')\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.for_model('ultrafuser')\n"
        "sys.stdout.write(AutoModelForCausalLM._model_mapping[type(config)].__name__)\n"
    )
    assert out == "|UltraFuserForCausalLM"
