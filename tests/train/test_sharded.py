"""Processes that divide the weights of the specialists give the losses and the weights of one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaForCausalLM

from ranks import launch
from tiny_models import save_adapter
from training_fixtures import GATE, JOINT, NAMES, Interruption, StopAt, TinyRun, losses, trained_weights
from ultrafuser.errors import TrainingError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.parallel import Share, SpecialistMesh
from ultrafuser.recipe import JointStage, Recipe, dump_recipe, load_recipe
from ultrafuser.specialists import fuse
from ultrafuser.train.run import train
from ultrafuser.train.sharding import check_sharding, shard_weights
from ultrafuser.train.stages import prepare_gate, prepare_joint

GATE = GATE | {"steps": 2}
JOINT = JOINT | {"steps": 2}
FULL = {"name": "joint", "steps": 2, "samples_per_domain": 2, "specialists": "full", "lr": 0.005}
CLIPPED = {"max_grad_norm": 0.1, "rows_per_device": 1}  # gradients are accumulated
# (stages, other fields, specialists)
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "lora-checkpointed": (
        [GATE, JOINT | CLIPPED | {"gradient_checkpointing": True}],
        {"cache_features": True, "eval_every": 1},
        "many-rows",
    ),
    "full-tied-logits": ([GATE, FULL], {"cache_features": False, "mixing": "logits"}, "tied"),
    "full-clipped": ([GATE, FULL | CLIPPED | {"steps": 4}], {"cache_features": True, "save_every": 1}, "separate"),
    "shared-base-logits": ([GATE, JOINT], {"cache_features": True, "mixing": "logits"}, "shared"),
}
KILLED = """
from ultrafuser.train import trainer
gather = trainer.gather_state
def gather_or_die(state, keep):
    step = max(int(values["step"]) for values in state["state"].values())
    if os.environ["RANK"] == "1" and step == 3 and len(state["param_groups"]) == 2:
        os._exit(1)  # in mid-save, when the weights are written and the optimizer's states are not
    return gather(state, keep)
