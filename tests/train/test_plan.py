"""`ultrafuser plan`: counts equal those of the real model, and what does not fit is refused with what would."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from tiny_models import save_adapter
from training_fixtures import GATE, JOINT, NAMES
from ultrafuser.cli.main import app
from ultrafuser.errors import CheckpointError, TrainingError
from ultrafuser.progress import Progress
from ultrafuser.recipe import ParallelRecipe, load_recipe
from ultrafuser.specialists import fuse, outline
from ultrafuser.train import memory
from ultrafuser.train.memory import activation_bytes
from ultrafuser.train.plan import GIB, check_plan, plan
from ultrafuser.train.run import train
from ultrafuser.train.stages import prepare_joint

LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
FULL = {"specialists": "full"}


def recipe_of(tiny_run, tmp_path, *, shared=False, stages=(GATE, JOINT), **changes):
    specialists = {"specialists": tiny_run.adapter_recipe(tmp_path, save_adapter)} if shared else {}
    return load_recipe(tiny_run.fields(tmp_path / "run", list(stages), **specialists, **changes))


def planned_stage(recipe, name="joint", **options):
    return next(s for s in plan(recipe, **({"memory": 1 << 50} | options)).stages if s.name == name)


@pytest.mark.parametrize("shared, joint", [(True, {}), (False, {}), (False, FULL)], ids=["adapters", "new", "full"])
def test_counts_are_those_of_the_loaded_model(tiny_run, tmp_path, shared, joint):
    recipe = recipe_of(tiny_run, tmp_path, shared=shared, stages=[JOINT | joint])
    planned = planned_stage(recipe)
    model, _ = fuse(recipe)
    sketch = outline(recipe)
    assert [group.names for group in sketch.groups] == [group.names for group in model.groups]
    assert [group.model.dtype for group in sketch.groups] == [group.model.dtype for group in model.groups]
    assert all(parameter.is_meta for parameter in sketch.parameters())
    prepare_joint(model, recipe.stages[0])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.trained == trained
    assert planned.memory["weights"] == sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    assert planned.memory["optimizer"] == 8 * trained and planned.memory["gradients"] == 4 * trained


def test_the_gate_stage_trains_the_gate_alone(tiny_run, tmp_path):
    recipe = recipe_of(tiny_run, tmp_path, shared=True)
    model, _ = fuse(recipe)
    assert planned_stage(recipe, "gate").trained == sum(p.numel() for p in model.gate.parameters())
    width = model.groups[0].width
    assert plan(recipe, memory=1 << 50).feature_bytes == 3 * (width * model.groups[0].model.dtype.itemsize + 4)


def test_full_training_in_bfloat16_keeps_float32_masters_and_copies(tiny_run, tmp_path):
    kinds = {kind: recipe_of(tiny_run, tmp_path, stages=[JOINT | FULL], dtype=kind) for kind in ("float32", "bfloat16")}
    masters, halves = (planned_stage(recipe).memory for recipe in kinds.values())
    assert masters["weights"] == halves["weights"] and "copies for autocast" not in masters
    gate = sum(p.numel() for p in outline(kinds["float32"]).gate.parameters())
    assert 2 * halves["copies for autocast"] == halves["weights"] - 4 * gate


def test_processes_share_the_batch_and_hold_gradients_twice(tiny_run, tmp_path):
    recipe = recipe_of(tiny_run, tmp_path, stages=[JOINT | {"samples_per_domain": 4, "rows_per_device": None}])
    alone, four = planned_stage(recipe), planned_stage(recipe, processes=4)
    assert four.memory["activations"] * 4 == alone.memory["activations"]  # 3 domains x 4 rows
    assert four.memory["gradients"] == 2 * alone.memory["gradients"]
    assert four.flops == alone.flops and four.hours(4, 100) == pytest.approx(alone.hours(1, 100) / 4)


def test_optimizers_and_offload_take_what_they_keep(tiny_run, tmp_path):
    def memory(kind="cpu", **fields):
        return planned_stage(recipe_of(tiny_run, tmp_path, stages=[JOINT | FULL | fields]), kind=kind).memory

    states = {optim: memory(optim=optim)["optimizer"] for optim in ("adamw_torch", "adamw_8bit", "paged_adamw_32bit")}
    assert states["adamw_torch"] == states["paged_adamw_32bit"] == 4 * states["adamw_8bit"]
    kept = {value: memory("cuda", gradient_checkpointing=value)["activations"] for value in (False, True, "offload")}
    assert kept["offload"] < kept[True] < kept[False]
    assert memory(gradient_checkpointing="offload") == memory(gradient_checkpointing=True), "a CPU is the host"


def test_a_reference_is_read_and_compared(tiny_run, tmp_path):
    plain, held = (planned_stage(recipe_of(tiny_run, tmp_path, stages=[JOINT | {"kl_coef": k}])) for k in (0, 1))
    assert held.memory["logits"] == 3 * plain.memory["logits"]
    assert held.memory["reading"] > 0 and "reading" not in plain.memory


def test_checkpointing_is_chosen_as_the_stage_chooses_it(tiny_run, tmp_path):
    """`auto` compares the activations with the memory beside the weights."""
    recipe = recipe_of(tiny_run, tmp_path, stages=[JOINT])
    kept = planned_stage(recipe)
    limit = 2 * kept.memory["activations"] + kept.memory["weights"]
    assert not planned_stage(recipe, memory=limit + 10).checkpointing
    tight = planned_stage(recipe, memory=limit - 10)
    (stage,) = recipe.stages
    tokens = recipe.data.max_length * min(stage.samples_per_domain * 3, stage.rows_per_device)
    groups = outline(recipe).groups
    assert tight.checkpointing and tight.flops > kept.flops
    assert tight.memory["activations"] == sum(activation_bytes(g, tokens, checkpointing=True) for g in groups)


@pytest.fixture
def paper(tiny_run, tmp_path):
    """Three specialists of Llama 2 13B's shape without weights: nothing but configurations is read."""
    specialists = []
    for name in NAMES:
        folder = tmp_path / f"13b-{name}"
        shutil.copytree(tiny_run.folder / "text", folder, ignore=shutil.ignore_patterns("*.safetensors"))
        fields = json.loads((folder / "config.json").read_text())
        fields |= LLAMA_13B | {"num_key_value_heads": 40, "head_dim": 128, "vocab_size": 32000, "dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(fields))
        specialists.append({"name": name, "model": str(folder)})
    joint = {"name": "joint", "steps": 5000, "samples_per_domain": 32, "rows_per_device": 1, "lr": 2e-5} | FULL
    return tiny_run.fields(tmp_path / "run", [joint], specialists=specialists, device="auto") | {
        "data": {"max_length": 2048}
    }


def test_the_paper_s_weights_do_not_fit_one_device_and_adapters_do(paper):
    planned = plan(load_recipe(paper), memory=80 * GIB, processes=16)
    assert list(planned.parameters) == list(NAMES)
    assert all(count == pytest.approx(13.0e9, rel=0.01) for count in planned.parameters.values())
    (stage,) = planned.stages
    assert stage.trained == pytest.approx(39e9, rel=0.01) and stage.total > 39e9 * (4 + 8 + 8)
    with pytest.raises(
        TrainingError, match=r"needs \d{3}\.\d GiB on each device, got 80\.0 GiB\. It fits with parallel\.shard=true"
    ):
        check_plan(planned, 80 * GIB)
    check_plan(plan(load_recipe(paper, ["parallel.shard=true"]), memory=80 * GIB, processes=16), 80 * GIB)
    overrides = plan(load_recipe(paper), memory=96 * GIB).proposals["joint"]
    assert overrides == ["stages.joint.specialists=lora"], "checkpointing is on already, and one row is the least"
    check_plan(plan(load_recipe(paper, overrides), memory=96 * GIB), 96 * GIB)


def test_proposals_cost_no_more_than_they_must(tiny_run, tmp_path):
    """Checkpointing comes first, then fewer rows in a pass, and the plan with the overrides fits."""
    stages = [JOINT | {"samples_per_domain": 16, "rows_per_device": 16, "gradient_checkpointing": False}]
    fields = tiny_run.fields(tmp_path / "run", stages)
    recipe = load_recipe(fields)
    room = planned_stage(load_recipe(fields, ["stages.joint.gradient_checkpointing=true"])).total
    assert plan(recipe, memory=room).proposals["joint"] == ["stages.joint.gradient_checkpointing=true"]
    overrides = plan(recipe, memory=room - 1000).proposals["joint"]
    assert overrides == ["stages.joint.gradient_checkpointing=true", "stages.joint.rows_per_device=8"]
    check_plan(plan(load_recipe(fields, overrides), memory=room - 1000), room - 1000)
    nothing = plan(recipe, memory=1000)
    assert nothing.proposals["joint"] == []
    with pytest.raises(TrainingError, match=r"got 0\.0 GiB\. Use devices with more memory, or smaller specialists"):
        check_plan(nothing, 1000)


def test_quantised_weights_are_refused(tiny_run, tmp_path):
    fields = tiny_run.fields(tmp_path / "run")
    fields["specialists"][1]["quantization"] = {"load_in_4bit": True}
    with pytest.raises(TrainingError, match=rf"plan: the weights of {NAMES[1]} are quantised.*without `quantization`"):
        plan(load_recipe(fields), memory=GIB)


def test_a_stage_that_the_specialists_do_not_admit_is_refused(tiny_run, tmp_path):
    recipe = recipe_of(tiny_run, tmp_path, shared=True, stages=[JOINT | FULL])
    with pytest.raises(TrainingError, match="share one base"):
        plan(recipe, memory=GIB)


def test_the_command_prints_json_and_refuses_what_does_not_fit(tiny_run, tmp_path, monkeypatch):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(tiny_run.fields(tmp_path / "run", [GATE, JOINT])))
    done = CliRunner().invoke(app, ["plan", str(file), "--memory", "16", "--tflops", "2", "--json"])
    result = json.loads(done.stdout)
    assert done.exit_code == 0 and [stage["name"] for stage in result["stages"]] == ["gate", "joint"]
    assert all(
        stage["fits"] and stage["total_bytes"] == sum(stage["memory_bytes"].values()) for stage in result["stages"]
    )
    assert result["stages"][1]["hours"] == pytest.approx(result["stages"][1]["flops"] / 2e12 / 3600)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 12)  # of this machine
    refused = CliRunner().invoke(app, ["plan", str(file)])
    assert isinstance(refused.exception, TrainingError) and "stage gate: needs" in str(refused.exception)
    assert "gradient checkpointing" in refused.stdout and "optimizer" in refused.stdout


