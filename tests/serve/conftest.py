"""Renderers, and running servers over scripted engines and over a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from embedded_fixtures import fused, renderer_of
from scripted_engine import RunningServer, ScriptedEngine, serving
from ultrafuser.data.templates import Renderer
from ultrafuser.serve.embedded import EmbeddedEngine


@pytest.fixture(scope="session")
def three_templates(tokenizer: Any) -> Renderer:
    """Three specialists that read chats in different templates."""
    return renderer_of(tokenizer)


@pytest.fixture
def serve(three_templates: Renderer) -> Iterator[Callable[..., RunningServer]]:
    """serve(engine, **settings): a running server, to the end of the test."""
    with ExitStack() as stack:

        def serve(engine: ScriptedEngine | None = None, **settings: Any) -> RunningServer:
            return stack.enter_context(serving(engine or ScriptedEngine(), three_templates, **settings))

        yield serve


@pytest.fixture(scope="module")
def tiny_server(tokenizer: Any, three_templates: Renderer) -> Iterator[RunningServer]:
    """A server over three tiny specialists and the embedded engine."""
    engine = EmbeddedEngine(fused(tokenizer), three_templates)
    with serving(engine, three_templates) as server:
        yield server
