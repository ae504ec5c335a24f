"""The stages: from items to questions, from replies to items. Nothing is kept between two runs but the replies themselves.

Every function asks for what it needs through `Run.look` and decides from the outcomes alone, in an order that does not
depend on when they came; so the same recipe and replies give the same items, however often a run was interrupted.
The stages that ask for lists come first and are in list_stages.py; those here ask for one text an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ultrafuser.synth.calls.request import Request
from ultrafuser.synth.stages.items import Conversation, Instruction, draw, history, item_id, plain
from ultrafuser.synth.stages.run import Run
from ultrafuser.synth.text import checks, filters, parsing
from ultrafuser.synth.text.parsing import Unreadable


def make_complex(run: Run, instructions: Sequence[Instruction]) -> list[Instruction]:
    """A share of the instructions rewritten; one whose rewriting cannot be used stays as it was."""
    recipe = run.recipe
    drawn = [one for one in instructions if draw(recipe.seed, one.id, "complex") < recipe.complex_share]
    requests = [
        run.request("complex", recipe.domain(one.domain), one.id, "complex", {"instruction": one.text}) for one in drawn
    ]
    rewritten: dict[str, Instruction] = {}
    for one, text in zip(drawn, run.texts(requests, parsing.read_instruction), strict=True):
        if text is None:
            continue
        reason = filters.check_instruction(text, recipe.filters)
        if reason is None and plain(text) == plain(one.text):
            reason = "unchanged"
        if reason is not None:
            run.ledger.reject("complex", one.domain, reason, text)
            continue
        run.ledger.keep("complex", one.domain)
        rewritten[one.id] = replace(one, text=text, origin=f"{one.origin} complex")
    return [rewritten.get(one.id, one) for one in instructions]


def respond(run: Run, instructions: Sequence[Instruction]) -> list[Conversation]:
    """An answer to each instruction."""
    requests = [
        run.request(
            "responses", run.recipe.domain(one.domain), one.id, "responses", {"instruction": one.text, "history": []}
        )
        for one in instructions
    ]
    out = []
    for one, text in zip(instructions, run.texts(requests, parsing.read_text), strict=True):
        if text is None:
            continue
        run.ledger.keep("responses", one.domain)
        answer, tests = parsing.split_tests(text) if run.recipe.domain(one.domain).tests else (text, None)
        # by its words, too: what a reader decided on a row says nothing of another one in its place
        out.append(Conversation(item_id(one.id, "row", one.text, answer), one, ((one.text, answer),), tests))
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
    tested = run.test(cases) if cases else {}
    out = []
    for one in conversations:
        kind = run.recipe.domain(one.domain).check
        reason = checks.check_answer(kind, one.answer)
        if reason is None and one.tests is not None:
            if (one.answer, one.tests) not in tested:
                run.ledger.request("checks", one.domain)
                run.ledger.leave_open("checks", one.domain)
                continue
            reason = tested[one.answer, one.tests]
        if reason is None and kind == "math" and checks.final_result(one.answer) is None:
            reason = "no final result"
        if kind == "none" or run.ledger.decide("checks", one.domain, reason, one.answer):
            out.append(one)
    return out


def compare_samples(run: Run, conversations: Sequence[Conversation]) -> list[Conversation]:
    """Mathematical answers that enough further samples agree with."""
    requests: dict[str, list[Request]] = {}
    for one in conversations:
        domain = run.recipe.domain(one.domain)
        values = {"instruction": one.instruction.text, "history": []}
        requests[one.id] = [
            run.request("samples", domain, one.instruction.id, "responses", values, sample=number)
            for number in range(1, domain.samples + 1)
        ]
    outcomes = run.look([request for own in requests.values() for request in own]) if any(requests.values()) else {}
    out = []
    for one in conversations:
        if not requests[one.id]:
            out.append(one)
            continue
        given = [(request, outcomes.get(request.key)) for request in requests[one.id]]
        run.ledger.request("samples", one.domain)
        if any(outcome is None for _, outcome in given):
            run.ledger.leave_open("samples", one.domain)
            continue
        samples = [request.whole(outcome.text) for request, outcome in given if outcome and outcome.status == "ok"]
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
    requests = [
        run.request(
            "judge",
            run.recipe.domain(one.domain),
            one.id,
            "judge",
            {"instruction": one.instruction.text, "answer": one.answer},
        )
        for one in conversations
    ]
    outcomes, out = run.look(requests), []
    for one, request in zip(conversations, requests, strict=True):
        reply = run.read(request, outcomes.get(request.key))
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
            run.request("turns", recipe.domain(one.domain), one.id, "responses",
                    {"instruction": text, "history": history(one.turns)})
            for one, text in asked
        ]  # fmt: skip
        active = []
        for (one, question), text in zip(asked, run.texts(answers, parsing.read_text), strict=True):
            if text is None:
                continue
            kind = recipe.domain(one.domain).check
            if reason := filters.check_answer(text, recipe.filters) or checks.check_answer(kind, text):
                run.ledger.reject("turns", one.domain, reason, text)
                continue
            run.ledger.keep("turns", one.domain)
            # a row's tests are those of its last answer, and these were for the one before
            talks[one.id] = replace(one, turns=(*one.turns, (question, text)), tests=None)
            active.append(talks[one.id])
    return [talks[one.id] for one in conversations]


def _next_questions(run: Run, talks: Sequence[Conversation]) -> list[tuple[Conversation, str]]:
    requests = [
        run.request("turns", run.recipe.domain(one.domain), one.id, "turns", {"history": history(one.turns)})
        for one in talks
    ]
    out = []
    for one, text in zip(talks, run.texts(requests, parsing.read_text), strict=True):
        if text is None:
            continue
        reason = filters.check_instruction(text, run.recipe.filters)
        if reason is None and any(plain(text) == plain(user) for user, _ in one.turns):
            reason = "unchanged"
        if reason is None:
            run.ledger.keep("turns", one.domain)
            out.append((one, text))
        else:
            run.ledger.reject("turns", one.domain, reason, text)
    return out
