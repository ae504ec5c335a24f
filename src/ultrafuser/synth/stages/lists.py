"""The stages that request lists: topics, sub-topics, instructions, and instructions related to those."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from ultrafuser.synth.calls.request import Request, Response
from ultrafuser.synth.recipe import DomainRecipe, ListCallRecipe
from ultrafuser.synth.stages.items import Instruction, SubTopic, Topic, draw, item_id, plain, portions, shares
from ultrafuser.synth.stages.stage_run import StageRun
from ultrafuser.synth.text import filters, parsing
from ultrafuser.synth.text.parsing import Unreadable

T = TypeVar("T")
KNOWN_TOPICS = 80  # the last ones are shown in the prompt, so that a reply does not repeat them
KNOWN_INSTRUCTIONS = 6
CONCEPTS = 3  # of a sub-topic, in one prompt


def _list_schema(item: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a list. It is wrapped in an object, as some endpoints require one at the top."""
    items = {"type": "array", "items": item}
    return {"type": "object", "properties": {"items": items}, "required": ["items"], "additionalProperties": False}


_STRINGS = _list_schema({"type": "string"})
_NAMED_CONCEPTS = _list_schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "concepts": {"type": "array", "items": {"type": "string"}}},
        "required": ["name", "concepts"],
        "additionalProperties": False,
    }
)


@dataclass
class ListRequest(Generic[T]):
    """A number of items wanted for one parent, and how to request and read them.

    Attributes:
        count: items wanted.
        prompt_values: index of the request -> values of the prompt.
        read: (item of a reply, its id) -> (text that tells it from others, item).
        seen: texts of existing items. Several parents may share one set.
        num_requests: requests made so far.
    """

    domain: DomainRecipe
    parent: str
    count: int
    prompt_values: Callable[[int], dict[str, Any]]
    read: Callable[[Any, str], tuple[str, T]]
    seen: set[str]
    items: list[T] = field(default_factory=list)
    num_requests: int = 0


def request_lists(
    run: StageRun,
    stage: str,
    list_requests: Sequence[ListRequest[T]],
    text_of: Callable[[T], str],
    num_known: int,
    schema: dict[str, Any],
) -> None:
    """Request lists until every parent has enough items, or the rounds of the recipe are over.

    Args:
        text_of: text of an item in the prompt.
        num_known: existing items that the prompt shows.
    """
    call = run.recipe.call(stage)
    assert isinstance(call, ListCallRecipe)
    for _ in range(call.rounds):
        # 1. One request per portion of the items that are missing.
        requests: list[tuple[ListRequest[T], int, Request]] = []
        for target in list_requests:
            known = [text_of(item) for item in target.items[-num_known:]]
            for count in portions(target.count - len(target.items), call.per_call):
                values = target.prompt_values(target.num_requests) | {"number": count, "known": known}
                sample = target.num_requests
                request = run.request(stage, target.domain, target.parent, stage, values, sample=sample, schema=schema)
                requests.append((target, count, request))
                target.num_requests += 1
        if not requests:
            return
        # 2. Read the items of all responses.
        responses = run.get_responses([request for _, _, request in requests])
        for target, count, request in requests:
            response = responses.get(request.key)
            target.items += _read_items(run, request, response, count, target.read, target.seen)
        # 3. A further round depends on all items of this one.
        if any(request.key not in responses for _, _, request in requests):
            return


