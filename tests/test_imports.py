"""Which module may import which, what `import ultrafuser` costs, and that its public names exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ultrafuser

PACKAGE = Path(ultrafuser.__file__).parent
# A module may import those of its own layer and of the layers before it.
LAYERS = [
    {"errors", "recipe", "typed_yaml", "model", "progress", "_register"},
    {"templates", "specialists", "data"},
    {"train", "evaluate", "inspect", "serve", "synth", "info", "demo", "zoo"},
    {"cli", "cli_data", "cli_evaluate", "cli_options", "cli_print", "cli_synth", "__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """`ultrafuser.data.schema` -> `data`."""
    return module.split(".")[1]


def name_of(file: Path) -> str:
    return ".".join(["ultrafuser", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def own_imports(file: Path) -> Iterator[str]:
    """Modules of ours that a file imports, anywhere in it."""
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
                yield module


def test_every_part_has_a_layer():
    parts = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES} - {"__init__"}
    assert parts <= set(LAYER), "add new parts to LAYERS above"


@pytest.mark.parametrize("file", [f for f in FILES if f.parent != PACKAGE or f.stem != "__init__"], ids=name_of)
def test_imports_go_one_way(file):
    mine = part_of(name_of(file))
    for module in own_imports(file):
        theirs = part_of(module)
        assert LAYER[theirs] <= LAYER[mine], f"{name_of(file)} imports {module}"
        if mine == "model":
            assert theirs == "model", f"model/ imports nothing else of ours, {file.name} imports {module}"


def test_model_imports_its_neighbours_relatively():
    """So that its files, copied into a checkpoint, work as remote code."""
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The other order, transformers first, is what tests/conftest.py does: every test of a checkpoint covers it.
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