def test_a_fused_folder_is_planned_like_its_specialists(tiny_run, tmp_path):
    recipe = recipe_of(tiny_run, tmp_path, shared=True, stages=[JOINT])
    model, tokenizer = fuse(recipe)
    model.save_pretrained(tmp_path / "fused")
    tokenizer.save_pretrained(tmp_path / "fused")
    fields = tiny_run.fields(tmp_path / "run", [JOINT], fused=str(tmp_path / "fused"))
    again = load_recipe({key: value for key, value in fields.items() if key not in ("specialists", "gate")})
    assert planned_stage(again) == planned_stage(recipe)
    assert outline(again).groups[0].model.dtype == torch.float32


@pytest.mark.parametrize("stage", ["lora", "full"])
def test_processes_that_share_the_specialists_need_less_each(tiny_run, tmp_path, stage):
    recipe = recipe_of(tiny_run, tmp_path, stages=[JOINT | {"specialists": stage}])
    whole, model = planned_stage(recipe), outline(recipe)
    gate = sum(p.numel() for p in model.gate.parameters())
    shared = recipe.model_copy(update={"parallel": ParallelRecipe(specialist=3)})
    third = planned_stage(shared)
    assert third.trained == whole.trained and third.flops == pytest.approx(whole.flops)
    assert 3 * (third.memory["optimizer"] - 8 * gate) == whole.memory["optimizer"] - 8 * gate
    assert 3 * (third.memory["weights"] - 4 * gate) == whole.memory["weights"] - 4 * gate
    assert 3 * third.memory["activations"] == whole.memory["activations"], "all three read the same rows"
    six = planned_stage(shared, processes=6)
    assert six.memory["activations"] == third.memory["activations"] // 2, "two batches share the rows"
    half = planned_stage(recipe.model_copy(update={"parallel": ParallelRecipe(specialist=2)}))
    assert third.total < half.total < whole.total, "one of the two holds two specialists"


