"""`ultrafuser synth`: derive items from stored responses, request what is missing, write the data set."""

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
from ultrafuser.synth.calls.request import STOPS, ModelClient, Request, Response
from ultrafuser.synth.calls.store import CallStore, Review
from ultrafuser.synth.output.card import write_data_set, write_items
from ultrafuser.synth.output.dataset import (
    DataSet,
    as_rows,
    balanced,
    index_of_tests,
    without_duplicates,
    without_overlaps,
)
from ultrafuser.synth.plan import plan, stages_until
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import LocalModel, ServedModel, SynthRecipe
from ultrafuser.synth.stages import lists, texts
from ultrafuser.synth.stages.stage_run import Lookup, StageRun, TestRunner
from ultrafuser.synth.text import checks, filters

STORE = "calls.sqlite"
TESTS_AT_ONCE = 16 * (os.cpu_count() or 1)  # answers whose tests run before their verdicts are stored
_ITEM_STAGES = STOPS[: STOPS.index("responses")]  # stages that make topics and instructions
Shard = tuple[int, int]  # (number from 1 on, number of shards)


def derive(
    recipe: SynthRecipe,
    prompts: Prompts,
    get_responses: Lookup,
    *,
    run_tests: TestRunner | None = None,
    test_index: ContaminationIndex | None = None,
    reviews: Mapping[str, Review] | None = None,
    shard: Shard | None = None,
    until: str | None = None,
    on_items: Callable[[DataSet], None] = lambda _: None,
    progress: Progress | None = None,
) -> DataSet:
    """Run all stages, up to the rows: a pure function of the recipe, the prompts, the responses and the reviews.

    Args:
        get_responses: requests -> their responses by key. Items whose request has no response are pending.
        run_tests: answers with tests -> their verdicts. None: every test is run.
        test_index: the test data that rows must not overlap. None: it is read from the files of the recipe.
        shard: the shard of the sub-topics to work on. A shard stops before the rows.
        until: the stage to stop after.
        on_items: called after each stage that changes topics or instructions.
    """
    run = StageRun(recipe, prompts, get_responses, run_tests or partial(_run_tests, recipe))
    data = DataSet(run.ledger)
    last_stage = STOPS[-1] if shard is not None else None
    for stage in _stages(run, data, shard):
        if stage in _ITEM_STAGES:
            on_items(data)
        if stage in (until, last_stage):
            data.stopped_after = stage
            return data
    rows = as_rows(recipe, data.conversations, reviews or {}, run.ledger)
    rows = without_duplicates(rows, recipe.filters, run.ledger, progress)
    rows, data.overlaps = without_overlaps(rows, test_index or index_of_tests(recipe.filters), run.ledger)
    data.rows = balanced(rows, recipe, run.ledger)
    return data


def _stages(run: StageRun, data: DataSet, shard: Shard | None) -> Iterator[str]:
    """Run the stages one by one. Yields the name of each of `STOPS` when its result is in `data`."""
    data.topics = lists.find_topics(run)
    yield "meta_topics"
    data.sub_topics = lists.find_sub_topics(run, data.topics)
    yield "sub_topics"
    list_requests = lists.find_instructions(run, lists.select_shard(data.sub_topics, shard))
    data.instructions = [instruction for target in list_requests for instruction in target.items]
    yield "instructions"
    data.instructions = lists.expand(run, list_requests)
    yield "expand"
    data.instructions = texts.rewrite_complex(run, data.instructions)
    yield "complex"
    data.conversations = texts.answer(run, data.instructions)
    yield "responses"
    checked = texts.check_answers(run, texts.filter_answers(run, data.conversations))
    data.conversations = texts.compare_samples(run, checked)
    yield "checks"
    data.conversations = texts.judge(run, data.conversations)
    yield "judge"
    data.conversations = texts.add_turns(run, data.conversations)
    yield "turns"


# ---------------------------------------------------------------- run, join, write again