trainer.gather_state = gather_or_die
"""


class Cases:
    """Recipes of the cases, in a folder for each number of processes."""

    def __init__(self, tiny_run: TinyRun, folder: Path) -> None:
        self.tiny_run, self.folder = tiny_run, folder
        for seed, name in enumerate(NAMES):
            tiny_run.specialist(f"tied-{name}", seed=seed, tie_word_embeddings=True)
        self.adapters = tiny_run.adapter_recipe(folder, save_adapter)
        self.many_rows = str(tiny_run.rows("many", 25, domains=NAMES))  # enough to measure temperatures

    def recipe(self, case: str, processes: str, **changes: Any) -> Recipe:
        stages, fields, kind = CASES[case]
        # one row, so that one of two processes validates on none
        data: dict[str, Any] = {"validation": [{"path": str(self.tiny_run.folder / "held-out.jsonl"), "limit": 1}]}
        recipe = self.tiny_run.fields("unused")
        if kind == "tied":
            for fields_of_one in recipe["specialists"]:
                fields_of_one["model"] = str(self.tiny_run.folder / f"tied-{fields_of_one['name']}")
        if kind == "many-rows":
            data |= {"train": [self.many_rows]}
        specialists = self.adapters if kind == "shared" else recipe["specialists"]
        common = {"specialists": specialists, "eval_every": 2, "ddp_timeout": 120, "data": data}
        return self.tiny_run.recipe(self.folder / processes / case, stages, **(common | fields | changes))

    def file(self, case: str, processes: str, **changes: Any) -> Path:
        file = self.folder / f"{processes}-{case}.yaml"
        file.write_text(dump_recipe(self.recipe(case, processes, **changes)))
        return file


@pytest.fixture(scope="module")
def cases(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tiny_run, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def folders(cases: Cases) -> Path:
    """A folder with the runs of one process, alone/CASE, of two, two/CASE, and one of a grid of 2 x 2, four/CASE.

    `moved/full-clipped` is one run with one process until step 1 of the joint stage, two that divide the weights until
    step 2, which are killed while they save step 3, and 2 x 2 from there on.
    """
    for case in CASES:
        train(cases.recipe(case, "alone"))
    process = launch(cases.folder, 2, *(cases.file(case, "two", parallel={"shard": True}) for case in CASES))
    assert process.returncode == 0, process.stderr[-3000:]

    moved = {"keep_best": False, "ddp_timeout": 120}
    with pytest.raises(Interruption):
        train(cases.recipe("full-clipped", "moved", **moved), progress=StopAt("joint", 2))
    file = cases.file("full-clipped", "moved", **moved, parallel={"shard": True})
    process = launch(cases.folder, 2, f"{file} --resume", prelude=KILLED)
    stage = cases.folder / "moved" / "full-clipped" / "2-joint"
    assert process.returncode != 0 and {path.name for path in stage.glob("checkpoint-*")} >= {
        "checkpoint-2",
        "checkpoint-3",
    }
    assert not (stage / "checkpoint-3" / "optimizer.pt").exists()
    grid = {"parallel": {"shard": True, "specialist": 2}}
    file = cases.file("full-clipped", "moved", **moved, **grid)
    process = launch(cases.folder, 4, cases.file("full-tied-logits", "four", **grid), f"{file} --resume")
    assert process.returncode == 0, process.stderr[-3000:]
    assert "checkpoint-3: incomplete (optimizer.pt is missing), removed" in process.stderr
    return cases.folder


def check_equal(expected: Path, measured: Path) -> None:
    """Two runs have the same losses and weights."""
    rows, others = losses(expected), losses(measured)
    assert [row[:2] for row in rows] == [row[:2] for row in others]
    for (*location, loss), (*_, other) in zip(others, rows, strict=True):
        assert loss == pytest.approx(other, abs=1e-5, rel=1e-5), location
    weights = trained_weights(measured)
    for stage in sorted(measured.glob("*-*")):
        for file in sorted(stage.glob("finished-*.safetensors")):  # of another share of the specialists
            weights |= {f"{stage.name}/{name}": tensor for name, tensor in load_file(file).items()}
    expected_weights = trained_weights(expected)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        if "score.bias" not in name:  # the softmax cancels it: its gradient is rounding alone
            torch.testing.assert_close(weights[name], tensor, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_losses_and_weights_of_one(folders: Path, case: str) -> None:
    check_equal(folders / "alone" / case, folders / "two" / case)
    temperatures = UltraFuserForCausalLM.from_pretrained(folders / "two" / case / "fused").config.temperatures
    assert (set(temperatures) != {1.0}) == (case == "lora-checkpointed"), "the other cases have too few rows"


def test_shares_of_the_specialists_are_divided_too(folders: Path) -> None:
    check_equal(folders / "alone" / "full-tied-logits", folders / "four" / "full-tied-logits")
    whole, other = (
        UltraFuserForCausalLM.from_pretrained(folders / name / "full-tied-logits" / "fused")
        for name in ("alone", "four")
    )
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(other(ids).logits, whole(ids).logits, atol=2e-3, rtol=1e-3)


def test_a_run_goes_on_with_other_processes_and_after_a_kill(folders: Path, cases: Cases) -> None:
    """Its last step runs in one process again, from what four have saved."""
    output = folders / "moved" / "full-clipped"
    check_equal(folders / "alone" / "full-clipped", output)
    stage = output / "2-joint"
    for path in (*stage.glob("finished*"), output / "fused", stage / "checkpoint-4"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (stage / "checkpoint-3" / "optimizer-1.pt").is_file()
    train(cases.recipe("full-clipped", "moved", keep_best=False), resume=True)
    check_equal(folders / "alone" / "full-clipped", output)


# ---------------------------------------------------------------- what a process holds


@pytest.fixture
def alone() -> Iterator[SpecialistMesh]:
    """The mesh of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SpecialistMesh.build(1, "cpu", shards=True)
    dist.destroy_process_group()


