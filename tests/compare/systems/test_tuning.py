"""Further training equals a plain loop, and an interrupted run the uninterrupted one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import tiny, tokens
from training_fixtures import Interruption, StopAt
from ultrafuser.compare.systems import tuning
from ultrafuser.compare.systems.btx_model import build_btx, train_btx
from ultrafuser.compare.systems.tuning import tune
from ultrafuser.data.balance import BalancedBatchSampler
from ultrafuser.data.templates import Rendered
from ultrafuser.errors import DataError, TrainingError

OPTIONS: dict[str, Any] = {"steps": 5, "rows_per_domain": 2, "lr": 0.01}


def rows() -> list[Rendered]:
    """Two renderings of unequal lengths for each row, two answers in some."""
    out = []
    for d, domain in enumerate(("text", "code")):
        for i in range(4):
            first, second = tokens(1, 4 + i, seed=i)[0].tolist(), tokens(1, 7, seed=9 + i + d)[0].tolist()
            answer = tokens(1, 2 + i, seed=20 + i + 5 * d)[0].tolist()
            ids = tuple((*prompt, *answer[:-1]) for prompt in (first, second))
            index = tuple(tuple(range(len(p) - 1, len(p) - 1 + len(answer))) for p in (first, second))
            out.append(Rendered(f"{domain}-{i}", domain, ids, index, tuple(answer)))
    return out


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(("template", "rows_per_pass"), [(0, 8), (1, 8), (0, 1)])
def test_it_equals_a_plain_loop(tmp_path, template, rows_per_pass):
    """Logits of transformers, cross entropy row by row, all rows of a batch at once."""
    model, oracle, data = tiny(seed=1), tiny(seed=1), rows()
    tune(model, data, tmp_path, template=template, rows_per_pass=rows_per_pass, **OPTIONS)
    sampler = BalancedBatchSampler([row.domain for row in data], 2, 5, lengths=None)
    optimizer = torch.optim.AdamW(oracle.parameters(), weight_decay=0.0)
    for step, batch in enumerate(sampler.global_batches()):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 5))
        nats = {domain: [] for domain in ("text", "code")}
        for row in (data[i] for i in batch):
            logits = oracle(torch.tensor([row.input_ids[template]])).logits[0, list(row.response_index[template])]
            each = torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels), reduction="none")
            nats[row.domain].append(each)
        loss = torch.cat([each for own in nats.values() for each in own]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        optimizer.step()
        line = lines(tmp_path)[step]
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        for domain, own in nats.items():
            assert line[f"loss/{domain}"] == pytest.approx(torch.cat(own).mean().item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, dict(oracle.named_parameters())[name], atol=2e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("kind", ["plain", "btx"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, kind, stop):
    """Dropout draws random numbers, which a resumed run must draw alike."""

    def fresh() -> Any:
        models = [tiny(seed=seed, attention_dropout=0.3) for seed in range(2)]
        return models[0] if kind == "plain" else build_btx([*models, tiny(seed=2, attention_dropout=0.3)])

    run = tune if kind == "plain" else train_btx
    stage = "tuned" if kind == "plain" else "btx"
    whole, part = fresh(), fresh()
    run(whole, rows(), tmp_path / "whole", **OPTIONS)
    with pytest.raises(Interruption):
        run(part, rows(), tmp_path / "part", save_every=2, progress=Stop(stage, stop), **OPTIONS)
    again = fresh()
    run(again, rows(), tmp_path / "part", save_every=2, **OPTIONS)
    assert_equal(weights(whole), weights(again))
    assert lines(tmp_path / "whole") == lines(tmp_path / "part")
    assert [path.name for path in (tmp_path / "part").glob("checkpoint-*")] == ["checkpoint-5"]


class Stop(StopAt):
    def __init__(self, stage: str, step: int) -> None:
        super().__init__(stage, step)
        self.stage = f"{stage} trains"


def test_an_interruption_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    whole, part, again = tiny(), tiny(), tiny()
    tune(whole, rows(), tmp_path / "whole", **OPTIONS)
    real = tuning.save_file

    def stop(tensors: Any, file: Path) -> None:
        real(tensors, file)
        if "checkpoint-4" in str(file):
            raise Interruption("saving")

    monkeypatch.setattr(tuning, "save_file", stop)
    with pytest.raises(Interruption):
        tune(part, rows(), tmp_path / "part", save_every=2, **OPTIONS)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "part").glob("*checkpoint-*")] == ["checkpoint-2"]
    tune(again, rows(), tmp_path / "part", save_every=2, **OPTIONS)
    assert_equal(weights(whole), weights(again))


def test_a_finished_run_is_loaded(tmp_path):
    whole, again = tiny(), tiny()
    tune(whole, rows(), tmp_path, **OPTIONS)
    before = lines(tmp_path)
    tune(again, rows(), tmp_path, progress=Stop("tuned", 6), **OPTIONS)
    assert_equal(weights(whole), weights(again))
    assert lines(tmp_path) == before


def test_only_what_requires_gradients_is_trained(tmp_path):
    model = tiny()
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    before = weights(model)
    tune(model, rows(), tmp_path, **OPTIONS)
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith("model.layers.0.")}


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 0.02}, "lr"), ({"steps": 6}, "steps"), ({"seed": 1}, "seed")],
)
def test_another_run_in_the_folder_is_not_mistaken_for_this_one(tmp_path, change, named):
    tune(tiny(), rows(), tmp_path, **OPTIONS)
    with pytest.raises(TrainingError, match=f"the run there differs in {named}; delete the folder, or choose another"):
        tune(tiny(), rows(), tmp_path, **OPTIONS | change)
    with pytest.raises(TrainingError, match="the run there differs in rows;"):
        tune(tiny(), rows()[1:], tmp_path, **OPTIONS)
    with pytest.raises(TrainingError, match="the run there differs in start;"):
        tune(tiny(seed=4), rows(), tmp_path, **OPTIONS)


def test_a_loss_that_is_not_finite_names_the_rows(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"tuned, step 1: the loss is nan on the rows .*code-\d.*; lower the learn"):
        tune(model, rows(), tmp_path, **OPTIONS)


def test_no_rows(tmp_path):
    with pytest.raises(DataError, match="there are no rows to draw batches from"):
        tune(tiny(), [], tmp_path, **OPTIONS)