def test_processes_that_do_not_fit_are_refused(tiny_run, tmp_path):
    recipe = recipe_of(tiny_run, tmp_path).model_copy(update={"parallel": ParallelRecipe(specialist=3)})
    with pytest.raises(TrainingError, match="4 processes cannot form groups of 3"):
        plan(recipe, memory=1 << 50, processes=4)
    with pytest.raises(
        CheckpointError, match=r"^5 processes cannot share 3 separate models .*Lower parallel.specialist"
    ):
        plan(recipe.model_copy(update={"parallel": ParallelRecipe(specialist=5)}), memory=1 << 50)


@pytest.mark.parametrize("stage", [GATE, JOINT, JOINT | FULL])
def test_processes_that_divide_the_weights_need_less_each(tiny_run, tmp_path, stage):
    recipe = recipe_of(tiny_run, tmp_path, stages=[stage | {"samples_per_domain": 4}])
    divided = recipe.model_copy(update={"parallel": ParallelRecipe(shard=True)})
    whole, part = (planned_stage(each, stage["name"], processes=4) for each in (recipe, divided))
    model = outline(recipe)
    gate = sum(p.numel() for p in model.gate.parameters())
    assert part.trained == whole.trained and part.flops == whole.flops
    assert part.memory["activations"] == whole.memory["activations"]
    for name, size, copies in (("weights", 4, 1), ("gradients", 4, 2), ("optimizer", 8, 1)):
        assert 4 * (part.memory[name] - size * gate) == whole.memory[name] // copies - size * gate, name
    layers = [layer for group in model.groups for layer in group.model.model.layers]
    numbers = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    outer = sum(p.numel() for p in model.groups.parameters()) - sum(numbers)
    copies = 2 if stage.get("specialists") == "full" else 1  # with gradients
    assert part.memory["gathered"] == copies * 4 * (outer + 2 * max(numbers))
    grid = recipe.model_copy(update={"parallel": ParallelRecipe(shard=True, specialist=3)})
    six, twelve = (planned_stage(grid, stage["name"], processes=count).memory["weights"] for count in (6, 12))
    assert six - 4 * gate == 2 * (twelve - 4 * gate), "two or four of them divide one specialist"
    with pytest.raises(TrainingError, match=r"plan: parallel.shard divides weights among at least 2 processes, got 1"):
        plan(divided, memory=GIB)


class Lines(Progress):
    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


@pytest.mark.parametrize("free", [1 << 40, 1000], ids=["enough", "too-little"])
def test_a_run_says_first_what_it_needs(tiny_run, tmp_path, monkeypatch, free):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    recipe, progress = recipe_of(tiny_run, tmp_path, shared=True), Lines()
    train(recipe, progress=progress)
    first = progress.lines[0]
    expected = [f"stage {s.name} {s.total / GIB:.2f} GiB" for s in plan(recipe, memory=free, kind="cpu").stages]
    assert first.startswith(f"memory, estimated: {', '.join(expected)}")
    assert ("it may not suffice. `ultrafuser plan RECIPE` names overrides" in first) == (free == 1000)
