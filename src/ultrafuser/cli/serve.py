"""`ultrafuser serve`: an OpenAI-compatible server for a fused model."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ultrafuser.cli.ending import how_to_go_on
from ultrafuser.cli.options import (
    DTYPES,
    SERVER_PACKAGES,
    Device,
    Dtype,
    Folder,
    TrustRemoteCode,
    check_choice,
    check_packages,
    load_folder,
)
from ultrafuser.errors import RecipeError
from ultrafuser.printing import echo_error

if TYPE_CHECKING:
    import socket

    from ultrafuser.serve.app import Settings

ENGINES = ("auto", "embedded", "vllm")


@how_to_go_on("The server had not started", resumes=False)
def serve_command(
    folder: Folder,
    vllm_options: Annotated[
        list[str] | None,
        Argument(help="With the engine vllm: options of `vllm serve`, after `--`.", metavar="VLLM_OPTIONS"),
    ] = None,
    host: Annotated[str, Option(help="Address to listen on. 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on. 0: any free one.")] = 8000,
    engine: Annotated[
        str, Option(help="vllm, embedded (transformers, for a few users), or auto: vllm if it is installed.")
    ] = "auto",
    api_key: Annotated[
        str | None,
        Option(
            envvar="ULTRAFUSER_API_KEY",
            help="Key that requests must send. Prefer the variable ULTRAFUSER_API_KEY: other users see options.",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, Option(help="Name of the model in requests and answers. Default: the name of the folder.")
    ] = None,
    max_batch_size: Annotated[int, Option(min=1, help="Generate this many answers at once. Embedded engine.")] = 16,
    max_batch_tokens: Annotated[
        int, Option(min=1, help="Keep states of this many tokens for the running answers. Embedded engine.")
    ] = 32768,
    max_cached_tokens: Annotated[
        int, Option(min=0, help="Keep states of this many tokens for later turns and equal prompts. Embedded engine.")
    ] = 4096,
    max_waiting: Annotated[int, Option(min=0, help="Let this many answers wait. Further ones get status 429.")] = 256,
    max_tokens: Annotated[
        int | None, Option(min=1, help="Largest number of tokens of one answer. Default: what the context leaves.")
    ] = None,
    timeout: Annotated[float, Option(min=0.1, help="Seconds after which an unfinished answer is cut off.")] = 600.0,
    grace: Annotated[float, Option(min=0.0, help="Seconds for running answers after SIGTERM or Ctrl-C.")] = 30.0,
    cors_origin: Annotated[
        list[str] | None, Option(help="Let web pages of this origin use the server. *: all. Repeatable.")
    ] = None,
    playground: Annotated[
        bool, Option("--playground", help="Also serve the page of `ultrafuser playground`. Embedded engine.")
    ] = False,
    open_metrics: Annotated[bool, Option("--open-metrics", help="Serve /metrics without the key.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a fused model: the OpenAI API, with gate weights.

    Requests and errors are logged on stderr. Ctrl-C or SIGTERM finishes the running answers. A second one ends at once.
    """
    check_choice("--engine", engine, ENGINES)
    check_choice("--dtype", dtype, DTYPES)
    _check_key(api_key)
    name = served_model_name or Path(folder).resolve().name
    if engine == "vllm" or (engine == "auto" and importlib.util.find_spec("vllm") is not None):
        if playground:
            raise RecipeError(
                f"--playground needs the embedded engine. Leave it out, then run: ultrafuser playground http://{host}:{port}"
            )
        from ultrafuser.serve.vllm_middleware import Limits as VLLMLimits
        from ultrafuser.serve.vllm_server import run as run_vllm

        options = ["--dtype", dtype, *(["--trust-remote-code"] if trust_remote_code else []), *(vllm_options or [])]
        options = ["--allowed-origins", json.dumps(cors_origin), *options] if cors_origin else options
        limits = VLLMLimits(max_new_tokens=max_tokens, timeout_s=timeout, shutdown_s=grace, open_metrics=open_metrics)
        run_vllm(
            folder,
            host=host,
            port=port,
            api_key=api_key,
            served_model_name=name,
            limits=limits,
            max_queued=max_waiting,
            extra_args=options,
        )
        return
    if vllm_options:
        raise RecipeError(
            f"{vllm_options[0]!r} is for vLLM, but the engine is embedded. Leave it out, or --engine vllm"
        )
    check_packages(SERVER_PACKAGES, "serve", "ultrafuser serve")
    from ultrafuser.serve.app import Settings
    from ultrafuser.serve.limits import MAX_CHOICES, Limits
    from ultrafuser.serve.server import bind

    listener = bind(host, port)
    settings = Settings(
        name,
        api_key=api_key,
        open_metrics=open_metrics,
        cors_origins=tuple(cors_origin or ()),
        limits=Limits(
            max_new_tokens=max_tokens,
            timeout_s=timeout,
            max_choices=min(MAX_CHOICES, max_batch_size + max_waiting),
        ),
    )
    model, renderer = load_folder(folder, dtype, device, None, trust_remote_code)
    from ultrafuser.serve.embedded import EmbeddedEngine

    embedded = EmbeddedEngine(
        model,
        renderer,
        max_batch_size=max_batch_size,
        max_waiting=max_waiting,
        max_batch_tokens=max_batch_tokens,
        max_cached_tokens=max_cached_tokens,
    )
    _serve(embedded, renderer, settings, listener, grace, playground)


def _serve(
    engine: Any, renderer: Any, settings: Settings, listener: socket.socket, grace_s: float, has_page: bool
) -> None:
    from ultrafuser.serve.app import build_app
    from ultrafuser.serve.server import Server, is_local, run, url

    def announce() -> None:
        address = url(listener)
        echo_error(
            f"ultrafuser: serving {settings.model_name} ({', '.join(engine.names)}) at {address}/v1 with the embedded engine, "
            "for one user or a few. Load belongs to vLLM: pip install 'ultrafuser[vllm]'"
        )
        if has_page:
            echo_error(f"ultrafuser: the playground is at {address}")
        if settings.api_key is None and not is_local(listener):
            echo_error("ultrafuser: everybody who reaches this address can use the model. Set ULTRAFUSER_API_KEY")

    _log_requests()
    app = build_app(engine, renderer, settings)
    if has_page:
        from ultrafuser.playground.routes import add_playground

        add_playground(app)
    run(Server(app, engine, grace_s, announce), listener)


def _check_key(api_key: str | None) -> None:
    """Raises RecipeError: a key that no header can hold."""
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise RecipeError("--api-key or ULTRAFUSER_API_KEY is empty, or has blanks or characters that are not ASCII")


def _log_requests() -> None:
    """One line on stderr for each request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    access_log = logging.getLogger("ultrafuser.access")
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