@pytest.fixture
def first_of_four() -> Iterator[SpecialistMesh]:
    """The mesh of the first of four processes. The others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield SpecialistMesh.build(1, "cpu", shards=True)
    dist.destroy_process_group()


def test_a_process_holds_its_part_of_every_weight(tiny_run: TinyRun, first_of_four: SpecialistMesh) -> None:
    model, _ = fuse(tiny_run.recipe("unused"))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    prepare_gate(model)
    shard_weights(model, first_of_four, [None] * 3)
    assert all(isinstance(layer, FSDPModule) for group in model.groups for layer in group.model.model.layers)
    for name, parameter in model.named_parameters():
        if name.startswith("gate."):
            assert not isinstance(parameter, DTensor)
        else:
            assert isinstance(parameter, DTensor) and parameter.to_local().numel() == sizes[name] // 4, name


def test_half_precision_is_that_of_the_gathered_layers_alone(tiny_run: TinyRun, alone: SpecialistMesh) -> None:
    """Masters and gradients are in float32. Losses are those of float32 but for the rounding of bfloat16."""
    results = {}
    ids = torch.arange(5, 45).view(2, 20)
    for kind in (None, torch.bfloat16):
        model, _ = fuse(tiny_run.recipe("unused"))
        prepare_joint(model, JointStage(name="joint", specialists="full"))
        model.share = Share(alone, model.local_indices, 3)
        shard_weights(model, alone, [kind] * 3)
        for group in model.groups:
            group.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        weights = dict(model.named_parameters())
        assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in weights.values())
        results[kind] = loss.item(), torch.cat([weight.grad.full_tensor().flatten() for weight in weights.values() if
                                                isinstance(weight, DTensor)])  # fmt: skip
    (loss, gradient), (half_loss, half_gradient) = results.values()
    assert half_loss != loss and half_loss == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(gradient, half_gradient, dim=0) > 0.99


# ---------------------------------------------------------------- what is refused


def test_one_process_has_nobody_to_divide_with(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"there is one such process. Start at least 2, such as: torchrun"):
        tiny_run.train(tmp_path / "run", parallel={"shard": True})
    assert not (tmp_path / "run").exists()


def test_outcomes_need_whole_specialists(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"stage outcome: .* Leave parallel.shard out"):
        tiny_run.train(tmp_path / "run", [GATE, {"name": "outcome", "steps": 1}], parallel={"shard": True})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"quantization": {"load_in_4bit": True}}, "specialist 'code' are quantised and cannot be divided"),
        ({"device_map": "auto"}, "specialist 'code' has a device_map"),
    ],
)
def test_quantised_and_placed_weights_are_refused(tiny_run: TinyRun, field: dict[str, Any], message: str) -> None:
    fields = tiny_run.fields("unused")
    fields["specialists"][1] |= field
    with pytest.raises(TrainingError, match=message):
        check_sharding(load_recipe(fields))


def test_models_whose_layers_are_not_known_are_refused(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_run.recipe("unused")
    check_sharding(recipe)
    monkeypatch.setattr("ultrafuser.train.sharding.decoder_layers", lambda group: [])
    with pytest.raises(
        TrainingError, match=rf"{LlamaForCausalLM.__name__} of specialist 'text' does not name its decoder"
    ):
        check_sharding(recipe)


@pytest.mark.parametrize("wrapper", ["FSDP", "DeepSpeed", "Megatron-LM"])
def test_wrappers_of_accelerate_are_refused(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapper: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{wrapper.upper().replace('-', '_')}", "true")
    with pytest.raises(TrainingError, match=rf"configured for {wrapper}, .* set parallel.shard=true"):
        tiny_run.train(tmp_path / "run")
    assert not (tmp_path / "run").exists()
