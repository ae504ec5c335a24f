"""A judge model behind an endpoint: prompts, strict parsing of verdicts, and their cache."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from ultrafuser.data.answer_text import after_thinking, is_refusal
from ultrafuser.endpoint.client import Endpoint
from ultrafuser.endpoint.messages import Reply, Request
from ultrafuser.errors import EndpointError, UltraFuserError
from ultrafuser.progress import Progress

if TYPE_CHECKING:
    from ultrafuser.evaluate.lm.response_cache import ResponseCache

KIND = "judgement"  # of the values in the store
PAIR_VERDICTS = ("A", "B", "C")  # C: neither is better
RATINGS = tuple(str(rating) for rating in range(1, 11))
STATUSES = ("ok", "unparsed", "refused", "error")

_VERDICT = re.compile(r"\[\[([^\[\]]*)\]\]")


@dataclass(frozen=True)
class Question:
    """A prompt for the judge, and the verdicts that count."""

    prompt: str
    verdicts: tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation to rate."""

    question: str
    answer: str
    reference: str | None = None


@dataclass(frozen=True)
class Judgement:
    """The outcome of a question. It has a verdict only when the status is `ok`.

    Attributes:
        text: the judge's whole reply, or the error.
    """

    status: Literal["ok", "unparsed", "refused", "error"]
    verdict: str | None
    text: str


def pair_question(question: str, answer_a: str, answer_b: str) -> Question:
    """Which of two answers is better?"""
    return Question(_render("pair", question=question, answer_a=answer_a, answer_b=answer_b), PAIR_VERDICTS)


def rating_question(turns: Sequence[Turn]) -> Question:
    """How good is the answer of the last turn, from 1 to 10?"""
    return Question(_render("rate", turns=[asdict(turn) for turn in turns]), RATINGS)


def choice_question(question: str, answers: Sequence[str]) -> Question:
    """Which of several answers is best, counted from 1?"""
    indices = tuple(str(index) for index in range(1, len(answers) + 1))
    return Question(_render("choose", question=question, answers=list(answers)), indices)


def _render(name: str, **content: Any) -> str:
    """The prompt. Its sections end at a mark that they cannot contain: a hash of them all."""
    mark = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return _template(name).render(mark=mark, **content).strip()


@cache
def _template(name: str) -> Any:
    from jinja2 import Environment, StrictUndefined

    text = (resources.files("ultrafuser.evaluate.judged") / "prompts" / f"{name}.jinja").read_text(encoding="utf-8")
    return Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False).from_string(text)


def read_verdict(reply: Reply, verdicts: Sequence[str]) -> Judgement:
    """The verdict, if the last line holds it alone and no other line holds another one. It is never guessed.

    An empty reply, a content filter, or a reply that opens with a refusal counts as refused. The rest counts as
    unparsed, including truncated replies and reasoning that is never closed.
    """
    text = after_thinking(reply.text).strip()
    if reply.finish_reason == "content_filter" or reply.refusal:
        return Judgement("refused", None, reply.refusal or reply.text)
    unclosed = "<think>" in reply.text and "</think>" not in reply.text
    if reply.finish_reason == "length" or (unclosed and not text):
        return Judgement("unparsed", None, reply.text)
    if not text:
        return Judgement("refused", None, reply.text)
    last_line = _VERDICT.fullmatch(text.splitlines()[-1].strip())
    mentioned = set(_VERDICT.findall(text)) & set(verdicts)
    if last_line and mentioned == {last_line[1]}:
        return Judgement("ok", last_line[1], reply.text)
    return Judgement("refused" if not mentioned and is_refusal(text) else "unparsed", None, reply.text)