def _read_items(
    run: StageRun,
    request: Request,
    response: Response | None,
    count: int,
    read: Callable[[Any, str], tuple[str, T]],
    seen: set[str],
) -> list[T]:
    """The valid new items of one response. The ledger accounts for all `count` items that were wanted."""
    ledger, stage, domain = run.ledger, request.stage, request.domain
    reply = run.read(request, response, count)
    if reply is None:
        return []
    try:
        raw_items = parsing.read_list(reply)
    except Unreadable as error:
        ledger.reject(stage, domain, str(error), reply, count)
        return []
    ledger.entry(stage, domain).surplus += max(0, len(raw_items) - count)
    ledger.reject(stage, domain, "fewer than asked for", count=count - min(count, len(raw_items)))
    items = []
    for index, raw in enumerate(raw_items[:count]):
        try:
            text, item = read(raw, item_id(request.item, stage, request.sample, index))
        except Unreadable as error:
            ledger.reject(stage, domain, str(error), str(raw))
            continue
        if ledger.settle(stage, domain, "duplicate" if plain(text) in seen else None, text):
            seen.add(plain(text))
            items.append(item)
    return items


# ---------------------------------------------------------------- topics and sub-topics


def find_topics(run: StageRun) -> dict[str, list[Topic]]:
    """The topics of each domain, seed topics first."""
    list_requests = []
    for domain in run.recipe.domains:
        seeds = [Topic(item_id(domain.name, "seed", n), domain.name, name) for n, name in enumerate(domain.topics)]
        seen = {plain(name) for name in domain.topics}
        count, read = domain.counts.meta_topics, partial(_read_topic, domain)
        list_requests.append(ListRequest(domain, item_id(domain.name), count, lambda _: {}, read, seen, seeds))
    request_lists(run, "meta_topics", list_requests, lambda topic: topic.name, KNOWN_TOPICS, _STRINGS)
    return {target.domain.name: target.items for target in list_requests}


def _read_topic(domain: DomainRecipe, raw: Any, id: str) -> tuple[str, Topic]:
    name = parsing.as_name(raw)
    _reject(filters.check_name(str(raw)))
    return name, Topic(id, domain.name, name)


def _reject(reason: str | None) -> None:
    """Raise `Unreadable` if there is a reason to reject an item."""
    if reason is not None:
        raise Unreadable(reason)


def find_sub_topics(run: StageRun, topics: Mapping[str, Sequence[Topic]]) -> dict[str, list[SubTopic]]:
    """The sub-topics of each domain, unique within the domain."""
    list_requests: list[ListRequest[SubTopic]] = []
    for domain in run.recipe.domains:
        domain_topics, seen = topics[domain.name], set[str]()
        counts = shares(domain.counts.sub_topics, len(domain_topics)) if domain_topics else []
        for topic, count in zip(domain_topics, counts, strict=True):
            values, read = partial(_sub_topic_values, domain, topic), partial(_read_sub_topic, domain, topic)
            list_requests.append(ListRequest(domain, topic.id, count, values, read, seen))
    request_lists(run, "sub_topics", list_requests, lambda sub_topic: sub_topic.name, KNOWN_TOPICS, _NAMED_CONCEPTS)
    sub_topics: dict[str, list[SubTopic]] = {domain.name: [] for domain in run.recipe.domains}
    for target in list_requests:
        sub_topics[target.domain.name] += target.items
    return sub_topics


def _sub_topic_values(domain: DomainRecipe, topic: Topic, _: int) -> dict[str, Any]:
    return {"topic": topic.name, "num_concepts": domain.counts.concepts}


def _read_sub_topic(domain: DomainRecipe, topic: Topic, raw: Any, id: str) -> tuple[str, SubTopic]:
    named = parsing.as_named_concepts(raw, domain.counts.concepts)
    _reject(filters.check_name(str(raw)))
    return named.name, SubTopic(id, domain.name, topic.name, named.name, named.concepts)


class NumberedSubTopic(NamedTuple):
    """A sub-topic with its position among the `total` sub-topics of its domain."""

    sub_topic: SubTopic
    position: int
    total: int


