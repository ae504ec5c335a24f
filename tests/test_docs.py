"""The documentation cannot drift: its Python runs, its commands, options and paths exist, its tables are up to date."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fake_endpoint import listed, streamed, weighted
from test_imports import MAY_IMPORT
from tiny_models import tiny
from ultrafuser.cli.main import main as command_line
from ultrafuser.data.layouts import PAIR_LAYOUTS
from ultrafuser.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# Models on the hub that pages name, and the tiny models that replace them in tests.
STAND_INS = {
    "Qwen/Qwen2.5-1.5B-Instruct": "models/text",
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": "models/code",
    "Qwen/Qwen2.5-Math-1.5B-Instruct": "models/math",
    "runs/demo/fused": "my-fused",
    "runs/qwen2.5-1.5b/fused": "my-fused",
}
GLOBAL_OPTIONS = {"--version", "--install-completion", "--show-completion", "--help", "-h"}
OTHER_PROGRAMS = {"--no-deps", "--strict", "--check"}  # options of pip, mkdocs and our scripts that pages mention
PATHS = re.compile(r"(?<![\w/.:-])(?:src|recipes|docs|scripts|benchmarks|examples|tests)/[\w./*-]+")
DOMAINS = ("text", "code", "math", "mixed")


def script(name: str) -> Any:
    """A script of this repository as a module."""
    spec = importlib.util.spec_from_file_location(name, next(ROOT.glob(f"*/{name}.py")))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def blocks(page: Path) -> Iterator[tuple[str, str, int]]:
    """(language, text, line number) of every fenced block."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S):
        yield match[1], match[2], text[: match.start()].count("\n") + 2


