"""A sweep: one run for each combination of values, over one feature cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ranks import launch
from training_fixtures import GATE, JOINT, Interruption, RecordingProgress, StopAt, TinyRun, losses, metrics
from ultrafuser.errors import RecipeError, TrainingError
from ultrafuser.recipe import load_recipe
from ultrafuser.train import sweep as module
from ultrafuser.train.sweep import SweepRun, over_seeds, sweep

FIELDS = ["stages.gate.lr=1e-2,1e-3", "seed=0,1"]


@pytest.fixture
def recipe(tiny_run: TinyRun, tmp_path: Path) -> Path:
    data = {"validation": [str(tiny_run.folder / "held-out.jsonl")]}
    file = tmp_path / "recipe.yaml"
    fields = tiny_run.fields(tmp_path / "sweep", [GATE | {"calibrate": False}], data=data, cache_features=True)
    file.write_text(yaml.safe_dump(fields))
    return file


def test_each_combination_is_the_run_of_its_recipe(recipe: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    progress = RecordingProgress()
    runs = sweep(recipe, [], FIELDS, progress=progress)
    assert [run.overrides for run in runs] == [
        [f"stages.gate.lr={lr}", f"seed={seed}"] for lr in ("1e-2", "1e-3") for seed in (0, 1)
    ]
    assert [Path(run.folder).name for run in runs][:2] == ["stages.gate.lr=1e-2,seed=0", "stages.gate.lr=1e-2,seed=1"]
    assert sum(label == "specialists read the rows" for label, _ in progress.started) == 2  # training, validation
    stage = GATE | {"calibrate": False, "lr": 1e-3}
    data = {"validation": [str(tiny_run.folder / "held-out.jsonl")]}
    alone = tiny_run.train(tmp_path / "alone", [stage], seed=1, data=data, cache_features=True)
    assert losses(Path(runs[3].folder)) == losses(alone)
    validations = [row for row in metrics(alone) if "eval_loss" in row]
    best = min(validations, key=lambda row: row["eval_loss"])
    expected = {domain: best[f"eval_loss/{domain}"] for domain in ("text", "code", "math")} | {
        "mean": best["eval_loss"]
    }
    assert runs[3].loss == pytest.approx(expected)
    assert all((Path(run.folder) / "fused" / "config.json").is_file() for run in runs)
    assert not (tmp_path / "sweep" / "features").exists()
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())[3]["loss"] == runs[3].loss


def test_without_validation_rows_the_last_step_counts(recipe: Path) -> None:
    (run,) = sweep(recipe, ["data.validation=[]"], ["seed=3"])
    last = metrics(Path(run.folder))[-1]
    assert run.stage == "gate"
    assert run.loss is not None
    assert run.loss["math"] == last["loss/math"]


def test_an_interrupted_sweep_goes_on(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interruption):  # in the second run
        sweep(recipe, ["save_every=1"], ["seed=0,1,2"], progress=_StopInSecond())
    folder = Path(yaml.safe_load(recipe.read_text())["output"])
    assert (folder / "seed=0" / "fused").is_dir()
    assert (folder / "features").is_dir()
    with pytest.raises(TrainingError, match=r"sweep holds a run already. Continue a sweep with --resume"):
        sweep(recipe, ["save_every=1"], ["seed=0,1,2"])
    resumes = []
    train = module.train
    monkeypatch.setattr(
        module, "train", lambda recipe, **options: resumes.append(options["resume"]) or train(recipe, **options)
    )
    runs = sweep(recipe, ["save_every=1"], ["seed=0,1,2"], resume=True)
    assert resumes == [True, False]  # the first run is kept
    assert all(run.loss for run in runs)


class _StopInSecond(StopAt):
    def __init__(self) -> None:
        super().__init__("gate", 2)
        self.runs = 0

    def log(self, text: str) -> None:
        self.runs += text.startswith("run ")

    def advance(self, steps: int = 1, note: str = "") -> None:
        if self.runs == 2:
            super().advance(steps, note)


def test_a_run_that_fails_does_not_end_the_sweep(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = module.train

    def fail(recipe, **options):
        if recipe.seed == 0:
            raise TrainingError("the loss is nan")
        return train(recipe, **options)

    monkeypatch.setattr(module, "train", fail)
    runs = sweep(recipe, [], ["seed=0,1"])
    assert (runs[0].error, runs[0].loss) == ("the loss is nan", None)
    assert runs[1].loss
    with pytest.raises(TrainingError, match=r"every run of the sweep has failed. The first one: the loss is nan"):
        sweep(recipe, ["output=" + str(recipe.parent / "none")], ["seed=0"])


def test_values_are_those_of_a_yaml_list(recipe: Path) -> None:
    rows = str(recipe.parent / "a,b.jsonl")
    plan = module._plan(Path("out"), ["stages=[gate],[gate, joint]", f"data.train=[{{path: '{rows}'}}]"])
    assert [run.overrides[0] for run in plan] == ["stages=[gate]", "stages=[gate, joint]"]
    assert load_recipe(recipe, plan[1].overrides).data.train[0].path == rows
    assert len({run.folder for run in module._plan(Path("out"), ["report_to=[a/b],[a b],[a_b],[a_b-1]"])}) == 4
    long = [f"data.train=[{'a' * 200}],[{'a' * 200}b]"]
    assert len({run.folder for run in module._plan(Path("out"), long)}) == 2
    nulls = module._plan(Path("out"), ["stages.gate.features_per_row=3,null"])
    assert [load_recipe(recipe, run.overrides).stages[0].features_per_row for run in nulls] == [3, None]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["seed"], r"--sweep 'seed': expected FIELD=VALUE,VALUE,..., e.g. stages.gate.lr=1e-3,3e-4"),
        (["seed="], r"--sweep 'seed=': expected FIELD=VALUE"),
        (["seed=1,,2"], r"--sweep 'seed=1,,2'"),
        (
            ["seed=0", "seed=1"],
            r"--sweep seed: expected each field once, and not 'output'. Give all its values together",
        ),
        (["seed=0,1,0"], r"--sweep: seed=0 and seed=0 are the same recipe. Leave out repeated values"),
        (["stages.0.lr=1,2", "stages.gate.lr=3"], r"stages.0.lr=1 stages.gate.lr=3 and .* are the same recipe"),
        (["output=a,b"], r"--sweep output: expected each field once, and not 'output'"),
        (["sead=1"], r"override 'sead=1': sead: unknown"),
        (["seed=1,x"], r"seed"),
    ],
)
def test_bad_sweeps_are_refused_before_the_first_run(recipe: Path, fields: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sweep(recipe, [], fields)
    assert not Path(yaml.safe_load(recipe.read_text())["output"]).exists()


def test_nothing_to_resume(recipe: Path) -> None:
    with pytest.raises(TrainingError, match=r"no sweep to resume there \(no sweep.json\). Start it without --resume"):
        sweep(recipe, [], ["seed=0"], resume=True)


def test_the_folder_of_a_run_is_refused(recipe: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    tiny_run.train(tmp_path / "sweep")
    with pytest.raises(TrainingError, match=r"holds a run already"):
        sweep(recipe, [], ["seed=0"])


def test_the_spread_over_seeds() -> None:
    runs = [SweepRun(["lr=1", f"seed={seed}"], "", "gate", {"mean": loss}) for seed, loss in enumerate((1.0, 2.0))] + [
        SweepRun(["lr=2", "seed=0"], "", error="failed"),
        SweepRun(["lr=2", "seed=1"], "", "gate", {"mean": 3.0}),
    ]
    assert over_seeds(runs) == [(["lr=1"], [1.0, 2.0]), (["lr=2"], [3.0])]
    assert over_seeds([SweepRun(["lr=1"], "", "gate", {"mean": 1.0})]) == []


def test_both_stages(recipe: Path) -> None:
    stages = ["stages=[{name: gate, steps: 2, samples_per_domain: 2}, {name: joint, steps: 3, samples_per_domain: 2}]"]
    progress = RecordingProgress()
    fields = ["stages.joint.kl_coef=0,1"]
    runs = sweep(recipe, [*stages, f"stages.joint.lora.r={JOINT['lora']['r']}"], fields, progress=progress)
    assert [run.stage for run in runs] == ["joint", "joint"]
    kl = [
        ["kl" in row for row in metrics(Path(run.folder)) if "loss" in row and row["stage"] == "joint"] for run in runs
    ]
    assert kl == [[False] * 3, [True] * 3]
    # training and validation rows for the gates, and once for the reference, since new adapters have other weights
    assert sum(label == "specialists read the rows" for label, _ in progress.started) == 3


def test_another_recipe_is_not_resumed(recipe: Path) -> None:
    sweep(recipe, [], ["seed=0"])
    with pytest.raises(TrainingError, match=r"seed=0: the run there has another recipe \(differs in: lr: 5"):
        sweep(recipe, ["stages.gate.lr=5"], ["seed=0,1"], resume=True)
    (first, second) = sweep(recipe, [], ["seed=0,1"], resume=True)
    assert first.loss
    assert second.loss


def test_a_stage_without_logged_losses_has_none(recipe: Path) -> None:
    (run,) = sweep(recipe, ["data.validation=[]", "log_every=50"], ["seed=0"])
    assert (run.stage, run.loss, run.error) == ("gate", None, None)


def test_rows_that_cannot_be_read_fail_their_run_alone(recipe: Path, tiny_run: TinyRun) -> None:
    fields = [f"data.train=[{tiny_run.folder / 'nope.jsonl'}],[{tiny_run.folder / 'text.jsonl'}]"]
    first, second = sweep(recipe, [], fields)
    assert first.error
    assert "nope.jsonl" in first.error
    assert second.loss


def test_a_run_is_that_of_its_recipe_also_with_fitted_temperatures_and_rounded_states(
    recipe: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """Temperatures depend on the seed, so the second run scores the cached states again."""
    stage = GATE | {"calibrate": True, "feature_dtype": "int8"}
    runs = sweep(recipe, ["stages.gate.calibrate=true", "stages.gate.feature_dtype=int8"], ["seed=0,1,2"])
    data = {"validation": [str(tiny_run.folder / "held-out.jsonl")]}
    for run in runs:
        seed = int(run.overrides[0][-1])
        alone = tiny_run.train(tmp_path / f"alone-{seed}", [stage], seed=seed, data=data, cache_features=True)
        assert losses(Path(run.folder)) == losses(alone)


def test_two_processes_give_the_losses_of_one(recipe: Path, tmp_path: Path) -> None:
    alone = sweep(recipe, [], FIELDS)
    process = launch(tmp_path, 2, f"{recipe} output={tmp_path / 'two'} --sweep {FIELDS[0]} --sweep {FIELDS[1]}")
    assert process.returncode == 0, process.stderr[-3000:]
    shared = json.loads((tmp_path / "two" / "sweep.json").read_text())
    for run, expected in zip(shared, alone, strict=True):
        assert run["overrides"] == expected.overrides
        assert run["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert process.stdout.count('"loss"') == 4  # the JSON of the first process alone
    assert not (tmp_path / "two" / "features").exists()