def select_shard(
    sub_topics: Mapping[str, Sequence[SubTopic]], shard: tuple[int, int] | None
) -> dict[str, list[NumberedSubTopic]]:
    """The sub-topics that a shard works on, by domain. All of them without a shard."""
    selected = {}
    for domain, domain_sub_topics in sub_topics.items():
        numbered = [NumberedSubTopic(item, i, len(domain_sub_topics)) for i, item in enumerate(domain_sub_topics)]
        if shard is not None:
            numbered = [item for item in numbered if int(item.sub_topic.id, 16) % shard[1] == shard[0] - 1]
        selected[domain] = numbered
    return selected


# ---------------------------------------------------------------- instructions


def find_instructions(
    run: StageRun, sub_topics: Mapping[str, Sequence[NumberedSubTopic]]
) -> list[ListRequest[Instruction]]:
    """The first instructions of each sub-topic, unique within it."""
    list_requests: list[ListRequest[Instruction]] = []
    for domain in run.recipe.domains:
        for sub_topic, position, total in sub_topics[domain.name]:
            count = shares(domain.counts.instructions, total)[position]
            values = partial(_instruction_values, run, sub_topic)
            read = partial(_read_instruction, run, sub_topic, "first")
            list_requests.append(ListRequest(domain, sub_topic.id, count, values, read, set()))
    request_lists(run, "instructions", list_requests, lambda item: item.text, KNOWN_INSTRUCTIONS, _STRINGS)
    return list_requests


def _instruction_values(run: StageRun, sub_topic: SubTopic, index: int) -> dict[str, Any]:
    """Values of the prompt. Every request about a sub-topic names other concepts, drawn by its index."""
    order = sorted(sub_topic.concepts, key=lambda concept: draw(run.recipe.seed, sub_topic.id, index, concept))
    return {"topic": sub_topic.topic, "subtopic": sub_topic.name, "concepts": order[:CONCEPTS]}


def _read_instruction(run: StageRun, sub_topic: SubTopic, origin: str, raw: Any, id: str) -> tuple[str, Instruction]:
    text = parsing.as_instruction(raw)
    _reject(filters.check_instruction(text, run.recipe.filters))
    return text, Instruction(id, sub_topic.domain, sub_topic.topic, sub_topic.name, text, origin)


def expand(run: StageRun, list_requests: Sequence[ListRequest[Instruction]]) -> list[Instruction]:
    """Expansion in context: a few instructions are shown, strongly and weakly related ones come back.

    Returns:
        The first instructions and the related ones, by sub-topic.
    """
    requests = [(target, *expansion) for target in list_requests for expansion in _expansions(run, target)]
    responses = run.get_responses([request for *_, request in requests]) if requests else {}
    related: dict[str, list[Instruction]] = {target.parent: [] for target in list_requests}
    for target, relation, count, request in requests:
        first = target.items[0]
        sub_topic = SubTopic(target.parent, first.domain, first.topic, first.subtopic, ())
        read = partial(_read_instruction, run, sub_topic, relation)
        related[target.parent] += _read_items(run, request, responses.get(request.key), count, read, target.seen)
    return [item for target in list_requests for item in [*target.items, *related[target.parent]]]


def _expansions(run: StageRun, target: ListRequest[Instruction]) -> list[tuple[str, int, Request]]:
    """(relation, instructions wanted, request) for each group of examples of a sub-topic."""
    size = run.recipe.calls.expand.examples
    groups = [target.items[start : start + size] for start in range(0, len(target.items), size)]
    requests = []
    for relation, ratio in (("strong", target.domain.counts.strong), ("weak", target.domain.counts.weak)):
        counts = shares(round(len(target.items) * ratio), len(groups)) if groups else []
        for group, count in zip(groups, counts, strict=True):
            if not count:
                continue
            first, examples = group[0], [item.text for item in group]
            values: dict[str, Any] = {"topic": first.topic, "subtopic": first.subtopic}
            values |= {"relation": relation, "number": count, "examples": examples}
            item = item_id(first.id, relation)
            request = run.request("expand", target.domain, item, "expand", values, schema=_STRINGS)
            requests.append((relation, count, request))
    return requests
