"""Models whose code is in their repository: it never runs unasked, nobody is asked on the terminal, and it runs if trusted."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ultrafuser
from tiny_models import save_adapter, tiny, tokens
from ultrafuser.cli.main import app
from ultrafuser.errors import CheckpointError
from ultrafuser.info import describe
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse

IDS = tokens(2, 7)
NEEDS_CODE = "specialist 'odd': .* needs the code in its repository, which does not run unless you allow it. .*--trust-remote-code"
MARK = "from pathlib import Path\n\nPath({marker!r}).touch()\n"
CONFIGURATION = """
from transformers import LlamaConfig

class OddConfig(LlamaConfig):
    model_type = "odd"
"""
MODELING = """
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_odd import OddConfig

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

class OddModel(LlamaModel):
    config_class = OddConfig
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="session")
def modules(tmp_path_factory) -> Path:
    """Where transformers copies code to import it. A process has one such folder."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(autouse=True)
def marker(tmp_path, monkeypatch, modules) -> Path:
    """A file that exists once code of a repository has run. A question on the terminal fails the test."""

    def asked(*_):
        raise AssertionError("somebody was asked on the terminal")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    return tmp_path / "code-has-run"


def edit(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def plain(tmp_path, tokenizer) -> Path:
    """An ordinary model."""
    tiny(vocab_size=len(tokenizer), seed=3).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def odd(plain, tmp_path, marker) -> Path:
    """The same weights, behind an architecture of its own."""
    folder = Path(shutil.copytree(plain, tmp_path / "odd-model"))
    (folder / "configuration_odd.py").write_text(MARK.format(marker=str(marker)) + CONFIGURATION)
    (folder / "modeling_odd.py").write_text(MARK.format(marker=str(marker)) + MODELING)
    auto_map = {
        "AutoConfig": "configuration_odd.OddConfig",
        "AutoModel": "modeling_odd.OddModel",
        "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
    }
    edit(folder / "config.json", model_type="odd", architectures=["OddForCausalLM"], auto_map=auto_map)
    return folder


def give_odd_tokenizer(folder: Path, marker: Path) -> Path:
    (folder / "tokenization_odd.py").write_text(MARK.format(marker=str(marker)) + TOKENIZATION)
    auto_map = {"AutoTokenizer": [None, "tokenization_odd.OddTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OddTokenizer", auto_map=auto_map)
    return folder


def recipe(*specialists, **fields):
    return load_recipe({"specialists": list(specialists), "device": "cpu", "gate": {"hidden_size": 16}, **fields})


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_code_of_a_model_does_not_run_unasked(odd, plain, marker):
    for specialist in (
        {"name": "odd", "model": str(odd)},
        {"name": "odd", "model": str(odd), "trust_remote_code": False},
    ):
        with pytest.raises(CheckpointError, match=NEEDS_CODE):
            fuse(recipe(specialist))
    with pytest.raises(CheckpointError, match=NEEDS_CODE):
        fuse(
            recipe(
                {"name": "odd", "model": str(odd)}, {"name": "other", "model": str(plain), "trust_remote_code": True}
            )
        )
    assert not marker.exists()


def test_code_of_a_tokenizer_does_not_run_unasked(plain, marker):
    give_odd_tokenizer(plain, marker)
    with pytest.raises(CheckpointError, match=f"the tokenizer in .*{NEEDS_CODE.split('.*')[1]}"):
        fuse(recipe({"name": "odd", "model": str(plain)}))
    assert not marker.exists()


def test_code_of_an_adapters_tokenizer_does_not_run_unasked(plain, marker, tmp_path, tokenizer):
    adapter = save_adapter(AutoModelForCausalLM.from_pretrained(plain), tmp_path / "lora")
    tokenizer.save_pretrained(adapter)
    give_odd_tokenizer(adapter, marker)
    specialist = {"name": "odd", "model": str(plain), "adapter": str(adapter)}
    with pytest.raises(CheckpointError, match="specialist 'odd': the tokenizer in .*lora needs the code"):
        fuse(recipe(specialist))
    assert not marker.exists()
    fuse(recipe(specialist | {"trust_remote_code": True}))
    assert marker.exists()


def test_code_beside_a_known_architecture_does_not_run_unasked(plain, odd, marker):
    """Falcon, Phi and others have code for older versions of transformers."""
    for file in odd.glob("*.py"):
        shutil.copy(file, plain)
    edit(plain / "config.json", auto_map=json.loads((odd / "config.json").read_text())["auto_map"])
    model, _ = fuse(recipe({"name": "odd", "model": str(plain)}))
    assert type(model.specialist("odd")).__name__ == "LlamaForCausalLM" and not marker.exists()


@pytest.mark.parametrize("copy", [False, True])
def test_trusted_code_runs_from_fusing_to_loading(odd, plain, marker, tmp_path, copy):
    give_odd_tokenizer(odd, marker)
    model, tokenizer = fuse(recipe({"name": "odd", "model": str(odd), "trust_remote_code": True}))
    assert marker.exists() and type(model.groups[0].model).__name__ == "OddForCausalLM"
    expected, _ = fuse(recipe({"name": "odd", "model": str(plain)}))
    assert torch.equal(logits(model), logits(expected))
    folder = tmp_path / "fused"
    model.save_pretrained(folder, copy=copy)
    tokenizer.save_pretrained(folder)
    if copy:
        names = {path.name for path in (folder / "specialists" / "odd").glob("*.py")}
        assert names == {"configuration_odd.py", "modeling_odd.py", "tokenization_odd.py"}
        shutil.rmtree(odd)
    marker.unlink()
    assert describe(folder, verify=True)["specialists"][0]["architecture"] == "odd"
    for refuses in (ultrafuser.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=NEEDS_CODE):
            refuses(folder, device_map="cpu")
    assert not marker.exists()
    loaded, renderer = ultrafuser.load(folder, device_map="cpu", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(expected))
    assert type(renderer.tokenizer).__name__ == "OddTokenizer"
    assert model.config.max_position_embeddings == loaded.config.max_position_embeddings == 64
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(expected))


def test_code_is_copied_only_if_it_is_trusted(plain, tmp_path):
    (plain / "modeling_odd.py").write_text("raise SystemExit")
    model, _ = fuse(recipe({"name": "odd", "model": str(plain)}))
    model.save_pretrained(tmp_path / "fused", copy=True)
    assert not list((tmp_path / "fused" / "specialists").rglob("*.py"))


def test_a_trained_specialist_with_code_loads_again(odd, tmp_path, marker):
    model, tokenizer = fuse(recipe({"name": "odd", "model": str(odd), "trust_remote_code": True}))
    with torch.no_grad():
        model.groups[0].model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "fused")
    tokenizer.save_pretrained(tmp_path / "fused")
    shutil.rmtree(odd)
    marker.unlink()
    with pytest.raises(CheckpointError, match=NEEDS_CODE):
        ultrafuser.load(tmp_path / "fused", device_map="cpu")
    assert not marker.exists()
    loaded, _ = ultrafuser.load(tmp_path / "fused", device_map="cpu", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_on_a_model_with_code(odd, plain, tmp_path):
    adapter = save_adapter(AutoModelForCausalLM.from_pretrained(plain), tmp_path / "lora")
    specialist = {"name": "odd", "adapter": str(adapter)}
    model, _ = fuse(recipe(specialist | {"model": str(odd)}, trust_remote_code=True))
    expected, _ = fuse(recipe(specialist | {"model": str(plain)}))
    assert torch.equal(logits(model), logits(expected))
    merged = model.specialist("odd")
    assert type(merged).__name__ == "OddForCausalLM"
    torch.testing.assert_close(logits(merged), logits(expected.specialist("odd")))


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "command",
    ["fuse", "train", "generate", "chat", "inspect", "eval", "compare", "data map", "data stats", "synth run"],
)
def test_every_command_that_loads_models_has_the_option(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"})
    assert "--trust-remote-code" in result.output


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_option_of_the_commands(odd, marker, tmp_path):
    give_odd_tokenizer(odd, marker)
    fused, fuse_it = tmp_path / "fused", ("fuse", "-s", f"odd={odd}", "device=cpu", "-o", tmp_path / "fused")
    use_it = ("generate", fused, "--prompt", "hi", "--max-new-tokens", 2, "--device", "cpu")
    measure_it = (
        "data",
        "map",
        tmp_path / "rows.jsonl",
        "--model",
        odd,
        "--device",
        "cpu",
        "-o",
        tmp_path / "map.html",
    )
    rows = [{"domain": "text", "prompt": f"question {i}", "response": f"answer {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for command in (fuse_it, use_it, measure_it):
        marker.unlink(missing_ok=True)
        result = run(*command)
        assert result.exit_code != 0 and not marker.exists()
        assert isinstance(result.exception, CheckpointError) or "trust" in result.output
        result = run(*command, "--trust-remote-code")
        assert result.exit_code == 0, result.output
