"""Prompts: our Jinja files, or those of a user's folder. Text that a model wrote is quoted as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel

from ultrafuser.errors import RecipeError
from ultrafuser.synth.recipe import DomainRecipe

# Variables of each file, with example values. Every file is rendered with them before the first request.
_DOMAIN = DomainRecipe(
    name="domain", description="What the domain is.", instruction_style="How they look.", answer_style="How they look."
)
_QUESTION, _ANSWER = "How many days has a week?", "A week has seven days."
EXAMPLES: dict[str, dict[str, Any]] = {
    "meta_topics": {"domain": _DOMAIN, "number": 2, "known": ["a topic"]},
    "sub_topics": {"domain": _DOMAIN, "number": 2, "known": ["a sub-topic"], "topic": "a topic", "num_concepts": 3},
    "instructions": {
        "domain": _DOMAIN, "number": 2, "known": [_QUESTION], "topic": "a topic", "subtopic": "a sub-topic",
        "concepts": ["a concept"],
    },
    "expand": {
        "domain": _DOMAIN, "number": 2, "relation": "strong", "topic": "a topic", "subtopic": "a sub-topic",
        "examples": [_QUESTION, "Name the months."],
    },
    "complex": {"domain": _DOMAIN, "instruction": _QUESTION},
    "responses": {"domain": _DOMAIN, "instruction": _QUESTION, "history": [{"user": _QUESTION, "assistant": _ANSWER}]},
    "turns": {"domain": _DOMAIN, "history": [{"user": _QUESTION, "assistant": _ANSWER}]},
    "judge": {"domain": _DOMAIN, "instruction": _QUESTION, "answer": _ANSWER},
}  # fmt: skip
ALWAYS = ("mark", "quote", "reply")
NAMES = tuple(EXAMPLES)
_RENDER_ERRORS = (
    TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError
)  # fmt: skip


@dataclass(frozen=True)
class _Prompt:
    location: str
    template: Template
    sha256: str


class Prompts:
    """The templates of all stages, checked.

    Raises:
        RecipeError: the folder is missing, a file in it belongs to no stage, is not a Jinja template, or uses a variable
            that its stage does not have.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
        )
        if folder is not None:
            self._check_folder(Path(folder))
        self._prompts = {name: self._load(name) for name in NAMES}
        for name, example in EXAMPLES.items():
            self.render(name, **example)
            if name == "responses":
                self.render(name, **{**example, "history": []})

    def _check_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            raise RecipeError(f"prompts: no folder {folder}, expected one with files such as responses.jinja")
        unknown = sorted(file.name for file in folder.iterdir() if file.stem not in NAMES or file.suffix != ".jinja")
        if unknown := [name for name in unknown if not name.startswith((".", "README"))]:
            expected = ", ".join(f"{name}.jinja" for name in NAMES)
            raise RecipeError(f"prompts: {folder / unknown[0]} belongs to no stage; expected {expected}")

    def _load(self, name: str) -> _Prompt:
        custom = Path(self.folder) / f"{name}.jinja" if self.folder is not None else None
        if custom is not None and custom.is_file():
            location = str(custom)
            try:
                text = custom.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise RecipeError(f"{custom}: byte {error.start} is not UTF-8 text") from None
        else:
            location = f"prompts/{name}.jinja"
            text = (resources.files("ultrafuser.synth") / "prompts" / f"{name}.jinja").read_text(encoding="utf-8")
        try:
            unknown = meta.find_undeclared_variables(self._environment.parse(text)) - {*EXAMPLES[name], *ALWAYS}
            template = self._environment.from_string(text)
        except TemplateSyntaxError as error:
            raise RecipeError(f"{location}: line {error.lineno}: not a Jinja template: {error.message}") from None
        if unknown:
            allowed = ", ".join(sorted([*EXAMPLES[name], *ALWAYS]))
            raise RecipeError(f"{location}: undefined variable {sorted(unknown)[0]!r}; this file may use: {allowed}")
        return _Prompt(location, template, hashlib.sha256(text.encode()).hexdigest())

    def render(self, name: str, **values: Any) -> str:
        """A prompt as one text. `quote(text)` puts text between two lines with a mark that the text cannot contain.

        Text after `reply` is the start of the reply, below another line with that mark.

        Raises:
            RecipeError: the template cannot be rendered.
        """
        return self._render(name, _mark(values), values)

    def _render(self, name: str, mark: str, values: Mapping[str, Any]) -> str:
        prompt = self._prompts[name]
        plain = _plain(values)
        try:
            return prompt.template.render(mark=mark, quote=_quote(mark), reply=_reply_line(mark), **plain).strip()
        except UndefinedError as error:
            raise RecipeError(f"{prompt.location}: undefined variable: {error.message}") from None
        except _RENDER_ERRORS as error:
            raise RecipeError(f"{prompt.location}: the template cannot be rendered: {error}") from None

    def messages(self, name: str, **values: Any) -> tuple[tuple[str, str], ...]:
        """The prompt as one user message, and the start of the reply if the template has one.

        Text that a model wrote never becomes a system message.
        """
        mark = _mark(values)
        prompt, _, reply_start = self._render(name, mark, values).partition(_reply_line(mark).strip())
        return (("user", prompt.strip()), *([("assistant", reply_start.strip())] if reply_start.strip() else []))

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each template's text, by stage."""
        return {name: prompt.sha256 for name, prompt in self._prompts.items()}


def _plain(value: Any) -> Any:
    """A copy made of dictionaries, lists, texts and numbers. Jinja's sandbox lets a template call every other public method."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"a prompt template gets plain values, not {type(value).__name__}")


def _quote(mark: str) -> Callable[..., str]:
    def quote(text: str, what: str = "text") -> str:  # templates may pass `what` by name
        return f"=== {what} {mark}\n{text}\n=== end of {what} {mark}"

    return quote


def _reply_line(mark: str) -> str:
    return f"\n=== reply {mark}\n"


def _mark(values: Mapping[str, Any]) -> str:
    """A hash of all quoted text: no text can contain the hash of something that includes it."""
    plain = {key: value for key, value in values.items() if key != "domain"}
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
