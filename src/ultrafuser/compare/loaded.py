"""A loaded system: what answers, what gives losses, and its size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_eval.api.model import LM

from ultrafuser.compare.workspace import Workspace
from ultrafuser.data.sources import RowReader
from ultrafuser.data.templates import Rendered
from ultrafuser.evaluate.lm.load import LoadedModel
from ultrafuser.evaluate.lm.parameters import count_parameters
from ultrafuser.evaluate.lm.response_cache import CachedLM
from ultrafuser.evaluate.losses import RowLoss, fused_losses, group_losses
from ultrafuser.inspect.run import trace_rows
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.train.features import FeatureStore
from ultrafuser.train.rows import load_source


@dataclass
class TestLosses:
    """The test rows as a system reads them, their losses, and each row's mean gate weights (empty: no gate)."""

    rows: Sequence[Rendered]
    losses: list[RowLoss]
    gate_weights: list[list[float]] | None = None


@dataclass
class LoadedSystem:
    """A system, ready to be measured.

    Attributes:
        lm: what answers.
        fingerprint: key of the cached answers. It differs for systems that answer differently.
        parameters: `total` and `active`.
        read_test_rows: gives the losses. None: this system has no loss.
        timed_lm: `lm` without cached answers, for timing. None: `lm` caches none.
        traces: token weights over one answer of each test source (systems with a gate).
        chosen: counts of the chosen answers by specialist and by rule (best-of-K).
    """

    lm: LM
    fingerprint: str
    parameters: dict[str, int]
    read_test_rows: Callable[[], TestLosses] | None
    timed_lm: LM | None = None
    traces: Callable[[], list[TokenTrace]] = list
    chosen: Callable[[], dict[str, dict[str, int]]] | None = None


def load_model(workspace: Workspace, loaded: LoadedModel, features: Path) -> LoadedSystem:
    """Make a system of a fused model, or of a model of one specialist."""
    model, renderer = loaded.model, loaded.renderer
    assert model is not None and renderer is not None  # no endpoint
    has_gate = len(model.config.names) > 1

    def read_test_rows() -> TestLosses:
        rows = workspace.rows("test", renderer)
        if has_gate:
            store = FeatureStore.build(model, rows, features, progress=workspace.progress)
            return TestLosses(rows, *fused_losses(model, store))
        group, progress = model.groups[0], workspace.progress
        head = model.heads()[0]._replace(temperature=1.0)
        losses = group_losses(group, rows, head, adapter=0, label=loaded.name, progress=progress)
        return TestLosses(rows, losses)

    def traces() -> list[TokenTrace]:
        if not has_gate:
            return []
        reader = RowReader(workspace.settings.training().data.on_bad_row)
        rows = [load_source(source, reader)[0] for source in workspace.settings.test]
        return list(trace_rows(model, renderer, rows))

    return LoadedSystem(
        lm=loaded.lm,
        fingerprint=loaded.fingerprint,
        parameters=loaded.parameters() or {},
        read_test_rows=read_test_rows,
        traces=traces,
    )


def recall_answers(workspace: Workspace, specialists: Mapping[str, LoadedModel]) -> dict[str, LM]:
    """The specialists, with the answers that they gave when they were measured alone."""
    return {
        name: CachedLM(loaded.lm, workspace.answers(loaded.fingerprint), seed=workspace.settings.seed)
        for name, loaded in specialists.items()
    }


def specialist_sizes(model: UltraFuserForCausalLM) -> tuple[int, int]:
    """(parameters of all specialists, those of the largest one: its base and its own adapter)."""
    total, largest = 0, 0
    for group in model.groups:
        size = count_parameters(group.model)["total"]
        adapters = sum(parameter.numel() for parameter in group.adapter_parameters())
        total += size
        largest = max(largest, size - adapters + adapters // group.size)
    return total, largest
