"""A judge model behind an endpoint: our prompts, verdicts read strictly, every judgement kept the moment it is there."""

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
from typing import Any, Literal, Protocol

from ultrafuser.data.answer_text import after_thinking, is_refusal
from ultrafuser.endpoint.client import Endpoint
from ultrafuser.endpoint.messages import Reply, Request
from ultrafuser.errors import EndpointError, UltraFuserError
from ultrafuser.progress import Progress

KIND = "judgement"  # of the values in the store
PAIR_VERDICTS = ("A", "B", "C")  # C: neither is better
RATINGS = tuple(str(number) for number in range(1, 11))
STATUSES = ("ok", "unparsed", "refused", "error")

_VERDICT = re.compile(r"\[\[([^\[\]]*)\]\]")


class JudgementStore(Protocol):
    """Where judgements are kept; `answers.Store` is one."""

    def get(self, kind: str, key: str) -> Any | None:
        """The value, or None where there is none."""

    def put(self, kind: str, key: str, value: Any) -> None:
        """Keep a JSON-able value."""


@dataclass(frozen=True)
class Question:
    """What the judge is asked, and the verdicts that count."""

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
    """What came of a question: a verdict only when the status is `ok`.

    Attributes:
        text: the judge's whole reply, or the error.
    """

    status: Literal["ok", "unparsed", "refused", "error"]
    verdict: str | None
    text: str


# ---------------------------------------------------------------- questions


def pair_question(question: str, answer_a: str, answer_b: str) -> Question:
    """Which of two answers is better?"""
    return Question(_render("pair", question=question, answer_a=answer_a, answer_b=answer_b), PAIR_VERDICTS)


def rating_question(turns: Sequence[Turn]) -> Question:
    """How good is the answer of the last turn, from 1 to 10?"""
    return Question(_render("rate", turns=[asdict(turn) for turn in turns]), RATINGS)


def choice_question(question: str, answers: Sequence[str]) -> Question:
    """Which of several answers is best, counted from 1?"""
    numbers = tuple(str(number) for number in range(1, len(answers) + 1))
    return Question(_render("choose", question=question, answers=list(answers)), numbers)


def _render(name: str, **content: Any) -> str:
    """The prompt; its parts end at a mark that they cannot hold themselves, being a hash of all of them."""
    mark = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return _template(name).render(mark=mark, **content).strip()


@cache
def _template(name: str) -> Any:
    from jinja2 import Environment, StrictUndefined

    text = (resources.files("ultrafuser.evaluate.judged") / "prompts" / f"{name}.jinja").read_text(encoding="utf-8")
    return Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False).from_string(text)


# ---------------------------------------------------------------- verdicts


def read_verdict(reply: Reply, verdicts: Sequence[str]) -> Judgement:
    """The verdict, if the last line holds it alone and no other line holds another one; never a guess.

    Nothing at all, a content filter, or a reply that opens with a refusal counts as refused; the rest, replies that
    were cut off included, as unparsed.
    """
    text = after_thinking(reply.text).strip()
    if reply.finish_reason == "content_filter" or reply.refusal:
        return Judgement("refused", None, reply.refusal or reply.text)
    if reply.finish_reason == "length":
        return Judgement("unparsed", None, reply.text)
    if not text:
        return Judgement("refused", None, reply.text)
    last = _VERDICT.fullmatch(text.splitlines()[-1].strip())
    named = set(_VERDICT.findall(text)) & set(verdicts)
    if last and named == {last[1]}:
        return Judgement("ok", last[1], reply.text)
    return Judgement("refused" if not named and is_refusal(text) else "unparsed", None, reply.text)


# ---------------------------------------------------------------- the judge


