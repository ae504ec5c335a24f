"""`ultrafuser synth`: stage by stage, derive the items again from what is stored, ask what is missing, write the data set."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ultrafuser import sandbox
from ultrafuser.data.tools.decontaminate import ContaminationIndex
from ultrafuser.data.tools.near_duplicates import NearDuplicateIndex, NearDuplicateRule
from ultrafuser.errors import DataError, MissingExtraError, RecipeError, SandboxError
from ultrafuser.progress import Progress
from ultrafuser.synth.calls.endpoint_client import PROBE
from ultrafuser.synth.calls.request import STOPS, Request, Response
from ultrafuser.synth.calls.store import CallStore
from ultrafuser.synth.output.card import write_data_set, write_items
from ultrafuser.synth.output.dataset import (
    DataSet,
    Decision,
    as_rows,
    balanced,
    index_of_tests,
    without_duplicates,
    without_overlaps,
)
from ultrafuser.synth.plan import plan, stages_until
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import LocalModel, ServedModel, SynthRecipe
from ultrafuser.synth.stages import lists as list_stages
from ultrafuser.synth.stages import texts as stages
from ultrafuser.synth.stages.run import Look, Run, Test
from ultrafuser.synth.text import checks, filters

STORE = "calls.sqlite"
TESTS_AT_ONCE = 16 * (os.cpu_count() or 1)  # between two savings of their verdicts
_OF_ITEMS = STOPS[: STOPS.index("responses")]  # stages that make topics and instructions
Shard = tuple[int, int]


def derive(
    recipe: SynthRecipe,
    prompts: Prompts,
    look: Look,
    *,
    test: Test | None = None,
    tests: ContaminationIndex | None = None,
    reviews: Mapping[str, Decision] | None = None,
    shard: Shard | None = None,
    until: str | None = None,
    show: Callable[[DataSet], None] = lambda _: None,
    progress: Progress | None = None,
) -> DataSet:
    """All stages, from nothing to rows: a pure function of the recipe, the prompts, the replies and the reviews.

    Args:
        look: questions -> their outcomes by key; a question without one is left open, and what hangs on it missing.
        test: answers with tests -> their verdicts; None: each is run.
        tests: the test data that rows must not touch; None: read from the recipe's files.
        shard: (number from 1 on, how many): the part of the sub-topics to work on; a part has no rows yet.
        until: the stage to stop after.
        show: is given topics and instructions after each stage that changes them.
    """
    run = Run(recipe, prompts, look, test or partial(_run_tests, recipe))
    out = DataSet(run.ledger)
    last = STOPS[-1] if shard is not None else None
    for stage in _stages(run, out, shard):
        if stage in _OF_ITEMS:
            show(out)
        if stage in (until, last):
            out.stopped_after = stage
            return out
    rows = as_rows(recipe, out.conversations, reviews or {}, run.ledger)
    rows = without_duplicates(rows, recipe.filters, run.ledger, progress)
    rows, out.overlaps = without_overlaps(rows, tests or index_of_tests(recipe.filters), run.ledger)
    out.rows = balanced(rows, recipe, run.ledger)
    return out


def _stages(run: Run, out: DataSet, shard: Shard | None) -> Iterator[str]:
    """Each of `STOPS` once it is through and what came of it is in `out`."""
    out.topics = list_stages.find_topics(run)
    yield "meta_topics"
    out.sub_topics = list_stages.find_sub_topics(run, out.topics)
    yield "sub_topics"
    wants = list_stages.find_instructions(run, list_stages.of_shard(out.sub_topics, shard))
    out.instructions = [one for want in wants for one in want.found]
    yield "instructions"
    out.instructions = list_stages.expand(run, wants)
    yield "expand"
    out.instructions = stages.make_complex(run, out.instructions)
    yield "complex"
    out.conversations = stages.respond(run, out.instructions)
    yield "responses"
    checked = stages.check_answers(run, stages.filter_answers(run, out.conversations))
    out.conversations = stages.compare_samples(run, checked)
    yield "checks"
    out.conversations = stages.judge(run, out.conversations)
    yield "judge"
    out.conversations = stages.go_on(run, out.conversations)
    yield "turns"


def synthesise(
    recipe: SynthRecipe,
    *,
    budget_usd: float | None = None,
    budget_tokens: int | None = None,
    shard: Shard | None = None,
    until: str | None = None,
    retry_failed: bool = False,
    clients: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> DataSet:
    """Ask what is missing, and write the data set when all is there. Stopped at any point, it goes on where it was.

    Before the first stage of a new store, each served model that will be asked gets a short question: a missing key or a
    wrong name is found while nothing is paid for yet.

    Args:
        budget_usd, budget_tokens: for the whole store, in place of the recipe's.
        retry_failed: ask again what failed for good before, e.g. after raising a model's context.
        callers: role -> caller, in place of those that the recipe names.

    Raises:
        RecipeError, DataError, MissingExtraError, SandboxError: found before anything is asked.
        BudgetExceeded, EndpointError: on the way; what was answered is kept.
        DataError: no row is left; the report says why.
    """
    from ultrafuser.synth.calls.clients import make_clients
    from ultrafuser.synth.calls.local import check_files
    from ultrafuser.synth.calls.scheduler import answer

    progress = progress or Progress()
    budgets = {"budget_usd": budget_usd, "budget_tokens": budget_tokens}
    recipe = recipe.model_copy(update={key: value for key, value in budgets.items() if value is not None})
    prompts, tests = check(recipe, shard=shard, until=until)
    asked = {one.model: one.stage for one in reversed(plan(recipe, prompts, until))}  # role -> its first stage
    if clients is None:
        for role in asked:
            model = recipe.model(role)
            if isinstance(model, LocalModel):
                check_files(model)
    with CallStore(Path(recipe.output) / STORE, recipe.identity()) as store:
        if shard is not None:
            _check_topics_are_there(recipe, prompts, store)
        if retry_failed:
            progress.log(f"{store.forget_failures()} calls that failed or were cut off are asked again")
        models = clients if clients is not None else make_clients(recipe.used_models())

        def look(requests: Sequence[Request]) -> Mapping[str, Response]:
            answer(
                requests,
                store,
                models,
                budget_usd=recipe.budget_usd,
                budget_tokens=recipe.budget_tokens,
                progress=progress,
            )
            return outcomes(store, requests)

        if clients is None and all(count.stage == PROBE.stage for count in store.counts()):
            look(_probes(recipe, asked))
        done = derive(
            recipe,
            prompts,
            look,
            test=partial(tested, recipe, store, progress=progress),
            tests=tests,
            reviews=store.reviews.all(),
            shard=shard,
            until=until,
            show=partial(write_items, recipe),
            progress=progress,
        )
        return _finish(recipe, prompts, done, store)


def write_again(recipe: SynthRecipe, progress: Progress | None = None) -> DataSet:
    """The data set of what is stored, without asking anything: after reviews, or from a run that was given up.

    Raises:
        DataError: nothing is stored, or no row is left.
    """
    ready = check(recipe)
    with CallStore(Path(recipe.output) / STORE) as store:
        return _write_stored(recipe, ready, store, progress)


def join(recipe: SynthRecipe, others: Sequence[Path], progress: Progress | None = None) -> DataSet:
    """Take the stores of other shards over into the recipe's own, then write the data set of all of them.

    Raises:
        DataError: a file that is missing, no store, or of another recipe; or no row is left.
    """
    progress = progress or Progress()
    ready = check(recipe)
    with CallStore(Path(recipe.output) / STORE, recipe.identity()) as store:
        for file in others:
            merged = store.merge(file)
            progress.log(f"{file}: {merged.added} calls added, {merged.duplicates} were there already")
        return _write_stored(recipe, ready, store, progress)


def _write_stored(recipe: SynthRecipe, ready: Ready, store: CallStore, progress: Progress | None) -> DataSet:
    prompts, tests = ready
    test = partial(tested, recipe, store, progress=progress)
    done = derive(
        recipe, prompts, stored(store), test=test, tests=tests, reviews=store.reviews.all(), progress=progress
    )
    return _finish(recipe, prompts, done, store)


class Ready(NamedTuple):
    """What was read while a run was checked: its prompts, and the test data that rows must not touch."""

    prompts: Prompts
    tests: ContaminationIndex | None


def check(recipe: SynthRecipe, *, shard: Shard | None = None, until: str | None = None) -> Ready:
    """Find out before anything is asked what would stop the run in the end.

    Raises:
        RecipeError: prompts or a language that cannot be used, no such stage, a shard that is none, a budget in dollars
            where nothing has a price.
        DataError: a test file that is missing.
        MissingExtraError: a library that a filter needs.
        SandboxError: answers with tests, and nowhere to run them.
    """
    stages_until(until)
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise RecipeError(f"--shard {shard[0]}/{shard[1]}: expected NUMBER/HOW-MANY such as 1/8, counted from 1")
    if recipe.budget_usd is not None and not any(m.prompt_usd or m.completion_usd for m in recipe.used_models()):
        raise RecipeError(
            f"a budget of ${recipe.budget_usd:.2f}, but no model has a price, so that nothing would ever count; set prompt_usd "
            "and completion_usd of the models, give --budget-tokens instead, or leave the budget out"
        )
    prompts = Prompts(recipe.prompts)
    filters.check_language(recipe.filters)
    tests = index_of_tests(recipe.filters)
    if recipe.filters.near_duplicates is not None:
        NearDuplicateIndex(NearDuplicateRule(threshold=recipe.filters.near_duplicates))
    if any(domain.samples for domain in recipe.domains) and importlib.util.find_spec("math_verify") is None:
        raise MissingExtraError("math-verify", "eval", "comparing samples of mathematical answers (`samples`)")
    if any(domain.tests for domain in recipe.domains) and not recipe.filters.unsafe_code:
        if (reason := sandbox.available()) is not None:
            raise SandboxError(
                f"domains with 'tests' need a sandbox to run them in, and there is none: {reason}; install bubblewrap 0.8 or "
                "newer, set filters.unsafe_code=true to run the code without one, or leave 'tests' out"
            )
    return Ready(prompts, tests)


def _run_tests(recipe: SynthRecipe, cases: Sequence[checks.Case]) -> dict[checks.Case, str | None]:
    return dict(zip(cases, checks.run_tests(cases, unsafe=recipe.filters.unsafe_code), strict=True))


def tested(
    recipe: SynthRecipe, store: CallStore, cases: Sequence[checks.Case], progress: Progress | None = None
) -> dict[checks.Case, str | None]:
    """The verdicts on answers with tests; those that are missing are found and kept, so that no run changes them."""
    known = verdicts(store, cases)
    missing = [case for case in dict.fromkeys(cases) if case not in known]
    if not missing:
        return known
    progress = progress or Progress()
    progress.start("answers run with their tests", len(missing))
    for start in range(0, len(missing), TESTS_AT_ONCE):
        found = _run_tests(recipe, missing[start : start + TESTS_AT_ONCE])
        store.verdicts.add({checks.case_key(case): reason or "" for case, reason in found.items()})
        known |= verdicts(store, list(found))
        progress.advance(len(found))
    progress.finish()
    return known


def verdicts(store: CallStore, cases: Sequence[checks.Case]) -> dict[checks.Case, str | None]:
    """The verdicts that there are."""
    keys = {case: checks.case_key(case) for case in cases}  # cases of the same code have the same one
    known = store.verdicts.get(set(keys.values()))
    return {case: known[key] or None for case, key in keys.items() if key in known}


def _probes(recipe: SynthRecipe, asked: Mapping[str, str]) -> list[Request]:
    """A short question to each served model, asked as its first stage asks."""
    out = []
    for role, stage in asked.items():
        model, call = recipe.model(role), recipe.call(stage)
        if isinstance(model, ServedModel):
            address = f"{model.endpoint.model}@{model.endpoint.base_url}"
            out.append(
                replace(PROBE, role=role, temperature=call.temperature, max_tokens=call.max_tokens, model=address)
            )
    return out


def stored(store: CallStore) -> Look:
    """What is in the store, and nothing else."""
    return lambda requests: outcomes(store, requests)


def outcomes(store: CallStore, requests: Sequence[Request]) -> dict[str, Response]:
    """The outcomes that there are, by key."""
    found = ((request.key, store.response(request.key)) for request in requests)
    return {key: outcome for key, outcome in found if outcome is not None}


def _check_topics_are_there(recipe: SynthRecipe, prompts: Prompts, store: CallStore) -> None:
    """Shards work on parts of the same topics, so these come first and are the same everywhere."""
    done = derive(recipe, prompts, stored(store), until="sub_topics")
    if done.ledger.open() or not any(done.sub_topics.values()):
        raise DataError(
            f"{store.file}: the topics are not complete, and every shard needs the same ones; run `ultrafuser synth RECIPE "
            f"--until sub_topics` once, then copy {STORE} to every shard's output folder"
        )


def _finish(recipe: SynthRecipe, prompts: Prompts, done: DataSet, store: CallStore) -> DataSet:
    wrong = done.ledger.unbalanced()
    if wrong:
        raise AssertionError(f"the accounts do not add up: {'; '.join(wrong)}")
    write_data_set(recipe, prompts, done, store)
    if done.stopped_after is None and not done.rows:
        reasons = (
            ", ".join(f"{reason} ({number})" for reason, number in list(done.ledger.reasons().items())[:5]) or "none"
        )
        raise DataError(
            f"{recipe.output}: no row is left; the reasons that come first: {reasons}; see report.json there, which quotes "
            "examples, then change the filters, the prompts or the models"
        )
    return done