def synthesise(
    recipe: SynthRecipe,
    *,
    budget_usd: float | None = None,
    budget_tokens: int | None = None,
    shard: Shard | None = None,
    until: str | None = None,
    retry_failed: bool = False,
    clients: Mapping[str, ModelClient] | None = None,
    progress: Progress | None = None,
) -> DataSet:
    """Request what is missing, then write the data set. After an interruption it continues from the stored responses.

    Before the first stage of a new store, each served model of the run gets a short request, so that a missing key or a
    wrong name is found before anything is paid for.

    Args:
        budget_usd, budget_tokens: limits for the whole store, in place of the recipe's.
        retry_failed: repeat requests that failed, for example after raising a model's context.
        clients: role -> client, in place of the models of the recipe.

    Raises:
        RecipeError, DataError, MissingExtraError, SandboxError: found before the first request.
        BudgetExceeded, EndpointError: during the run. Stored responses are kept.
        DataError: no row is left. The report says why.
    """
    from ultrafuser.synth.calls.clients import make_clients
    from ultrafuser.synth.calls.local import check_files
    from ultrafuser.synth.calls.scheduler import answer

    progress = progress or Progress()
    budgets = {"budget_usd": budget_usd, "budget_tokens": budget_tokens}
    recipe = recipe.model_copy(update={key: value for key, value in budgets.items() if value is not None})
    # 1. Find every problem that would stop the run in the end.
    checked = check(recipe, shard=shard, until=until)
    planned_stages = plan(recipe, checked.prompts, until)
    first_stages = {planned.model: planned.stage for planned in reversed(planned_stages)}  # by role
    if clients is None:
        for role in first_stages:
            if isinstance(model := recipe.model(role), LocalModel):
                check_files(model)
    with CallStore(Path(recipe.output) / STORE, recipe.identity()) as store:
        if shard is not None:
            _check_topics_are_complete(recipe, checked.prompts, store)
        if retry_failed:
            progress.log(f"{store.forget_failures()} failed or truncated calls are requested again")
        models = clients if clients is not None else make_clients(recipe.used_models())

        def get_responses(requests: Sequence[Request]) -> dict[str, Response]:
            usd, tokens = recipe.budget_usd, recipe.budget_tokens
            answer(requests, store, models, budget_usd=usd, budget_tokens=tokens, progress=progress)
            return stored_responses(store, requests)

        # 2. Probe the served models of a new store.
        if clients is None and all(count.stage == PROBE.stage for count in store.counts()):
            get_responses(_probes(recipe, first_stages))
        # 3. Run the stages, then write the data set.
        options = {"shard": shard, "until": until, "on_items": partial(write_items, recipe)}
        return _derive_and_write(recipe, checked, store, get_responses, progress, **options)


def join(recipe: SynthRecipe, stores: Sequence[Path] = (), progress: Progress | None = None) -> DataSet:
    """Merge the stores of other shards into the recipe's own, then write the data set of all stored responses.

    It makes no requests. Without `stores` it writes the data set again: after reviews, or from a run that was stopped.

    Raises:
        DataError: nothing is stored, a file is missing, is not a store or belongs to another recipe, or no row is left.
    """
    progress = progress or Progress()
    checked = check(recipe)
    with CallStore(Path(recipe.output) / STORE, recipe.identity() if stores else None) as store:
        for file in stores:
            merged = store.merge(file)
            progress.log(f"{file}: {merged.added} calls added, {merged.duplicates} were there already")
        return _derive_and_write(recipe, checked, store, partial(stored_responses, store), progress)


def _derive_and_write(
    recipe: SynthRecipe,
    checked: CheckedRecipe,
    store: CallStore,
    get_responses: Lookup,
    progress: Progress | None,
    **options: Any,
) -> DataSet:
    """Run the stages with the tests and reviews of a store, then write the data set. `options` go to `derive`."""
    prompts, test_index = checked
    run_tests = partial(run_missing_tests, recipe, store, progress=progress)
    options |= {"run_tests": run_tests, "test_index": test_index, "reviews": store.reviews.all(), "progress": progress}
    data = derive(recipe, prompts, get_responses, **options)
    if entries := data.ledger.unbalanced():
        raise AssertionError(f"the ledger does not add up: {'; '.join(entries)}")
    write_data_set(recipe, prompts, data, store)
    if data.stopped_after is None and not data.rows:
        counts = list(data.ledger.reasons().items())[:5]
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counts) or "none"
        raise DataError(
            f"{recipe.output}: no row is left; the most frequent reasons: {reasons}; see report.json there, which quotes "
            "examples, then change the filters, the prompts or the models"
        )
    return data


def stored_responses(store: CallStore, requests: Sequence[Request]) -> dict[str, Response]:
    """The stored responses, by key. A `Lookup` once the store is bound."""
    pairs = ((request.key, store.response(request.key)) for request in requests)
    return {key: response for key, response in pairs if response is not None}


def _probes(recipe: SynthRecipe, first_stages: Mapping[str, str]) -> list[Request]:
    """A short request to each served model, with the settings of its first stage."""
    probes = []
    for role, stage in first_stages.items():
        model, call = recipe.model(role), recipe.call(stage)
        if isinstance(model, ServedModel):
            address = f"{model.endpoint.model}@{model.endpoint.base_url}"
            probe = replace(PROBE, role=role, model=address)
            probes.append(replace(probe, temperature=call.temperature, max_tokens=call.max_tokens))
    return probes