def code(page: Path) -> list[str]:
    """Inline code, and the lines of blocks that are neither Python nor the tree. A backslash joins a line to the next."""
    text = page.read_text(encoding="utf-8")
    fenced = [body for language, body, _ in blocks(page) if language not in ("python", "tree")]
    lines = [line.strip() for body in fenced for line in body.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


@pytest.fixture(scope="module")
def workspace(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the paths of the pages: models/, data/, recipes/, my-fused/."""
    workspace = tmp_path_factory.mktemp("docs")
    for seed, name in enumerate(("text", "code", "math")):
        folder = workspace / "models" / name
        tiny(seed=seed, vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (workspace / "data").mkdir()
    lines = {domain: [json.dumps(row(domain, index)) + "\n" for index in range(4)] for domain in DOMAINS}
    lines["validation"] = [line for domain in DOMAINS for line in lines[domain]]
    for name, content in lines.items():
        (workspace / "data" / f"{name}.jsonl").write_text("".join(content))
    (workspace / "recipes").mkdir()
    recipe = yaml.safe_load((ROOT / "recipes" / "qwen2.5-1.5b.yaml").read_text())
    for specialist in recipe["specialists"]:
        specialist["model"] = STAND_INS[specialist["model"]]
    gate = {"name": "gate", "steps": 2, "samples_per_domain": 2}
    joint = {"name": "joint", "steps": 1, "samples_per_domain": 1}
    recipe |= {"dtype": "float32", "stages": [gate, joint]}
    (workspace / "recipes" / "qwen2.5-1.5b.yaml").write_text(yaml.safe_dump(recipe))
    specialists = [{"name": name, "model": str(workspace / "models" / name)} for name in ("text", "code", "math")]
    fuse(load_recipe({"specialists": specialists, "device": "cpu"}), workspace / "my-fused")
    return workspace


def row(domain: str, index: int) -> dict[str, Any]:
    question, answer = f"Question {index}?", f"{domain} {index}."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"{domain}-{index}", "domain": domain, "messages": turns}


def fuse(recipe: Any, folder: Path) -> None:
    from ultrafuser.specialists import fuse

    model, tokenizer = fuse(recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


WITH_PYTHON = [page for page in PAGES if any(language == "python" for language, _, _ in blocks(page))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(page, workspace, tmp_path, monkeypatch):
    shutil.copytree(workspace, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    namespace: dict[str, Any] = {"__name__": "docs"}
    for language, text, line in blocks(page):
        if language == "python":
            for name, stand_in in STAND_INS.items():
                text = text.replace(name, stand_in)
            program = compile("\n" * (line - 1) + text, str(page), "exec")
            exec(program, namespace)


def command_options() -> dict[str, set[str]]:
    """The options of every command. The key of global options is ""."""
    cli_docs = script("cli_docs")
    options = {"": GLOBAL_OPTIONS}
    for command in cli_docs.commands():
        names = {name for parameter in cli_docs.parameters(command) for name in parameter.names}
        options[command] = names | {"--help", "-h"}
    groups = {command.split()[0] for command in options if " " in command}
    return options | {group: options.get(f"{group} run", set()) | {"--help", "-h"} for group in groups}


def calls(line: str, commands: Container[str]) -> Iterator[tuple[str, list[str]]]:
    """(command, options) of each `ultrafuser ...` in a line of code. Without a command its name is ""."""
    if line.startswith(("import ", "from ", "pip ")):
        return
    plain = re.sub(r"\"[^\"]*\"|'[^']*'| #.*", "", line)
    for match in re.finditer(r"(?:^|[\s/])ultrafuser(?: ([a-z]+)(?: ([a-z]+)(?=\s|$))?)?((?: [^|;&]*)?)", plain):
        subcommand = f"{match[1]} {match[2]}"
        yield subcommand if subcommand in commands else match[1] or "", re.findall(r" (--?[a-z][a-z-]*)", match[3])


def test_the_pages_commands_and_options_exist():
    options, unknown, seen = command_options(), [], set()
    all_options = set().union(*options.values(), OTHER_PROGRAMS)
    for page in PAGES:
        for line in code(page):
            if (option := re.match(r"--[a-z-]+", line)) and option[0] not in all_options:
                unknown.append(f"{page.name}: {line}")
            for command, used in calls(line, options):
                seen.add(command)
                if command not in options or not set(used) <= options[command]:
                    unknown.append(f"{page.name}: {line}")
    assert not unknown
    assert seen >= set(options)  # every command is shown somewhere


def test_the_pages_paths_exist():
    missing = []
    for page in PAGES:
        for line in code(page):
            for path in PATHS.findall(line):
                if not list(ROOT.glob(path.rstrip("./"))):
                    missing.append(f"{page.name}: {path}")
    assert not missing


def test_the_readme_shows_every_file_with_a_comment():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- files:start -->")[2]
    shown: set[Path] = set()
    parents = [ROOT]
    for line in tree.partition("```tree\n")[2].partition("\n```")[0].splitlines():
        name, _, comment = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        path = parents[depth] / name
        parents[depth + 1 :] = [path]
        assert comment.strip() or name == "src/ultrafuser/", line
        shown.add(path / "__init__.py" if (path / "__init__.py").is_file() else path)
    package = ROOT / "src" / "ultrafuser"
    on_disk = {file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {path for path in shown if path.suffix == ".py" and package in path.parents} == {
        file for file in on_disk if file.suffix == ".py"
    }
    data_files = {file for path in shown if path.suffix != ".py" for file in _files_of(path)}
    assert {file for file in on_disk if file.suffix != ".py"} <= data_files


def _files_of(path: Path) -> Iterator[Path]:
    """The files that one line of the tree stands for: a file, a pattern, or a folder without modules."""
    if path.is_dir():
        yield from () if list(path.glob("*.py")) else path.rglob("*")
    else:
        yield from path.parent.glob(path.name)


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_classes_and_functions_of_a_page_exist(name):
    references = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / name).read_text(encoding="utf-8"))
    assert len(references) > 10
    for path, name in references:
        source = (ROOT / "src" / "ultrafuser" / path).read_text(encoding="utf-8")
        assert re.search(rf"^(?:class|def) {name}\b", source, re.M), f"{path}::{name}"


def test_the_architecture_page_lists_the_parts_in_their_order():
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## One row")[0]
    layers = [re.findall(r"`(\w+)`", first) for first in re.findall(r"^\| (`.*?) \|", table, re.M)]
    layer_of = {part: i for i, layer in enumerate(layers) for part in layer}
    assert set(layer_of) == set(MAY_IMPORT) - {"_register", "__main__", "zoo"}
    for part, layer in layer_of.items():
        too_high = [name for name in MAY_IMPORT[part] if layer_of.get(name, 0) > layer]
        assert not too_high, f"{part} may import {too_high}, which stand below it on the page"


def test_links_between_pages_lead_somewhere():
    missing = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:")) and not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert not missing


@pytest.mark.parametrize("name", ["cli_docs", "recipe_docs", "demo_page", "compare_page", "gate_page", "tree"])
def test_generated_pages_are_fresh(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--check"])
    try:
        script(name).main()
    except SystemExit as exit:
        assert not exit.code


def test_the_checkpoint_page_names_every_field_of_a_manifest(workspace):
    page = ROOT / "docs" / "checkpoint.md"
    example = json.loads(next(text for language, text, _ in blocks(page) if language == "json"))
    real = json.loads((workspace / "my-fused" / "config.json").read_text())
    assert set(real) == set(example)
    assert set(real["specialists"][0]) <= set(example["specialists"][0])
    assert set(real["specialists"][0]["source"]) <= set(example["specialists"][0]["source"])


def test_the_data_page_lists_the_layouts_in_order():
    listed = re.findall(r"^\| (?:instruction|pair) \| (.*) \|$", (ROOT / "docs" / "data.md").read_text(), re.M)
    assert listed == [", ".join(f"`{column}`" for column in layout if column) for layout in PAIR_LAYOUTS]


def test_the_command_page_is_what_help_says(capsys, monkeypatch):
    """Every option of the page is in --help, and every option in --help is on the page."""
    for command in script("cli_docs").commands():
        monkeypatch.setattr(sys, "argv", ["ultrafuser", *command.split(), "--help"])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit):
            command_line()
        helped = set(re.findall(r"^[^\w-]*(--[a-z-]+)", capsys.readouterr().out, re.M)) - {"--help"}
        parameters = script("cli_docs").parameters(command)
        listed = {name for parameter in parameters for name in parameter.names if name.startswith("--")}
        assert listed == helped


def test_the_example_of_a_client_runs(server, capsys, monkeypatch):
    pytest.importorskip("openai", reason="the official client is not installed")
    monkeypatch.delenv("ULTRAFUSER_API_KEY", raising=False)
    server.models = listed({"id": "fused"})
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "specialist_shares": {"s0": 0.5, "s1": 0.5}}
    tokens = weighted(["Hello", " you"], [[0.9, 0.1], [0.1, 0.9]], "stop")
    server.script = [streamed(tokens, {**tokens, "choices": [], "usage": usage})]
    script("serve_and_chat").main([server.url, "hi"])
    out = capsys.readouterr().out
    assert "Hello you\n" in out and " s0  0.50" in out
    assert server.requests[0]["gate_weights"] is True and server.requests[0]["model"] == "fused"


def test_the_example_runs(workspace, tmp_path):
    specialists = [f"{name}={workspace / 'models' / name}" for name in ("text", "code")]
    command = [sys.executable, str(ROOT / "examples" / "fuse_and_chat.py"), *specialists]
    command += ["--prompt", "Hello?", "--max-new-tokens", "8", "--output", str(tmp_path / "fused")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    weights = [line.split()[:2] for line in output.splitlines()[1:9]]
    assert all(abs(float(a) + float(b) - 1) < 2e-3 for a, b in weights)
    assert (tmp_path / "fused" / "config.json").is_file()
