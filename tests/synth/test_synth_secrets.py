"""A whole synthesis at an endpoint that sends its key and password back: neither is in any file or on any stream."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fake_async_endpoint import fake_async_endpoint
from fake_endpoint import Step, failing, fine
from fake_writer import reply_to, tiny
from ultrafuser.cli.main import app
from ultrafuser.synth.recipe import dump_synth_recipe

pytest.importorskip("aiohttp", reason="the synth extra is not installed")
KEY, PASSWORD = "sk-mango-1234567890", "mango-password"
SENT = b64encode(f"user:{PASSWORD}".encode()).decode()
SECRETS = (KEY, PASSWORD, SENT, "user:")


def echoing(question: str, repeats: int) -> Step:
    """A sensible answer, often with the secrets in it, or a failure that names them."""
    words = f"Bearer {KEY}, Basic {SENT}, user:{PASSWORD}."
    draw = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 8
    if draw == 0:
        return failing(400, f"not with {words}")
    if draw == 1 and not repeats:
        return failing(500, words)
    if draw == 2:
        return Step(f"<html>{words}</html>")
    if draw == 3:
        return fine(f"{reply_to(question)} {words}")
    return fine(reply_to(question))


@pytest.mark.parametrize("login", ["", f"user:{PASSWORD}@"])
def test_no_file_and_no_stream_has_a_secret(tmp_path: Path, monkeypatch, login):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    output = tmp_path / "out"
    with fake_async_endpoint(echoing) as server:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(dump_synth_recipe(tiny()))
        url = server.url.replace("//", f"//{login}")
        words = ["synth", recipe, f"models.writer.endpoint.base_url={url}", f"output={output}"]
        words += ["models.writer.endpoint.backoff_s=0", "models.writer.endpoint.retries=0"]
        result = CliRunner().invoke(app, [*map(str, words)])
        assert result.exit_code == 0, (result.output, result.exception)
        sent = {headers["authorization"] for headers in server.headers}
    assert sent == {f"Basic {SENT}" if login else f"Bearer {KEY}"}
    files = [file for file in output.rglob("*") if file.is_file()]
    texts = {str(file): file.read_bytes().decode("utf-8", "replace") for file in files} | {"streams": result.output}
    assert {"README.md", "report.json", "recipe.yaml", "calls.sqlite"} <= {file.name for file in files}
    assert "***" in texts[str(output / "report.json")]
    found = {name for name, text in texts.items() for secret in SECRETS if secret in text and (login or secret == KEY)}
    assert found == set()