class Judge:
    """Asks a model for verdicts and keeps them; a question that was answered before is not asked again.

    Errors are not kept, so a later run asks those questions again. When the endpoint dies (see
    `endpoint.client.MAX_FAILURES`), the run ends with an error that says how many judgements are kept.

    Args:
        endpoint: the judge model. A temperature of 0 makes its verdicts repeatable.
        store: where judgements are kept; None: in memory only.
        seed: of the order in which `choose` shows the answers.

    Attributes:
        counts: judgements so far by status, those read from the store included.
    """

    def __init__(self, endpoint: Endpoint, store: JudgementStore | None = None, *, seed: int = 0) -> None:
        self.endpoint, self.seed = endpoint, seed
        self.store: JudgementStore = _Memory() if store is None else store
        self.counts: Counter[str] = Counter()

    @property
    def identity(self) -> str:
        """Model, address and settings: what decides a judgement beside the question."""
        recipe = self.endpoint.recipe
        settings = recipe.model_dump(include={"model", "base_url", "temperature", "max_tokens", "extra_body"})
        return json.dumps(settings, sort_keys=True)

    def ask_all(
        self, questions: Sequence[Question], *, what: str = "judgements", progress: Progress | None = None
    ) -> list[Judgement]:
        """A judgement of each question, equal questions being asked once.

        Raises:
            EndpointError: the endpoint cannot be used, or died; what it answered until then is kept.
        """
        progress = progress or Progress()
        keys = [self._key(question) for question in questions]
        found = {key: Judgement(**kept) for key in keys if (kept := self.store.get(KIND, key)) is not None}
        missing = {key: q for key, q in zip(keys, questions, strict=True) if key not in found}
        if missing:
            progress.start(what + (f" ({len(found)} kept)" if found else ""), len(missing))
            self._ask(missing, found, progress)
            progress.finish()
        out = [found[key] for key in keys]
        self.counts.update(judgement.status for judgement in out)
        return out

    def _ask(self, missing: Mapping[str, Question], found: dict[str, Judgement], progress: Progress) -> None:
        keys = list(missing)
        requests = [Request([{"role": "user", "content": question.prompt}]) for question in missing.values()]
        try:
            for i, outcome in self.endpoint.ask_all(requests):
                if isinstance(outcome, Reply):
                    found[keys[i]] = read_verdict(outcome, missing[keys[i]].verdicts)
                    self.store.put(KIND, keys[i], asdict(found[keys[i]]))
                else:
                    found[keys[i]] = Judgement("error", None, str(outcome))
                progress.advance()
        except EndpointError as error:
            kept = sum(judgement.status != "error" for judgement in found.values())
            total = len(found.keys() | missing.keys())
            raise EndpointError(
                f"{error}; {kept} of {total} judgements are kept, run again to ask only the others"
            ) from error

    def choose(self, question: str, answers: Sequence[str]) -> int | None:
        """Index of the best answer; None when the judge gives no readable verdict (see `counts`)."""
        return self.choose_all([(question, answers)])[0]

    def choose_all(
        self, items: Sequence[tuple[str, Sequence[str]]], *, progress: Progress | None = None
    ) -> list[int | None]:
        """The same for many (question, answers) at once.

        The answers are shown in an order drawn from the seed, the question and the answers. Where all are equal,
        nothing is asked and the first one is taken.

        Raises:
            UltraFuserError: an item without answers.
            EndpointError: the endpoint cannot be used, died, or left a question unanswered: which answer is best is not
                guessed, and choices that were made are kept.
        """
        if empty := [question for question, answers in items if not answers]:
            raise UltraFuserError(f"no answers to choose from, expected at least one; question: {empty[0][:80]!r}")
        open_items = [i for i, (_, answers) in enumerate(items) if len(set(answers)) > 1]
        orders = [self._order(*items[i]) for i in open_items]
        questions = [
            choice_question(items[i][0], [items[i][1][k] for k in order])
            for i, order in zip(open_items, orders, strict=True)
        ]
        judgements = self.ask_all(questions, what="choices of the judge", progress=progress)
        if errors := [judgement.text for judgement in judgements if judgement.status == "error"]:
            raise EndpointError(f"{errors[0]}; {len(errors)} of {len(judgements)} choices were not made, the others are kept, "
                                "run again to ask only for those")  # fmt: skip
        out: list[int | None] = [0] * len(items)
        for i, order, judgement in zip(open_items, orders, judgements, strict=True):
            out[i] = None if judgement.verdict is None else order[int(judgement.verdict) - 1]
        return out

    def _order(self, question: str, answers: Sequence[str]) -> list[int]:
        order = list(range(len(answers)))
        random.Random(json.dumps([self.seed, question, list(answers)])).shuffle(order)
        return order

    def _key(self, question: Question) -> str:
        return hashlib.sha256(f"{self.identity}\n{question.prompt}".encode()).hexdigest()


class _Memory:
    """A store that forgets at the end."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], Any] = {}

    def get(self, kind: str, key: str) -> Any | None:
        return self.values.get((kind, key))

    def put(self, kind: str, key: str, value: Any) -> None:
        self.values[kind, key] = value
