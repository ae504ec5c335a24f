"""Measure one built system of a comparison: losses, tasks, speed, memory, sizes.

`python -m ultrafuser.compare.measure FOLDER NAME` is what `ultrafuser compare` starts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ultrafuser.compare.process import run_step
from ultrafuser.compare.recipe import SystemRecipe
from ultrafuser.compare.systems.best_of import BestOfLM, choices
from ultrafuser.compare.systems.routed_lm import RoutedLM
from ultrafuser.compare.systems.router import Router, route_by, router_losses
from ultrafuser.compare.workspace import MEASURED, Workspace, eval_options
from ultrafuser.data.schema import Row
from ultrafuser.data.templates import Rendered
from ultrafuser.data.writing import write_json
from ultrafuser.errors import DataError
from ultrafuser.evaluate.lm.load import LoadedModel, load_model
from ultrafuser.evaluate.lm.parameters import count_parameters, peak_rss_mb
from ultrafuser.evaluate.lm.response_cache import RememberingLM
from ultrafuser.evaluate.losses import RowLoss, by_domain, by_stratum, fused_losses, group_losses
from ultrafuser.evaluate.run import all_tasks
from ultrafuser.evaluate.scoring import TaskScores
from ultrafuser.evaluate.tasks import TASKS
from ultrafuser.inspect.run import trace_rows
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.model.manifest import SpecialistEntry
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.specialists import pick_device
from ultrafuser.train.features import FeatureStore
from ultrafuser.train.metrics import read_metrics
from ultrafuser.train.rows import load_source


@dataclass
class Opened:
    """A system that was loaded.

    Attributes:
        lm: what answers.
        fresh: the same without any memory, to be timed.
        traces: token weights over an answer of each domain; for a gate.
        chosen: of how many answers each specialist's was taken, and by whom; for best-of-K.
        read: the test rows -> their losses, and each row's mean weight of every specialist where a gate weighs; None
            where a loss is not defined.
    """

    lm: LM
    fingerprint: str
    parameters: dict[str, int]
    rows: Callable[[], list[Rendered]]
    read: Callable[[list[Rendered]], tuple[list[RowLoss], list[list[float]] | None]] | None
    fresh: LM | None = None
    traces: Callable[[], list[TokenTrace]] | None = None
    chosen: Callable[[], dict[str, dict[str, int]]] | None = None


def measure(place: Workspace, name: str) -> dict[str, Any]:
    """Everything about a built system, in one file; answers given before are not asked again.

    Raises:
        UltraFuserError: it cannot be measured; the message says why.
    """
    system, home, recipe = place.system(name), place.home(name), place.recipe
    began = time.monotonic()
    opened = _OPENERS[system.kind](place, system)
    facts: dict[str, Any] = {"key": place.key(name, "measure"), "parameters": opened.parameters}
    facts["tokens_per_s"] = _speed(place, opened.fresh or opened.lm)
    facts["peak_memory_mb"] = _peak_memory_mb()  # so far: benchmarks hold more for some systems than for others
    facts["loss"], facts["sample_weights"] = _losses(opened) if recipe.test else (None, None)
    facts["tasks"] = {task: scores.to_dict() for task, scores in _tasks(place, name, opened).items()}
    if opened.traces is not None:
        facts["traces"] = [trace.to_dict() for trace in opened.traces()]
    if opened.chosen is not None:
        facts["chosen"] = opened.chosen()
    facts["training"] = read_metrics(home / "run" / "metrics.jsonl")
    facts["seconds"] = round(time.monotonic() - began, 1)
    write_json(home / MEASURED, facts)
    return facts


def _peak_memory_mb() -> int:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return peak_rss_mb()


def _losses(opened: Opened) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """By domain and row: nats and tokens; and the mean weight of every specialist."""
    if opened.read is None:
        return None, None
    rows = opened.rows()
    found, weights = opened.read(rows)
    losses = {domain: asdict(stratum) for domain, stratum in by_stratum(rows, found).items()}
    return losses, by_domain(rows, weights) if weights is not None else None


def _tasks(place: Workspace, name: str, opened: Opened) -> dict[str, TaskScores]:
    recipe = place.recipe
    names = [task for task in recipe.tasks_of(place.system(name)) if opened.read is not None or not _weighs(task)]
    options = eval_options(recipe, names)
    store = place.answers(opened.fingerprint)
    try:
        return all_tasks(LoadedModel(name, opened.lm, opened.fingerprint), options, store, place.progress)
    finally:
        store.close()


def _weighs(task: str) -> bool:
    """Whether a task asks for log-likelihoods, which a choice among answers does not have."""
    return task in TASKS and TASKS[task].needs_log_probs


def _speed(place: Workspace, lm: LM) -> dict[str, Any]:
    """New tokens a second: short test prompts, one at a time, always the same number of new tokens."""
    settings = place.recipe.decode
    each = -(-settings.prompts // max(1, len(place.recipe.test)))
    rows = [row for source in place.recipe.test for row in load_source(source)[:each]]
    chats = [_question(row) for row in rows] or [[{"role": "user", "content": "Why is the sky blue?"}]]
    chats = sorted(chats, key=lambda chat: len(chat[-1]["content"]))[: settings.prompts]
    options = {
        "until": [],
        "do_sample": False,
        "max_gen_toks": settings.new_tokens,
        "min_new_tokens": settings.new_tokens,
    }
    runs = []
    for _ in range(settings.repeats + 1):
        began = time.monotonic()
        for i, chat in enumerate(chats):
            request = Instance("generate_until", {}, (lm.apply_chat_template(chat), dict(options)), i)
            lm.generate_until([request])
        runs.append(len(chats) * settings.new_tokens / (time.monotonic() - began))
    runs = runs[1:]  # the first one warms up
    return {"median": sorted(runs)[len(runs) // 2], "runs": runs, "batch_size": 1}


def _question(row: Row) -> list[dict[str, str]]:
    """A row up to its first answer."""
    chat = row.chat()
    return chat[: next(i for i, message in enumerate(chat) if message["role"] == "assistant")]


# ---------------------------------------------------------------- how each kind is opened


def _open_served(place: Workspace, served: LoadedModel, features: Path) -> Opened:
    """A fused model, or one model alone."""
    model, renderer = served.model, served.renderer
    assert model is not None and renderer is not None
    is_fused = len(model.config.names) > 1

    def read(rows: list[Rendered]) -> tuple[list[RowLoss], list[list[float]] | None]:
        if is_fused:
            store = FeatureStore.build(model, rows, features, progress=place.progress)
            return fused_losses(model, store)
        group, vocab = model.groups[0], model.config.vocab_size
        losses = group_losses(group, rows, vocab, adapter=0, what=served.name, progress=place.progress)
        return losses, None

    def traces() -> list[TokenTrace]:
        rows = [load_source(source)[0] for source in place.recipe.test]
        return list(trace_rows(model, renderer, rows))

    parameters = count_parameters(model if is_fused else model.groups[0].model)
    opened = Opened(served.lm, served.fingerprint, parameters, lambda: place.rows("test", renderer), read)
    opened.traces = traces if is_fused else None
    return opened


def _alone(place: Workspace, system: SystemRecipe) -> Opened:
    if system.kind == "base":
        specialist = place.base()
    else:
        specialist = next(one for one in place.recipe.training().specialists if one.name == system.specialist)
    return _open_served(place, place.alone(specialist), place.home(str(system.name)) / "features")


def _fused(place: Workspace, system: SystemRecipe) -> Opened:
    home = place.home(str(system.name))
    folder = home / "run" / "fused"
    served = load_model(str(folder), device=place.recipe.device, dtype=place.recipe.training().dtype)
    assert served.model is not None and served.renderer is not None
    served = place.load_model(served.model, served.renderer.tokenizer, str(system.name), folder)
    frozen = system.kind == "static" or all(stage.name == "gate" for stage in place.training(system).stages)
    # frozen specialists read the test rows once for all systems that keep them
    return _open_served(place, served, place.folder / "features" / "test" if frozen else home / "features")


def _merged(place: Workspace, system: SystemRecipe) -> Opened:
    first = place.recipe.training().specialists[0]
    folder = str(place.home(str(system.name)) / "model")
    source = {"model": folder, "adapter": None, "gguf_file": None, "revision": None, "adapter_revision": None}
    served = place.alone(first.model_copy(update=source | {"name": str(system.name)}))
    return _open_served(place, served, Path())


def _btx(place: Workspace, system: SystemRecipe) -> Opened:
    from transformers import AutoTokenizer

    from ultrafuser.compare.systems.btx import load_btx

    folder = place.home(str(system.name)) / "model"
    model, tokenizer = load_btx(folder), AutoTokenizer.from_pretrained(folder)
    model.to(pick_device(place.recipe.device))
    name = str(system.name)
    spec: SpecialistEntry = {"name": name, "domain": name, "source": {"model": str(folder)}, "config": model.config.to_dict(),
            "chat_template": tokenizer.chat_template}  # fmt: skip
    config = UltraFuserConfig([spec], vocab_size=len(tokenizer))
    wrapped = UltraFuserForCausalLM(config, [SpecialistGroup(model, [name])]).eval()
    wrapped.generation_config.eos_token_id = tokenizer.eos_token_id
    wrapped.generation_config.pad_token_id = tokenizer.pad_token_id
    opened = _open_served(place, place.load_model(wrapped, tokenizer, name, folder), Path())
    return Opened(opened.lm, opened.fingerprint, count_parameters(model), opened.rows, opened.read)


def _remembering(place: Workspace, members: dict[str, LoadedModel]) -> dict[str, LM]:
    """The specialists with the answers that they gave when they were measured alone."""
    return {
        name: RememberingLM(one.lm, place.answers(one.fingerprint), seed=place.recipe.seed)
        for name, one in members.items()
    }


def _sizes(model: UltraFuserForCausalLM) -> tuple[int, int]:
    """(parameters of all specialists, the most that one of them has): its base, and of the adapters its own."""
    total = sum(count_parameters(group.model)["total"] for group in model.groups)
    adapters = [sum(p.numel() for p in group.adapter_parameters()) for group in model.groups]
    one = max(
        count_parameters(group.model)["total"] - own + own // group.size
        for group, own in zip(model.groups, adapters, strict=True)
    )
    return total, one


def _routed(place: Workspace, system: SystemRecipe) -> Opened:
    router = Router.load(place.home(str(system.name)) / "model")
    whole = place.whole()
    model, renderer, members = whole.model, whole.renderer, place.members(whole)
    assert model is not None and renderer is not None
    choose = route_by(router, model, renderer)

    def read(rows: list[Rendered]) -> tuple[list[RowLoss], None]:
        store = FeatureStore.build(model, rows, place.folder / "features" / "test", progress=place.progress)
        return router_losses(router, store), None

    total, one = _sizes(model)
    opened = Opened(
        RoutedLM(_remembering(place, members), choose),
        f"router {place.key(str(system.name), 'build')}",
        {"total": total + router.num_parameters, "active": one},
        lambda: place.rows("test", renderer),
        read,
    )
    opened.fresh = RoutedLM({name: member.lm for name, member in members.items()}, choose, remember=False)
    return opened


def _best_of(place: Workspace, system: SystemRecipe) -> Opened:
    from ultrafuser.endpoint.client import Endpoint
    from ultrafuser.evaluate.judged.judge import Judge

    judge, who = None, "log-probability"
    if system.by == "judge":
        if place.recipe.judge is None:
            raise DataError(f"system {system.name!r} chooses by judge, but the recipe names none; add 'judge'")
        judge = Judge(Endpoint(place.recipe.judge), place.answers("judgements"), seed=place.recipe.seed)
        who = judge.identity
    whole = place.whole()
    members = place.members(whole)
    assert whole.model is not None and whole.renderer is not None
    tokenizer, (total, _) = whole.renderer.tokenizer, _sizes(whole.model)
    fingerprint = f"best of {place.key(str(system.name), 'build')} by {who}"
    store = place.answers(fingerprint)
    lm = BestOfLM(_remembering(place, members), tokenizer, judge, store)
    opened = Opened(lm, fingerprint, {"total": total, "active": total}, lambda: [], None)
    opened.fresh = BestOfLM({name: member.lm for name, member in members.items()}, tokenizer, judge)
    opened.chosen = lambda: choices(store)
    return opened


_OPENERS: dict[str, Callable[[Workspace, SystemRecipe], Opened]] = {
    "base": _alone,
    "specialist": _alone,
    "static": _fused,
    "fused": _fused,
    "tuned": _fused,
    "merge": _merged,
    "btx": _btx,
    "router": _routed,
    "best_of": _best_of,
}

if __name__ == "__main__":
    sys.exit(run_step(measure))
