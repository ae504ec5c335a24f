"""The stages: from items to questions, from replies to items. Nothing is kept between two runs but the replies themselves.

Every function asks for what it needs through `Run.look` and decides from the outcomes alone, in an order that does not
depend on when they came; so the same recipe and replies give the same items, however often a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

from ultrafuser.data.ngrams import words
from ultrafuser.synth import checks, filters, parsing
from ultrafuser.synth.asks import CUT_OFF, Ask, Outcome
from ultrafuser.synth.items import (
    Conversation,
    Instruction,
    SubTopic,
    Topic,
    draw,
    history,
    item_id,
    portions,
    shares,
)
from ultrafuser.synth.ledger import Ledger
from ultrafuser.synth.parsing import Unreadable
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import DomainRecipe, SynthRecipe

Look = Callable[[Sequence[Ask]], Mapping[str, Outcome]]
T = TypeVar("T")
KNOWN_TOPICS = 80  # shown, so that a reply does not repeat them; the last ones
KNOWN_INSTRUCTIONS = 6
CONCEPTS = 3  # of a sub-topic that one question is built on


def _list_of(item: dict[str, Any]) -> dict[str, Any]:
    """The schema of a list; some endpoints want an object at the top, and reading a reply does not mind it."""
    whole = {"type": "array", "items": item}
    return {"type": "object", "properties": {"items": whole}, "required": ["items"], "additionalProperties": False}


_LIST = _list_of({"type": "string"})
_OBJECTS = _list_of(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "concepts": {"type": "array", "items": {"type": "string"}}},
        "required": ["name", "concepts"],
        "additionalProperties": False,
    }
)


@dataclass
class Run:
    """What every stage needs.

    Attributes:
        look: questions -> their outcomes by key; one that has none yet is left out.
        ledger: what became of everything that was asked for.
    """

    recipe: SynthRecipe
    prompts: Prompts
    look: Look
    ledger: Ledger = field(default_factory=Ledger)

    def ask(
        self, stage: str, domain: DomainRecipe, item: str, prompt: str, values: Mapping[str, Any], **more: Any
    ) -> Ask:
        """A question of a stage, asked as the recipe says."""
        call = self.recipe.call(stage)
        messages = self.prompts.messages(prompt, domain=domain, **values)
        options = {
            "role": self.recipe.role(stage, domain),
            "temperature": call.temperature,
            "max_tokens": call.max_tokens,
        }
        return Ask(stage, domain.name, item, messages=messages, **(options | more))

    def read(self, ask: Ask, outcome: Outcome | None, wanted: int = 1) -> str | None:
        """The reply; None where there is none, which the ledger then knows. Also counts what is asked for."""
        self.ledger.ask(ask.stage, ask.domain, wanted)
        if outcome is None:
            self.ledger.leave_open(ask.stage, ask.domain, wanted)
        elif outcome.status == "failed":
            self.ledger.reject(ask.stage, ask.domain, f"call failed: {outcome.kind}", outcome.reason, wanted)
        else:
            return outcome.text
        return None

    def texts(self, asks: Sequence[Ask], read: Callable[[str], str | Unreadable]) -> Iterator[str | None]:
        """The text in each reply, of stages where a question asks for one text; it is not counted as kept yet."""
        outcomes = self.look(asks)
        for ask in asks:
            outcome = outcomes.get(ask.key)
            reply = self.read(ask, outcome)
            if reply is None or outcome is None:
                yield None
                continue
            text = read(reply)
            if isinstance(text, Unreadable):
                self.ledger.reject(ask.stage, ask.domain, text.reason, reply)
            elif outcome.reason == CUT_OFF:
                self.ledger.reject(ask.stage, ask.domain, "cut off", reply)
            else:
                yield text
                continue
            yield None


# ---------------------------------------------------------------- lists: topics, sub-topics, instructions


@dataclass
class _Want(Generic[T]):
    """So many items of one parent, and how to ask for them.

    Attributes:
        values: what the prompt gets, given the number of the question.
        read: an item of a reply, and its place -> (text that tells it from others, item).
        seen: texts that are there already; the items of several parents may share one set.
    """

    domain: DomainRecipe
    parent: str
    wanted: int
    values: Callable[[int], dict[str, Any]]
    read: Callable[[Any, str], tuple[str, T] | Unreadable]
    seen: set[str]
    found: list[T] = field(default_factory=list)
    asked: int = 0


def _gather(
    run: Run, stage: str, wants: Sequence[_Want[T]], known: Callable[[T], str], shown: int, schema: Mapping[str, Any]
) -> None:
    """Ask for lists until every parent has what it wants, or the rounds are over."""
    call = run.recipe.call(stage)
    for _ in range(getattr(call, "rounds", 1)):
        asks: list[tuple[_Want[T], int, Ask]] = []
        for want in wants:
            have = [known(item) for item in want.found[-shown:]]
            for number in portions(want.wanted - len(want.found), getattr(call, "per_call", 1)):
                values = want.values(want.asked) | {"number": number, "known": have}
                ask = run.ask(stage, want.domain, want.parent, stage, values, sample=want.asked, schema=dict(schema))
                asks.append((want, number, ask))
                want.asked += 1
        if not asks:
            return
        outcomes = run.look([ask for _, _, ask in asks])
        for want, number, ask in asks:
            want.found += _read_items(run, ask, outcomes.get(ask.key), number, want.read, want.seen)
        if any(ask.key not in outcomes for _, _, ask in asks):
            return  # a further round would ask other questions once these are answered


def _read_items(
    run: Run,
    ask: Ask,
    outcome: Outcome | None,
    wanted: int,
    read: Callable[[Any, str], tuple[str, T] | Unreadable],
    seen: set[str],
) -> list[T]:
    """The items of one reply that may stay; all that were wanted are accounted for."""
    ledger, stage, domain = run.ledger, ask.stage, ask.domain
    reply = run.read(ask, outcome, wanted)
    if reply is None:
        return []
    items = parsing.read_list(reply)
    if isinstance(items, Unreadable):
        ledger.reject(stage, domain, items.reason, reply, wanted)
        return []
    ledger.entry(stage, domain).surplus += max(0, len(items) - wanted)
    ledger.reject(stage, domain, "fewer than asked for", number=wanted - min(wanted, len(items)))
    kept = []
    for place, raw in enumerate(items[:wanted]):
        item = read(raw, item_id(ask.item, stage, ask.sample, place))
        if isinstance(item, Unreadable):
            ledger.reject(stage, domain, item.reason, str(raw))
        elif (text := _plain(item[0])) in seen:
            ledger.reject(stage, domain, "duplicate", item[0])
        else:
            seen.add(text)
            kept.append(item[1])
            ledger.keep(stage, domain)
    return kept


def _plain(text: str) -> str:
    """What two texts that say the same have in common."""
    return " ".join(words(text)) or text


def find_topics(run: Run) -> dict[str, list[Topic]]:
    """The topics of each domain, its seed topics first."""
    wants = []
    for domain in run.recipe.domains:
        want: _Want[Topic] = _Want(
            domain, item_id(domain.name), domain.counts.meta_topics, lambda _: {}, _topic_reader(run, domain),
            {_plain(name) for name in domain.topics},
        )  # fmt: skip
        want.found += [
            Topic(item_id(domain.name, "seed", n), domain.name, name) for n, name in enumerate(domain.topics)
        ]
        wants.append(want)
    _gather(run, "meta_topics", wants, lambda topic: topic.name, KNOWN_TOPICS, _LIST)
    return {want.domain.name: want.found for want in wants}


def _topic_reader(run: Run, domain: DomainRecipe) -> Callable[[Any, str], tuple[str, Topic] | Unreadable]:
    def read(raw: Any, id: str) -> tuple[str, Topic] | Unreadable:
        name = parsing.as_name(raw)
        if isinstance(name, Unreadable):
            return name
        reason = filters.check_name(str(raw), run.recipe.filters)
        return Unreadable(reason) if reason else (name, Topic(id, domain.name, name))

    return read


def _same(values: Mapping[str, Any], _: int) -> dict[str, Any]:
    """The same values for every question."""
    return dict(values)


def find_sub_topics(run: Run, topics: Mapping[str, Sequence[Topic]]) -> dict[str, list[SubTopic]]:
    """The sub-topics of each domain; none occurs twice in a domain."""
    wants: list[_Want[SubTopic]] = []
    for domain in run.recipe.domains:
        own, seen = topics[domain.name], set[str]()
        for topic, share in zip(own, shares(domain.counts.sub_topics, len(own)) if own else [], strict=True):
            values = {"topic": topic.name, "num_concepts": domain.counts.concepts}
            wants.append(
                _Want(domain, topic.id, share, partial(_same, values), _sub_topic_reader(run, domain, topic), seen)
            )
    _gather(run, "sub_topics", wants, lambda sub_topic: sub_topic.name, KNOWN_TOPICS, _OBJECTS)
    found: dict[str, list[SubTopic]] = {domain.name: [] for domain in run.recipe.domains}
    for want in wants:
        found[want.domain.name] += want.found
    return found


def _sub_topic_reader(
    run: Run, domain: DomainRecipe, topic: Topic
) -> Callable[[Any, str], tuple[str, SubTopic] | Unreadable]:
    def read(raw: Any, id: str) -> tuple[str, SubTopic] | Unreadable:
        named = parsing.as_named_concepts(raw, domain.counts.concepts)
        if isinstance(named, Unreadable):
            return named
        reason = filters.check_name(str(raw), run.recipe.filters)
        if reason:
            return Unreadable(reason)
        return named.name, SubTopic(id, domain.name, topic.name, named.name, named.concepts)

    return read


def of_shard(
    sub_topics: Mapping[str, Sequence[SubTopic]], shard: tuple[int, int] | None
) -> dict[str, list[tuple[SubTopic, int, int]]]:
    """(sub-topic, its place, how many there are) of the sub-topics that a shard works on; all without one."""
    out = {}
    for domain, own in sub_topics.items():
        placed = [(one, place, len(own)) for place, one in enumerate(own)]
        out[domain] = [one for one in placed if shard is None or int(one[0].id, 16) % shard[1] == shard[0] - 1]
    return out


def find_instructions(run: Run, sub_topics: Mapping[str, Sequence[tuple[SubTopic, int, int]]]) -> list[Instruction]:
    """First instructions of each sub-topic, and those that grow out of them; none occurs twice in a sub-topic."""
    wants: list[_Want[Instruction]] = []
    for domain in run.recipe.domains:
        for sub_topic, place, number in sub_topics[domain.name]:
            share = shares(domain.counts.instructions, number)[place]
            read = _instruction_reader(run, sub_topic, "first")
            wants.append(_Want(domain, sub_topic.id, share, _instruction_values(run, sub_topic), read, set()))
    _gather(run, "instructions", wants, lambda one: one.text, KNOWN_INSTRUCTIONS, _LIST)
    grown = _expand(run, wants)
    return [one for want in wants for one in [*want.found, *grown[want.parent]]]


def _instruction_values(run: Run, sub_topic: SubTopic) -> Callable[[int], dict[str, Any]]:
    """Every question about a sub-topic turns on other concepts, drawn by its number."""

    def values(number: int) -> dict[str, Any]:
        order = sorted(sub_topic.concepts, key=lambda one: draw(run.recipe.seed, sub_topic.id, number, one))
        return {"topic": sub_topic.topic, "subtopic": sub_topic.name, "concepts": order[:CONCEPTS]}

    return values


def _instruction_reader(
    run: Run, sub_topic: SubTopic, origin: str
) -> Callable[[Any, str], tuple[str, Instruction] | Unreadable]:
    def read(raw: Any, id: str) -> tuple[str, Instruction] | Unreadable:
        text = parsing.as_instruction(raw)
        if isinstance(text, Unreadable):
            return text
        reason = filters.check_instruction(text, run.recipe.filters)
        if reason:
            return Unreadable(reason)
        return text, Instruction(id, sub_topic.domain, sub_topic.topic, sub_topic.name, text, origin)

    return read


def _expand(run: Run, wants: Sequence[_Want[Instruction]]) -> dict[str, list[Instruction]]:
    """In-context expansion: a few instructions are shown, strongly and weakly related ones come back; by sub-topic."""
    size = run.recipe.calls.expand.examples
    asks: list[tuple[_Want[Instruction], int, str, Ask]] = []
    for want in wants:
        groups = [want.found[start : start + size] for start in range(0, len(want.found), size)]
        for relation, ratio in (("strong", want.domain.counts.strong), ("weak", want.domain.counts.weak)):
            numbers = shares(round(len(want.found) * ratio), len(groups)) if groups else []
            for group, number in zip(groups, numbers, strict=True):
                if number:
                    first = group[0]
                    values = {"topic": first.topic, "subtopic": first.subtopic, "relation": relation, "number": number,
                              "examples": [one.text for one in group]}  # fmt: skip
                    item = item_id(first.id, relation)
                    asks.append(
                        (
                            want,
                            number,
                            relation,
                            run.ask("expand", want.domain, item, "expand", values, schema=dict(_LIST)),
                        )
                    )
    outcomes = run.look([ask for *_, ask in asks]) if asks else {}
    grown: dict[str, list[Instruction]] = {want.parent: [] for want in wants}
    for want, number, relation, ask in asks:
        first = want.found[0]
        parent = SubTopic(want.parent, first.domain, first.topic, first.subtopic, ())
        read = _instruction_reader(run, parent, relation)
        grown[want.parent] += _read_items(run, ask, outcomes.get(ask.key), number, read, want.seen)
    return grown


# ---------------------------------------------------------------- one reply an item


def make_complex(run: Run, instructions: Sequence[Instruction]) -> list[Instruction]:
    """A share of the instructions rewritten; one whose rewriting cannot be used stays as it was."""
    recipe = run.recipe
    drawn = [one for one in instructions if draw(recipe.seed, one.id, "complex") < recipe.complex_share]
    asks = [
        run.ask("complex", recipe.domain(one.domain), one.id, "complex", {"instruction": one.text}) for one in drawn
    ]
    rewritten: dict[str, Instruction] = {}
    for one, text in zip(drawn, run.texts(asks, parsing.read_instruction), strict=True):
        if text is None:
            continue
        reason = filters.check_instruction(text, recipe.filters)
        if reason is None and _plain(text) == _plain(one.text):
            reason = "unchanged"
        if reason is not None:
            run.ledger.reject("complex", one.domain, reason, text)
            continue
        run.ledger.keep("complex", one.domain)
        rewritten[one.id] = replace(one, text=text, origin=f"{one.origin} complex")
    return [rewritten.get(one.id, one) for one in instructions]


def respond(run: Run, instructions: Sequence[Instruction]) -> list[Conversation]:
    """An answer to each instruction."""
    asks = [
        run.ask(
            "responses", run.recipe.domain(one.domain), one.id, "responses", {"instruction": one.text, "history": []}
        )
        for one in instructions
    ]
    out = []
    for one, text in zip(instructions, run.texts(asks, parsing.read_text), strict=True):
        if text is None:
            continue
        run.ledger.keep("responses", one.domain)
        answer, tests = parsing.split_tests(text) if run.recipe.domain(one.domain).tests else (text, None)
        out.append(Conversation(item_id(one.id, "row"), one, ((one.text, answer),), tests))
    return out


def filter_answers(run: Run, conversations: Sequence[Conversation]) -> list[Conversation]:
    """Those whose answer is long enough, in the language, no refusal and no loop."""
    out = []
    for one in conversations:
        reason = filters.check_answer(one.answer, run.recipe.filters)
        if run.ledger.decide("filters", one.domain, reason, one.answer):
            out.append(one)
    return out


def check_answers(run: Run, conversations: Sequence[Conversation]) -> list[Conversation]:
    """Those whose code or arithmetic holds; domains without a check pass."""
    with_tests = [one for one in conversations if one.tests is not None]
    cases = [(one.answer, one.tests or "") for one in with_tests if checks.check_code(one.answer) is None]
    tested = (
        dict(zip(cases, checks.run_tests(cases, unsafe=run.recipe.filters.unsafe_code), strict=True)) if cases else {}
    )
    out = []
    for one in conversations:
        kind = run.recipe.domain(one.domain).check
        reason = None
        if kind == "python":
            reason = checks.check_code(one.answer) or tested.get((one.answer, one.tests or ""))
        elif kind == "math":
            reason = checks.check_arithmetic(one.answer)
            if reason is None and checks.final_result(one.answer) is None:
                reason = "no final result"
        if kind == "none" or run.ledger.decide("checks", one.domain, reason, one.answer):
            out.append(one)
    return out


def compare_samples(run: Run, conversations: Sequence[Conversation]) -> list[Conversation]:
    """Mathematical answers that enough further samples agree with."""
    asks: dict[str, list[Ask]] = {}
    for one in conversations:
        domain = run.recipe.domain(one.domain)
        values = {"instruction": one.instruction.text, "history": []}
        asks[one.id] = [
            run.ask("samples", domain, one.instruction.id, "responses", values, sample=number)
            for number in range(1, domain.samples + 1)
        ]
    outcomes = run.look([ask for own in asks.values() for ask in own]) if any(asks.values()) else {}
    out = []
    for one in conversations:
        if not asks[one.id]:
            out.append(one)
            continue
        given = [outcomes.get(ask.key) for ask in asks[one.id]]
        run.ledger.ask("samples", one.domain)
        if any(outcome is None for outcome in given):
            run.ledger.leave_open("samples", one.domain)
            continue
        samples = [outcome.text for outcome in given if outcome is not None and outcome.status == "ok"]
        share = checks.agreement(one.answer, samples) * len(samples) / len(given)  # a failed call agrees with nothing
        if share >= run.recipe.domain(one.domain).agreement:
            run.ledger.keep("samples", one.domain)
            out.append(one)
        else:
            run.ledger.reject("samples", one.domain, "samples disagree", one.answer)
    return out


def judge(run: Run, conversations: Sequence[Conversation]) -> list[Conversation]:
    """Those that a judge scores high enough; all where nothing is judged."""
    least = run.recipe.filters.min_score
    if least is None:
        return list(conversations)
    asks = [
        run.ask(
            "judge",
            run.recipe.domain(one.domain),
            one.id,
            "judge",
            {"instruction": one.instruction.text, "answer": one.answer},
        )
        for one in conversations
    ]
    outcomes, out = run.look(asks), []
    for one, ask in zip(conversations, asks, strict=True):
        reply = run.read(ask, outcomes.get(ask.key))
        if reply is None:
            continue
        rating = parsing.read_rating(reply)
        if isinstance(rating, Unreadable):
            run.ledger.reject("judge", one.domain, rating.reason, reply)
        elif rating < least:
            run.ledger.reject("judge", one.domain, f"score below {least}", one.answer)
        else:
            run.ledger.keep("judge", one.domain)
            out.append(one)
    return out


def go_on(run: Run, conversations: Sequence[Conversation]) -> list[Conversation]:
    """Further turns with a simulated user; a conversation whose next turn cannot be used ends before it."""
    recipe = run.recipe
    talks = {one.id: one for one in conversations}
    active = [one for one in conversations if draw(recipe.seed, one.id, "turns") < recipe.multi_turn_share]
    for _ in range(1, recipe.turns):
        asked = _next_questions(run, active)
        answers = [
            run.ask("turns", recipe.domain(one.domain), one.id, "responses", {"instruction": text, "history": history(one.turns)},
                    role=recipe.role("responses", recipe.domain(one.domain)), temperature=recipe.calls.responses.temperature,
                    max_tokens=recipe.calls.responses.max_tokens)
            for one, text in asked
        ]  # fmt: skip
        active = []
        for (one, question), text in zip(asked, run.texts(answers, parsing.read_text), strict=True):
            reason = None if text is None else filters.check_answer(text, recipe.filters)
            if text is None:
                continue
            if reason is not None:
                run.ledger.reject("turns", one.domain, reason, text)
                continue
            run.ledger.keep("turns", one.domain)
            talks[one.id] = replace(one, turns=(*one.turns, (question, text)))
            active.append(talks[one.id])
    return [talks[one.id] for one in conversations]


def _next_questions(run: Run, talks: Sequence[Conversation]) -> list[tuple[Conversation, str]]:
    asks = [
        run.ask("turns", run.recipe.domain(one.domain), one.id, "turns", {"history": history(one.turns)})
        for one in talks
    ]
    out = []
    for one, text in zip(talks, run.texts(asks, parsing.read_text), strict=True):
        if text is None:
            continue
        reason = filters.check_instruction(text, run.recipe.filters)
        if reason is None and any(_plain(text) == _plain(user) for user, _ in one.turns):
            reason = "unchanged"
        if reason is None:
            run.ledger.keep("turns", one.domain)
            out.append((one, text))
        else:
            run.ledger.reject("turns", one.domain, reason, text)
    return out
