"""The stages that ask for lists: topics, sub-topics, instructions and those that grow out of them (see stages.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from ultrafuser.synth.calls.request import Request, Response
from ultrafuser.synth.recipe import DomainRecipe, ListCallRecipe
from ultrafuser.synth.stages.items import Instruction, SubTopic, Topic, draw, item_id, plain, portions, shares
from ultrafuser.synth.stages.run import Run
from ultrafuser.synth.text import filters, parsing
from ultrafuser.synth.text.parsing import Unreadable

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
class Want(Generic[T]):
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
    run: Run, stage: str, wants: Sequence[Want[T]], known: Callable[[T], str], shown: int, schema: Mapping[str, Any]
) -> None:
    """Ask for lists until every parent has what it wants, or the rounds are over."""
    call = run.recipe.call(stage)
    assert isinstance(call, ListCallRecipe)
    for _ in range(call.rounds):
        requests: list[tuple[Want[T], int, Request]] = []
        for want in wants:
            have = [known(item) for item in want.found[-shown:]]
            for number in portions(want.wanted - len(want.found), call.per_call):
                values = want.values(want.asked) | {"number": number, "known": have}
                request = run.request(
                    stage, want.domain, want.parent, stage, values, sample=want.asked, schema=dict(schema)
                )
                requests.append((want, number, request))
                want.asked += 1
        if not requests:
            return
        outcomes = run.look([request for _, _, request in requests])
        for want, number, request in requests:
            want.found += _read_items(run, request, outcomes.get(request.key), number, want.read, want.seen)
        if any(request.key not in outcomes for _, _, request in requests):
            return  # a further round would ask other questions once these are answered


def _read_items(
    run: Run,
    request: Request,
    outcome: Response | None,
    wanted: int,
    read: Callable[[Any, str], tuple[str, T] | Unreadable],
    seen: set[str],
) -> list[T]:
    """The items of one reply that may stay; all that were wanted are accounted for."""
    ledger, stage, domain = run.ledger, request.stage, request.domain
    reply = run.read(request, outcome, wanted)
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
        item = read(raw, item_id(request.item, stage, request.sample, place))
        if isinstance(item, Unreadable):
            ledger.reject(stage, domain, item.reason, str(raw))
        elif (text := plain(item[0])) in seen:
            ledger.reject(stage, domain, "duplicate", item[0])
        else:
            seen.add(text)
            kept.append(item[1])
            ledger.keep(stage, domain)
    return kept


def find_topics(run: Run) -> dict[str, list[Topic]]:
    """The topics of each domain, its seed topics first."""
    wants = []
    for domain in run.recipe.domains:
        want: Want[Topic] = Want(
            domain, item_id(domain.name), domain.counts.meta_topics, lambda _: {}, _topic_reader(domain),
            {plain(name) for name in domain.topics},
        )  # fmt: skip
        want.found += [
            Topic(item_id(domain.name, "seed", n), domain.name, name) for n, name in enumerate(domain.topics)
        ]
        wants.append(want)
    _gather(run, "meta_topics", wants, lambda topic: topic.name, KNOWN_TOPICS, _LIST)
    return {want.domain.name: want.found for want in wants}


def _topic_reader(domain: DomainRecipe) -> Callable[[Any, str], tuple[str, Topic] | Unreadable]:
    def read(raw: Any, id: str) -> tuple[str, Topic] | Unreadable:
        name = parsing.as_name(raw)
        if isinstance(name, Unreadable):
            return name
        reason = filters.check_name(str(raw))
        return Unreadable(reason) if reason else (name, Topic(id, domain.name, name))

    return read


def _same(values: Mapping[str, Any], _: int) -> dict[str, Any]:
    """The same values for every question."""
    return dict(values)


def find_sub_topics(run: Run, topics: Mapping[str, Sequence[Topic]]) -> dict[str, list[SubTopic]]:
    """The sub-topics of each domain; none occurs twice in a domain."""
    wants: list[Want[SubTopic]] = []
    for domain in run.recipe.domains:
        own, seen = topics[domain.name], set[str]()
        for topic, share in zip(own, shares(domain.counts.sub_topics, len(own)) if own else [], strict=True):
            values = {"topic": topic.name, "num_concepts": domain.counts.concepts}
            wants.append(Want(domain, topic.id, share, partial(_same, values), _sub_topic_reader(domain, topic), seen))
    _gather(run, "sub_topics", wants, lambda sub_topic: sub_topic.name, KNOWN_TOPICS, _OBJECTS)
    found: dict[str, list[SubTopic]] = {domain.name: [] for domain in run.recipe.domains}
    for want in wants:
        found[want.domain.name] += want.found
    return found


def _sub_topic_reader(domain: DomainRecipe, topic: Topic) -> Callable[[Any, str], tuple[str, SubTopic] | Unreadable]:
    def read(raw: Any, id: str) -> tuple[str, SubTopic] | Unreadable:
        named = parsing.as_named_concepts(raw, domain.counts.concepts)
        if isinstance(named, Unreadable):
            return named
        reason = filters.check_name(str(raw))
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


def find_instructions(
    run: Run, sub_topics: Mapping[str, Sequence[tuple[SubTopic, int, int]]]
) -> list[Want[Instruction]]:
    """First instructions of each sub-topic; none occurs twice in it."""
    wants: list[Want[Instruction]] = []
    for domain in run.recipe.domains:
        for sub_topic, place, number in sub_topics[domain.name]:
            share = shares(domain.counts.instructions, number)[place]
            read = _instruction_reader(run, sub_topic, "first")
            wants.append(Want(domain, sub_topic.id, share, _instruction_values(run, sub_topic), read, set()))
    _gather(run, "instructions", wants, lambda one: one.text, KNOWN_INSTRUCTIONS, _LIST)
    return wants


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


def expand(run: Run, wants: Sequence[Want[Instruction]]) -> list[Instruction]:
    """In-context expansion: a few instructions are shown, strongly and weakly related ones come back; both, by sub-topic."""
    size = run.recipe.calls.expand.examples
    requests: list[tuple[Want[Instruction], int, str, Request]] = []
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
                    requests.append(
                        (
                            want,
                            number,
                            relation,
                            run.request("expand", want.domain, item, "expand", values, schema=dict(_LIST)),
                        )
                    )
    outcomes = run.look([request for *_, request in requests]) if requests else {}
    grown: dict[str, list[Instruction]] = {want.parent: [] for want in wants}
    for want, number, relation, request in requests:
        first = want.found[0]
        parent = SubTopic(want.parent, first.domain, first.topic, first.subtopic, ())
        read = _instruction_reader(run, parent, relation)
        grown[want.parent] += _read_items(run, request, outcomes.get(request.key), number, read, want.seen)
    return [one for want in wants for one in [*want.found, *grown[want.parent]]]