class Judge:
    """Asks a model for verdicts and saves them. A question that was answered before is not asked again.

    Errors are not saved, so a later run asks those questions again. When the endpoint dies (see
    `endpoint.client.MAX_FAILURES`), the run ends with an error that says how many judgements are saved.

    Args:
        endpoint: the judge model. A temperature of 0 makes its verdicts repeatable.
        store: saves the judgements.
        seed: of the order in which `choose_all` shows the answers.

    Attributes:
        counts: judgements so far by status, including those read from the store.
    """

    def __init__(self, endpoint: Endpoint, store: ResponseCache, *, seed: int = 0) -> None:
        self.endpoint, self.store, self.seed = endpoint, store, seed
        self.counts: Counter[str] = Counter()

    @property
    def identity(self) -> str:
        """Model, address and settings: besides the question, they decide a judgement."""
        recipe = self.endpoint.recipe
        settings = recipe.model_dump(include={"model", "base_url", "temperature", "max_tokens", "extra_body"})
        return json.dumps(settings, sort_keys=True)

    def ask_all(
        self, questions: Sequence[Question], *, title: str = "judgements", progress: Progress | None = None
    ) -> list[Judgement]:
        """A judgement of each question. Equal questions are asked once.

        Raises:
            EndpointError: the endpoint cannot be used, or died. Its judgements until then are saved.
        """
        progress = progress or Progress()
        identity = self.identity
        keys = [hashlib.sha256(f"{identity}\n{question.prompt}".encode()).hexdigest() for question in questions]
        judgements = {key: Judgement(**value) for key in keys if (value := self.store.get(KIND, key)) is not None}
        missing = {key: q for key, q in zip(keys, questions, strict=True) if key not in judgements}
        if missing:
            progress.start(title + (f" ({len(judgements)} saved)" if judgements else ""), len(missing))
            self._ask(missing, judgements, progress)
            progress.finish()
        self.counts.update(judgements[key].status for key in keys)
        return [judgements[key] for key in keys]

    def _ask(self, missing: Mapping[str, Question], judgements: dict[str, Judgement], progress: Progress) -> None:
        """Ask the missing questions and add their judgements."""
        keys = list(missing)
        requests = [Request([{"role": "user", "content": question.prompt}]) for question in missing.values()]
        try:
            for i, outcome in self.endpoint.ask_all(requests):
                if isinstance(outcome, Reply):
                    judgement = read_verdict(outcome, missing[keys[i]].verdicts)
                    self.store.put(KIND, keys[i], asdict(judgement))
                else:
                    judgement = Judgement("error", None, str(outcome))
                judgements[keys[i]] = judgement
                progress.advance()
        except EndpointError as error:
            saved = sum(judgement.status != "error" for judgement in judgements.values())
            total = len(judgements.keys() | missing.keys())
            raise EndpointError(
                f"{error}. {saved} of {total} judgements are saved. Run again to ask only the others"
            ) from error

    def choose_all(
        self, items: Sequence[tuple[str, Sequence[str]]], *, progress: Progress | None = None
    ) -> list[int | None]:
        """Index of the best answer of each (question, answers). None: the judge gave no readable verdict (see `counts`).

        The answers are shown in an order drawn from the seed, the question and the answers. Where all are equal,
        nothing is asked and the first one is chosen.

        Raises:
            UltraFuserError: an item without answers.
            EndpointError: the endpoint cannot be used, died, or left a question unanswered. The best answer is not
                guessed then. Choices that were made are saved.
        """
        if empty := [question for question, answers in items if not answers]:
            raise UltraFuserError(f"no answers to choose from, expected at least one. Question: {empty[0][:80]!r}")
        undecided = [i for i, (_, answers) in enumerate(items) if len(set(answers)) > 1]
        orders = [self._order(*items[i]) for i in undecided]
        questions = [
            choice_question(items[i][0], [items[i][1][k] for k in order])
            for i, order in zip(undecided, orders, strict=True)
        ]
        judgements = self.ask_all(questions, title="choices of the judge", progress=progress)
        if errors := [judgement.text for judgement in judgements if judgement.status == "error"]:
            raise EndpointError(
                f"{errors[0]}. {len(errors)} of {len(judgements)} choices were not made, the others are saved. Run again "
                "to ask only for those"
            )
        choices: list[int | None] = [0] * len(items)
        for i, order, judgement in zip(undecided, orders, judgements, strict=True):
            choices[i] = None if judgement.verdict is None else order[int(judgement.verdict) - 1]
        return choices

    def _order(self, question: str, answers: Sequence[str]) -> list[int]:
        order = list(range(len(answers)))
        random.Random(json.dumps([self.seed, question, list(answers)])).shuffle(order)
        return order
