"""Processes that share the specialists give the losses and the weights of one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ranks import launch
from tiny_models import save_adapter
from training_fixtures import GATE, JOINT, Interruption, StopAt, TinyRun, losses
from ultrafuser.errors import CheckpointError, TrainingError, UltraFuserError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.parallel import Share
from ultrafuser.recipe import Recipe, dump_recipe
from ultrafuser.specialists import fuse
from ultrafuser.train.checkpoints import find_problem
from ultrafuser.train.run import train
from ultrafuser.train.trainer import _join_optimizers

FULL = {"name": "joint", "steps": 3, "samples_per_domain": 2, "specialists": "full", "lr": 0.005}
# (processes, those that share the specialists): 2 x 2, where one holds two of the three specialists, and one for each
MESHES = {"two": (4, 2), "three": (3, 3)}
CASES = {
    "lora-probabilities": (JOINT | {"rows_per_device": 1, "kl_coef": 500}, {"cache_features": True, "save_every": 1}),
    "full-logits": (FULL, {"cache_features": False, "mixing": "logits", "save_every": 1}),
}


def changes(tiny_run: TinyRun, case: str) -> dict:
    return CASES[case][1] | {"eval_every": 2, "data": {"validation": [str(tiny_run.folder / "held-out.jsonl")]}}


@pytest.fixture(scope="module")
def folders(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one process, alone/CASE, and of each mesh, MESH/CASE."""
    folder = tmp_path_factory.mktemp("parallel")
    for case, (stage, _) in CASES.items():
        tiny_run.train(folder / "alone" / case, [GATE, stage], **changes(tiny_run, case))
    for mesh, (processes, size) in MESHES.items():
        files = []
        for case, (stage, _) in CASES.items():
            fields = changes(tiny_run, case) | {"parallel": {"specialist": size}}
            files.append(folder / f"{mesh}-{case}.yaml")
            files[-1].write_text(dump_recipe(tiny_run.recipe(folder / mesh / case, [GATE, stage], **fields)))
        process = launch(folder, processes, *files)
        assert process.returncode == 0, process.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_the_losses_are_those_of_one_process(folders: Path, mesh: str, case: str) -> None:
    expected, measured = losses(folders / "alone" / case), losses(folders / mesh / case)
    assert [row[:2] for row in expected] == [row[:2] for row in measured]
    for (*location, loss), (*_, other) in zip(measured, expected, strict=True):
        assert loss == pytest.approx(other, abs=1e-5, rel=1e-5), location


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_the_saved_model_is_that_of_one_process(folders: Path, mesh: str, case: str) -> None:
    whole, shared = (UltraFuserForCausalLM.from_pretrained(folders / name / case / "fused") for name in ("alone", mesh))
    assert shared.config.temperatures == whole.config.temperatures
    parameters = dict(shared.named_parameters())
    for name, parameter in whole.named_parameters():
        if "score.bias" not in name:  # the softmax cancels it: its gradient is rounding alone
            torch.testing.assert_close(parameters[name], parameter, atol=1e-3, rtol=1e-3, msg=name)
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(shared(ids).logits, whole(ids).logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("mesh", MESHES)
def test_each_process_writes_its_own_specialists(folders: Path, mesh: str) -> None:
    stage = folders / mesh / "full-logits" / "2-joint"
    held = {"": {"groups.0", "groups.2", "gate"}, "-1": {"groups.1"}}
    if mesh == "three":
        held = {"": {"groups.0", "gate"}, "-1": {"groups.1"}, "-2": {"groups.2"}}
    for suffix, parts in held.items():
        names = load_file(stage / f"finished{suffix}.safetensors")
        assert {"gate" if name.startswith("gate.") else ".".join(name.split(".")[:2]) for name in names} == parts


def test_a_run_goes_on_with_other_processes(folders: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    """One process until the first step of the joint stage, two until the second, three until the third, and one again."""
    output = tmp_path / "run"

    def recipe(size: int) -> Recipe:
        fields = changes(tiny_run, "full-logits") | {"parallel": {"specialist": size}, "keep_best": False}
        return tiny_run.recipe(output, [GATE, FULL], **fields)

    with pytest.raises(Interruption):
        train(recipe(1), progress=StopAt("joint", 2))
    for size in (2, 3):
        file = tmp_path / f"{size}.yaml"
        file.write_text(dump_recipe(recipe(size)))
        process = launch(tmp_path, size, f"{file} --resume")
        assert process.returncode == 0, process.stderr[-3000:]
        _forget_after(output, size)
    train(recipe(1), resume=True)
    expected, measured = losses(folders / "alone" / "full-logits"), losses(output)
    for (*location, loss), (*_, other) in zip(measured, expected, strict=True):
        assert loss == pytest.approx(other, abs=1e-5, rel=1e-5), location
    whole, resumed = (
        load_file(stage / "finished.safetensors")
        | {k: v for share in sorted(stage.glob("finished-*.safetensors")) for k, v in load_file(share).items()}
        for stage in (folders / "alone" / "full-logits" / "2-joint", output / "2-joint")
    )
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        if "score.bias" not in name:
            torch.testing.assert_close(resumed[name], tensor, atol=1e-3, rtol=1e-3, msg=name)


def _forget_after(output: Path, step: int) -> None:
    """Leave what a run has that was killed after a step of its joint stage."""
    stage = output / "2-joint"
    assert (stage / f"checkpoint-{step}" / "optimizer.pt").is_file()
    later = [stage / f"checkpoint-{s}" for s in range(step + 1, 4)]
    for path in (*stage.glob("finished*"), *output.glob("fused"), *later):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# The main process dies before it writes the last file of its second checkpoint, or the other one with its weights half written.
KILLS = {
    0: """
def die(self, *args):
    if self.state.global_step == 2 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), 9)
    return rng_state(self, *args)
rng_state, FusionTrainer._save_rng_state = FusionTrainer._save_rng_state, die
""",
    1: """
def die(self, folder):
    if self.state.global_step == 2 and os.environ["RANK"] == "1":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model-1.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), 9)
    return share(self, folder)
share, FusionTrainer._save_weights = FusionTrainer._save_weights, die
""",
}


@pytest.mark.parametrize("rank", KILLS)
def test_a_process_killed_in_mid_save_loses_nothing(tiny_run: TinyRun, tmp_path: Path, rank: int) -> None:
    stages, fields = [FULL], {"save_every": 1, "keep_best": False}
    tiny_run.train(tmp_path / "alone", stages, **fields)
    file, output = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(dump_recipe(tiny_run.recipe(output, stages, parallel={"specialist": 2}, **fields)))
    killed = launch(tmp_path, 2, file, prelude=f"from ultrafuser.train.trainer import FusionTrainer\n{KILLS[rank]}")
    assert killed.returncode and not (output / "fused").exists()
    half, whole = (output / "1-joint" / f"checkpoint-{step}" for step in (2, 1))
    assert find_problem(whole) is None and find_problem(half) is not None
    assert {path.name for path in whole.glob("model*")} == {"model.safetensors", "model-1.safetensors"}
    resumed = launch(tmp_path, 2, f"{file} --resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "checkpoint-2: incomplete" in resumed.stderr and "Resuming from checkpoint-1" in resumed.stderr
    expected, measured = losses(tmp_path / "alone"), losses(output)
    assert [row[:2] for row in measured] == [row[:2] for row in expected]
    for (*location, loss), (*_, other) in zip(measured, expected, strict=True):
        assert loss == pytest.approx(other, abs=1e-5, rel=1e-5), location


# ---------------------------------------------------------------- what is refused


def test_the_processes_must_be_a_multiple(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"specialist is 3, but 1 process runs. Start a multiple of 3, such as: torchrun"
    ):
        tiny_run.train(tmp_path / "run", parallel={"specialist": 3})
    assert not (tmp_path / "run").exists()


def test_outcomes_need_all_specialists(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="stage outcome: it needs all specialists in each process"):
        tiny_run.train(tmp_path / "run", [GATE, {"name": "outcome", "steps": 1}], parallel={"specialist": 2})


def test_each_process_needs_a_model(tiny_run: TinyRun) -> None:
    with pytest.raises(
        CheckpointError, match=r"4 processes cannot share 3 separate models .*Lower parallel.specialist"
    ):
        fuse(tiny_run.recipe("unused"), share=(3, 4))


def test_a_shared_base_is_one_model(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe("unused", specialists=tiny_run.adapter_recipe(tmp_path, save_adapter))
    with pytest.raises(CheckpointError, match=r"2 processes cannot share 1 separate model .*share_base=false"):
        fuse(recipe, share=(1, 2))


def test_a_part_of_a_model_gives_no_logits(tiny_run: TinyRun) -> None:
    model, _ = fuse(tiny_run.recipe("unused"), share=(1, 3))
    assert [group.names for group in model.local_groups] == [["code"]] and model.local_indices == [1]
    assert {name.split(".")[1] for name, _ in model.groups.named_parameters(prefix="groups")} == {"1"}
    model.share = Share(None, model.local_indices, 3)  # type: ignore[arg-type]
    with pytest.raises(UltraFuserError, match="it gives losses, but no logits. Load the model whole"):
        model(torch.tensor([[5, 6]]))


def test_optimizer_states_without_names_cannot_be_shared() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    states = []
    for parameters in ([("groups.1.w", weight)], [weight]):
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()
        states.append(optimizer.state_dict())
    named, unnamed = states
    joined = _join_optimizers(torch.optim.AdamW([("groups.1.w", weight)]).state_dict(), [named], [weight])
    assert torch.equal(joined["state"][0]["exp_avg"], named["state"][0]["exp_avg"])
    with pytest.raises(TrainingError, match="no optimizer state for groups.1.w. An older version wrote it"):
        _join_optimizers(named, [unnamed], [weight])
