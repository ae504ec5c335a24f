"""Serve a fused model on vLLM's own OpenAI server, with the extension of the API."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultrafuser.errors import MissingExtraError, UltraFuserError
from ultrafuser.model.checkpoint import fused_folder
from ultrafuser.printing import echo_error
from ultrafuser.serve.server import bind, is_local, url
from ultrafuser.serve.vllm_middleware import FusedAPI, Limits
from ultrafuser.serve.vllm_prompts import chat_template
from ultrafuser.specialists import load_renderer
from ultrafuser.vllm_plugin.gate_worker import GateWorker

TESTED_VERSIONS = ((0, 32), (0, 33))  # from the first on, before the second


def is_installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


def run(
    folder: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    served_model_name: str | None = None,
    limits: Limits | None = None,
    max_queued: int | None = None,
    extra_args: Sequence[str] = (),
) -> None:
    """Serve until the process is told to stop.

    Args:
        folder: a fused checkpoint, or its hub id.
        port: 0: any free one.
        api_key: that requests must send. None: from the variable `VLLM_API_KEY`, or none.
        served_model_name: in requests and answers. Default: the name of the folder.
        max_queued: unfinished requests. The next one gets status 429. None: no limit.
        extra_args: further options of `vllm serve`.

    Raises:
        MissingExtraError: vLLM is not installed.
        UltraFuserError: another version of vLLM, no fused model, prompts that vLLM cannot write, a port in use.
    """
    check_version()
    limits = limits or Limits()
    local = fused_folder(folder)
    renderer = load_renderer(local)
    with contextlib.closing(bind(host, port)) as listener:  # vLLM would find out after it has loaded the model
        address, port, is_open = url(listener), listener.getsockname()[1], not is_local(listener)
    limits.to_environment()
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # GateWorker follows the batch of V1
    if api_key is not None:
        os.environ["VLLM_API_KEY"] = api_key  # an argument would show in the list of processes
    with tempfile.TemporaryDirectory(prefix="ultrafuser-") as temporary:
        options = []
        if not _names_option(extra_args, "--chat-template"):
            template, variables = chat_template(renderer)
            file = Path(temporary) / "chat_template.jinja"
            file.write_text(template, encoding="utf-8")
            options = ["--chat-template", str(file), "--chat-template-content-format", "string"]
            options += ["--default-chat-template-kwargs", json.dumps(variables)] if variables else []
        name = served_model_name or Path(folder).resolve().name
        options += arguments(local, host, port, name, limits, max_queued, extra_args)
        echo_error(f"ultrafuser: serving {name} on vLLM at {address}/v1, as soon as it has loaded the model")
        if is_open and api_key is None and not os.environ.get("VLLM_API_KEY"):
            echo_error("ultrafuser: everybody who reaches this address can use the model. Set ULTRAFUSER_API_KEY")
        _serve(options)


def check_version() -> None:
    """Check that vLLM is installed in a version that the plugin was tested with.

    Raises:
        MissingExtraError, UltraFuserError: it is not.
    """
    if not is_installed():
        raise MissingExtraError("vllm", "vllm", "Serving with --engine vllm")
    from vllm import __version__

    numbers = re.match(r"(\d+)\.(\d+)", __version__)
    low, high = TESTED_VERSIONS
    if numbers is None or not low <= (int(numbers[1]), int(numbers[2])) < high:
        expected = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise UltraFuserError(
            f"vLLM {__version__} is installed, and fused models are tested with {expected}. Run: pip install 'vllm{expected}', "
            "or serve with --engine embedded"
        )


def arguments(
    folder: Path,
    host: str,
    port: int,
    name: str,
    limits: Limits,
    max_queued: int | None,
    extra_args: Sequence[str],
) -> list[str]:
    """The options of `vllm serve`. Those of the user come last, so they win."""
    options = [str(folder), "--host", host, "--port", str(port), "--served-model-name", name]
    options += ["--middleware", _path(FusedAPI), "--worker-extension-cls", _path(GateWorker)]
    options += ["--shutdown-timeout", str(int(limits.shutdown_s))]
    if max_queued is not None:
        options += ["--max-num-queued-reqs", str(max_queued)]
    if limits.max_new_tokens is not None:
        options += ["--override-generation-config", json.dumps({"max_new_tokens": limits.max_new_tokens})]
    if _names_option(extra_args, "--speculative-config"):
        options.append("--no-async-scheduling")  # positions of tokens are certain only when each step has ended
    return [*options, *extra_args]


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _names_option(extra_args: Sequence[str], option: str) -> bool:
    return any(argument == option or argument.startswith(f"{option}=") for argument in extra_args)


def _serve(options: list[str]) -> None:
    """`vllm serve`. Its own program looks for a package named vllm, which the CPU build is not."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="ultrafuser serve"))
    parsed: Any = parser.parse_args(options)
    configure_logging_from_args(parsed)
    command = ServeSubcommand()
    command.validate(parsed)
    command.cmd(parsed)
