"""The stages with one text per request: complex instructions, answers, samples, scores, further turns.

A run stores responses only. Each stage gets them through `StageRun.get_responses` and decides from them alone, in an
order that does not depend on when they came. So the same recipe and responses give the same items after any interruption.
The stages that request lists come first, in `lists`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ultrafuser.synth.calls.request import Request
from ultrafuser.synth.stages.items import Conversation, Instruction, draw, history, item_id, plain
from ultrafuser.synth.stages.stage_run import StageRun
from ultrafuser.synth.text import checks, filters, parsing
from ultrafuser.synth.text.parsing import Unreadable


def rewrite_complex(run: StageRun, instructions: Sequence[Instruction]) -> list[Instruction]:
    """Rewrite a share of the instructions to be more complex. The original stays if the new text is unusable."""
    recipe = run.recipe
    drawn = [item for item in instructions if draw(recipe.seed, item.id, "complex") < recipe.complex_share]
    requests = [
        run.request("complex", recipe.domain(item.domain), item.id, "complex", {"instruction": item.text})
        for item in drawn
    ]

    def check(instruction: Instruction, text: str) -> str | None:
        unchanged = "unchanged" if plain(text) == plain(instruction.text) else None
        return filters.check_instruction(text, recipe.filters) or unchanged

    rewritten = {
        instruction.id: replace(instruction, text=text, origin=f"{instruction.origin} complex")
        for instruction, text in run.texts(drawn, requests, parsing.read_instruction, check)
    }
    return [rewritten.get(item.id, item) for item in instructions]


def answer(run: StageRun, instructions: Sequence[Instruction]) -> list[Conversation]:
    """An answer to each instruction."""
    requests = [_answer_request(run, "responses", instruction) for instruction in instructions]
    conversations = []
    for instruction, text in run.texts(instructions, requests, parsing.read_text):
        has_tests = run.recipe.domain(instruction.domain).tests
        reply, tests = parsing.split_tests(text) if has_tests else (text, None)
        # The id depends on the words: a review of a row says nothing about another row with the same parent.
        row_id = item_id(instruction.id, "row", instruction.text, reply)
        conversations.append(Conversation(row_id, instruction, ((instruction.text, reply),), tests))
    return conversations


def _answer_request(run: StageRun, stage: str, instruction: Instruction, sample: int = 0) -> Request:
    values = {"instruction": instruction.text, "history": []}
    domain = run.recipe.domain(instruction.domain)
    return run.request(stage, domain, instruction.id, "responses", values, sample=sample)


def filter_answers(run: StageRun, conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations whose first answer passes the filters."""
    passed = []
    for conversation in conversations:
        reason = filters.check_answer(conversation.answer, run.recipe.filters)
        if run.ledger.decide("filters", conversation.domain, reason, conversation.answer):
            passed.append(conversation)
    return passed


