"""The start of vLLM's server: its options, the chat template, and what stops it with a clear error."""

from __future__ import annotations

import json
import socket
import sys
import types

import pytest

pytest.importorskip("starlette", reason="the serve extra is not installed")

from ultrafuser.data.chat_format import BUILTIN, ChatFormat
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import CheckpointError, MissingExtraError, UltraFuserError
from ultrafuser.serve import vllm_server
from ultrafuser.serve.vllm_middleware import Limits
from ultrafuser.serve.vllm_prompts import chat_template
from ultrafuser.specialists import load_renderer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "how many?"}
CLOCK = "{{ strftime_now('%d %b %Y') }} " + BUILTIN["chatml"]


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the installed package, whose version can be set."""
    module = types.ModuleType("vllm")
    module.__version__ = "0.32.0"
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_server, "is_installed", lambda: True)
    return module


@pytest.mark.parametrize("policy", ["keep", "merge", "drop"])
@pytest.mark.parametrize("template", [BUILTIN["chatml"], BUILTIN["plain"], CLOCK])
@pytest.mark.parametrize(
    "messages", [[USER], [SYSTEM, USER], [USER, {"role": "assistant", "content": "2"}, SYSTEM, USER]]
)
def test_vllm_writes_the_prompts_of_the_renderer(tokenizer, template, policy, messages):
    renderer = Renderer(tokenizer, [ChatFormat(tokenizer, template, system=policy, date="2024-02-03")] * 2)
    text, variables = chat_template(renderer)
    json.dumps(variables)  # they are an option of the command line
    options = {"add_generation_prompt": True, "return_dict": False}
    ids = tokenizer.apply_chat_template(messages, chat_template=text, **options, **variables)
    assert [ids, ids] == renderer.prompt(messages)


def test_variables_of_the_template_are_passed_on(tokenizer):
    template = "{{ mood }} " + BUILTIN["chatml"]
    renderer = Renderer(tokenizer, [ChatFormat(tokenizer, template, template_kwargs={"mood": "calm"})])
    assert chat_template(renderer) == (template, {"mood": "calm"})


def test_specialists_with_different_prompts_need_the_embedded_engine(tokenizer):
    formats = [ChatFormat(tokenizer, BUILTIN[name], name=name) for name in ("chatml", "plain")]
    with pytest.raises(UltraFuserError, match="'plain' reads other prompts than 'chatml'.*--engine embedded"):
        chat_template(Renderer(tokenizer, formats))


def test_a_generation_prompt_unlike_the_trained_ones_needs_the_embedded_engine(tokenizer):
    template = BUILTIN["chatml"].replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant: {% endif %}")
    with pytest.raises(UltraFuserError, match="does not write the prompts that the model was trained with"):
        chat_template(Renderer(tokenizer, [ChatFormat(tokenizer, template)]))


def test_the_renderer_needs_no_weights(tiny_run, tmp_path):
    from ultrafuser.specialists import fuse, make_renderer

    model, tokenizer = fuse(tiny_run.recipe(tmp_path / "run"))
    model.save_pretrained(tmp_path / "fused")
    tokenizer.save_pretrained(tmp_path / "fused")
    (tmp_path / "fused" / "model.safetensors").unlink()
    assert load_renderer(tmp_path / "fused").prompt([USER]) == make_renderer(model, tokenizer).prompt([USER])


def test_without_vllm_the_error_names_the_command(monkeypatch):
    monkeypatch.setattr(vllm_server, "is_installed", lambda: False)
    with pytest.raises(MissingExtraError, match=r'pip install "ultrafuser\[vllm\]"'):
        vllm_server.run("anywhere")


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.0", "dev"])
def test_other_versions_of_vllm_are_refused(vllm, version):
    vllm.__version__ = version
    with pytest.raises(UltraFuserError, match=f"vLLM {version} is installed.*pip install 'vllm>=0.32,<0.33'"):
        vllm_server.run("anywhere")
    vllm.__version__ = "0.32.1+cpu"
    vllm_server.check_version()


def test_a_folder_that_is_no_fused_model(vllm, tiny_run):
    with pytest.raises(CheckpointError, match="expected 'ultrafuser'. Fuse it with"):
        vllm_server.run(str(tiny_run.folder / "text"))
    with pytest.raises(CheckpointError, match="no such folder"):
        vllm_server.run("./nowhere")


@pytest.fixture
def fused(tiny_run, tmp_path):
    from ultrafuser.specialists import fuse

    one_template = [{"name": name, "model": str(tiny_run.folder / name)} for name in ("text", "code")]
    model, tokenizer = fuse(tiny_run.recipe(tmp_path / "run", specialists=one_template))
    model.save_pretrained(tmp_path / "fused")
    tokenizer.save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


def test_a_port_in_use_is_found_before_the_model_is_loaded(vllm, fused):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UltraFuserError, match=f"port {port} of 127.0.0.1 cannot be used"):
            vllm_server.run(str(fused), port=port)


def test_the_start_line_has_the_address(vllm, fused, monkeypatch, capsys):
    started: list[list[str]] = []
    monkeypatch.setattr(vllm_server, "_serve", started.append)
    for name in ("VLLM_API_KEY", "VLLM_USE_V2_MODEL_RUNNER", "ULTRAFUSER_SERVER_LIMITS"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    vllm_server.run(str(fused), port=0)
    port = started[0][started[0].index("--port") + 1]
    line = f"serving fused on vLLM at http://127.0.0.1:{port}/v1, as soon as it has loaded the model"
    assert capsys.readouterr().err.strip().endswith(line)
    vllm_server.run(str(fused), host="0.0.0.0", port=0)
    assert "everybody who reaches this address" in capsys.readouterr().err
    vllm_server.run(str(fused), host="0.0.0.0", port=0, api_key="secret", extra_args=["--chat-template", "x.jinja"])
    assert "everybody" not in capsys.readouterr().err
    assert "secret" not in started[2] and started[2].count("--chat-template") == 1


def test_options_of_vllm(tmp_path):
    limits = Limits(max_new_tokens=100, shutdown_s=5)
    options = vllm_server.arguments(tmp_path, "::1", 81, "fused", limits, 7, ["--max-model-len", "64"])
    pairs = dict(zip(options[1:], options[2:], strict=False))
    assert options[0] == str(tmp_path) and options[-2:] == ["--max-model-len", "64"]
    assert pairs["--middleware"] == "ultrafuser.serve.vllm_middleware.FusedAPI"
    assert pairs["--worker-extension-cls"] == "ultrafuser.vllm_plugin.gate_worker.GateWorker"
    assert pairs["--max-num-queued-reqs"] == "7" and pairs["--shutdown-timeout"] == "5"
    assert json.loads(pairs["--override-generation-config"]) == {"max_new_tokens": 100}
    assert "--no-async-scheduling" not in options
    speculative = vllm_server.arguments(tmp_path, "::1", 81, "fused", limits, None, ["--speculative-config={}"])
    assert "--no-async-scheduling" in speculative and "--max-num-queued-reqs" not in speculative


def test_limits_pass_through_the_environment(monkeypatch):
    monkeypatch.setenv("ULTRAFUSER_SERVER_LIMITS", "{}")
    limits = Limits(max_body_bytes=3, max_new_tokens=4, timeout_s=5.5, shutdown_s=1)
    limits.to_environment()
    assert Limits.from_environment() == limits