# ---------------------------------------------------------------- checks before the first request


class CheckedRecipe(NamedTuple):
    """What was read while a recipe was checked: its prompts, and the test data that rows must not overlap."""

    prompts: Prompts
    test_index: ContaminationIndex | None


def check(recipe: SynthRecipe, *, shard: Shard | None = None, until: str | None = None) -> CheckedRecipe:
    """Find every problem that would stop the run in the end, before the first request.

    Raises:
        RecipeError: unusable prompts or language, an unknown stage, a wrong shard, or a budget in dollars without prices.
        DataError: a test file is missing.
        MissingExtraError: a filter needs a library that is not installed.
        SandboxError: answers have tests, and there is no sandbox to run them in.
    """
    stages_until(until)
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise RecipeError(f"--shard {shard[0]}/{shard[1]}: expected NUMBER/HOW-MANY such as 1/8, counted from 1")
    if recipe.budget_usd is not None and not any(m.prompt_usd or m.completion_usd for m in recipe.used_models()):
        raise RecipeError(
            f"a budget of ${recipe.budget_usd:.2f}, but no model has a price, so nothing would count; set prompt_usd "
            "and completion_usd of the models, use --budget-tokens instead, or leave the budget out"
        )
    prompts = Prompts(recipe.prompts)
    filters.check_language(recipe.filters)
    test_index = index_of_tests(recipe.filters)
    if recipe.filters.near_duplicates is not None:  # finds a missing library
        NearDuplicateIndex(NearDuplicateRule(threshold=recipe.filters.near_duplicates))
    if any(domain.samples for domain in recipe.domains) and importlib.util.find_spec("math_verify") is None:
        raise MissingExtraError("math-verify", "eval", "comparing samples of mathematical answers (`samples`)")
    if any(domain.tests for domain in recipe.domains) and not recipe.filters.unsafe_code:
        if (reason := sandbox.available()) is not None:
            raise SandboxError(
                f"domains with 'tests' need a sandbox, and there is none: {reason}; install bubblewrap 0.8 or "
                "newer, set filters.unsafe_code=true to run the code without one, or leave 'tests' out"
            )
    return CheckedRecipe(prompts, test_index)


def _check_topics_are_complete(recipe: SynthRecipe, prompts: Prompts, store: CallStore) -> None:
    """Shards work on parts of the same topics, so these must be there before."""
    data = derive(recipe, prompts, partial(stored_responses, store), until="sub_topics")
    if data.ledger.pending() or not any(data.sub_topics.values()):
        raise DataError(
            f"{store.file}: the topics are not complete, and every shard needs the same ones; run `ultrafuser synth RECIPE "
            f"--until sub_topics` once, then copy {STORE} to every shard's output folder"
        )


# ---------------------------------------------------------------- tests of generated code


def _run_tests(recipe: SynthRecipe, cases: Sequence[checks.Case]) -> dict[checks.Case, str | None]:
    return dict(zip(cases, checks.run_tests(cases, unsafe=recipe.filters.unsafe_code), strict=True))


def run_missing_tests(
    recipe: SynthRecipe, store: CallStore, cases: Sequence[checks.Case], progress: Progress | None = None
) -> dict[checks.Case, str | None]:
    """The verdicts on answers with tests. Missing ones are computed and stored, so that no later run changes them."""
    verdicts = stored_verdicts(store, cases)
    missing = [case for case in dict.fromkeys(cases) if case not in verdicts]
    if not missing:
        return verdicts
    progress = progress or Progress()
    progress.start("answers run with their tests", len(missing))
    for start in range(0, len(missing), TESTS_AT_ONCE):
        batch = _run_tests(recipe, missing[start : start + TESTS_AT_ONCE])
        store.verdicts.add({checks.case_key(case): reason or "" for case, reason in batch.items()})
        verdicts |= stored_verdicts(store, list(batch))  # cases with the same code share the first verdict
        progress.advance(len(batch))
    progress.finish()
    return verdicts


def stored_verdicts(store: CallStore, cases: Sequence[checks.Case]) -> dict[checks.Case, str | None]:
    """The verdicts that are stored. Cases with the same code have the same key."""
    keys = {case: checks.case_key(case) for case in cases}
    reasons = store.verdicts.get(set(keys.values()))
    return {case: reasons[key] or None for case, key in keys.items() if key in reasons}