def check_answers(run: StageRun, conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations whose code or arithmetic is right. Domains without a check pass."""
    # 1. Run the tests of all answers whose code parses.
    cases = [
        (conversation.answer, conversation.tests)
        for conversation in conversations
        if conversation.tests is not None and checks.check_code(conversation.answer) is None
    ]
    verdicts = run.run_tests(cases) if cases else {}
    passed = []
    for conversation in conversations:
        answer = conversation.answer
        kind = run.recipe.domain(conversation.domain).check
        # 2. Code must parse, equations must hold.
        reason = checks.check_answer(kind, answer)
        # 3. Tests must pass. Without a verdict so far the item is pending.
        if reason is None and conversation.tests is not None:
            if (answer, conversation.tests) not in verdicts:
                run.ledger.request("checks", conversation.domain)
                run.ledger.mark_pending("checks", conversation.domain)
                continue
            reason = verdicts[answer, conversation.tests]
        # 4. A mathematical answer must have a result.
        if reason is None and kind == "math" and checks.final_result(answer) is None:
            reason = "no final result"
        if kind == "none" or run.ledger.decide("checks", conversation.domain, reason, answer):
            passed.append(conversation)
    return passed


def compare_samples(run: StageRun, conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations whose result enough further samples agree with. Domains without samples pass."""
    groups: list[list[Request]] = []
    for item in conversations:
        samples = range(1, run.recipe.domain(item.domain).samples + 1)
        groups.append([_answer_request(run, "samples", item.instruction, sample) for sample in samples])
    requests = [request for group in groups for request in group]
    responses = run.get_responses(requests) if requests else {}
    agreed = []
    for conversation, group in zip(conversations, groups, strict=True):
        if not group:
            agreed.append(conversation)
            continue
        run.ledger.request("samples", conversation.domain)
        if any(request.key not in responses for request in group):
            run.ledger.mark_pending("samples", conversation.domain)
            continue
        pairs = [(request, responses[request.key]) for request in group]
        replies = [request.full_reply(response.text) for request, response in pairs if response.status == "ok"]
        # A failed call agrees with nothing.
        share = checks.agreement(conversation.answer, replies) * len(replies) / len(group)
        reason = None if share >= run.recipe.domain(conversation.domain).agreement else "samples disagree"
        if run.ledger.settle("samples", conversation.domain, reason, conversation.answer):
            agreed.append(conversation)
    return agreed


def judge(run: StageRun, conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations that a judge scores high enough. All of them if the recipe has no `min_score`."""
    min_score = run.recipe.filters.min_score
    if min_score is None:
        return list(conversations)
    requests = []
    for item in conversations:
        values = {"instruction": item.instruction.text, "answer": item.answer}
        requests.append(run.request("judge", run.recipe.domain(item.domain), item.id, "judge", values))
    responses, accepted = run.get_responses(requests), []
    for conversation, request in zip(conversations, requests, strict=True):
        reply = run.read(request, responses.get(request.key))
        if reply is None:
            continue
        try:
            reason = f"score below {min_score}" if parsing.read_rating(reply) < min_score else None
        except Unreadable as error:
            run.ledger.reject("judge", conversation.domain, str(error), reply)
            continue
        if run.ledger.settle("judge", conversation.domain, reason, conversation.answer):
            accepted.append(conversation)
    return accepted


def add_turns(run: StageRun, conversations: Sequence[Conversation]) -> list[Conversation]:
    """Add turns with a simulated user. A conversation ends before the first turn that is unusable."""
    recipe = run.recipe
    current = {item.id: item for item in conversations}
    active = [item for item in conversations if draw(recipe.seed, item.id, "turns") < recipe.multi_turn_share]

    def check(question: tuple[Conversation, str], text: str) -> str | None:
        kind = recipe.domain(question[0].domain).check
        return filters.check_answer(text, recipe.filters) or checks.check_answer(kind, text)

    for _ in range(1, recipe.turns):
        questions = _next_questions(run, active)
        requests = []
        for item, question in questions:
            values = {"instruction": question, "history": history(item.turns)}
            requests.append(run.request("turns", recipe.domain(item.domain), item.id, "responses", values))
        active = []
        for (conversation, question), text in run.texts(questions, requests, parsing.read_text, check):
            # The tests of a row are those of its last answer. These belong to the first one.
            longer = replace(conversation, turns=(*conversation.turns, (question, text)), tests=None)
            current[conversation.id] = longer
            active.append(longer)
    return [current[item.id] for item in conversations]


def _next_questions(run: StageRun, conversations: Sequence[Conversation]) -> list[tuple[Conversation, str]]:
    """What the simulated user says next, where that is usable."""
    requests = [
        run.request("turns", run.recipe.domain(item.domain), item.id, "turns", {"history": history(item.turns)})
        for item in conversations
    ]

    def check(conversation: Conversation, text: str) -> str | None:
        repeated = any(plain(text) == plain(user) for user, _ in conversation.turns)
        return filters.check_instruction(text, run.recipe.filters) or ("unchanged" if repeated else None)

    return list(run.texts(conversations, requests, parsing.read_text, check))
