"""`device_map="auto"`: whole specialists are spread over the accelerators of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_models import entry, fuse_entries, save_adapter, tiny
from training_fixtures import GATE, TinyRun
from ultrafuser.errors import CheckpointError, RecipeError, TrainingError
from ultrafuser.model import checkpoint, placement
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.placement import spread
from ultrafuser.recipe import load_recipe
from ultrafuser.train import run as run_module

IDS = torch.arange(5, 12)[None]


@pytest.mark.parametrize(
    ("sizes", "free", "devices"),
    [
        ([10, 10], {"a": 100, "b": 100}, ["a", "b"]),
        ([10, 60, 50], {"a": 100, "b": 100}, ["b", "a", "b"]),
        ([10, 200, 10], {"a": 100, "b": 90}, []),  # one fits nowhere, and takes room that is not known
        ([91], {"a": 100}, []),  # a tenth is left for caches
        ([90], {"a": 100}, ["a"]),
    ],
)
def test_each_goes_where_most_room_is(sizes: list[int], free: dict[str, int], devices: list[str]) -> None:
    assert spread(sizes, free) == devices


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list:
    """What each base is loaded with, on a machine with two devices. Both are names of the CPU."""
    used = []
    load_base = checkpoint.load_base

    def record(*args, **kwargs):
        used.append(kwargs.get("device_map"))
        return load_base(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "load_base", record)
    monkeypatch.setattr(checkpoint, "accelerators", lambda: {"cpu": 1 << 30, "cpu:0": (1 << 30) - 1})
    return used


def test_specialists_are_spread_and_answer_the_same(save, tmp_path: Path, maps: list) -> None:
    model = fuse_entries([entry("a", save("a", hidden_size=64)), entry("b", save("b")), entry("c", save("c"))])
    model.save_pretrained(tmp_path / "fused")
    maps.clear()
    loaded = UltraFuserForCausalLM.from_pretrained(tmp_path / "fused", device_map="auto")
    assert maps == ["cpu", "cpu:0", "cpu:0"]  # the largest first, then where the most is left
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_adapters_on_one_base_stay_together(save, tmp_path: Path, maps: list) -> None:
    base, plain = save("base"), tiny()
    adapters = {name: save_adapter(plain, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    fuse_entries([entry(name, base, path) for name, path in adapters.items()]).save_pretrained(tmp_path / "fused")
    maps.clear()
    UltraFuserForCausalLM.from_pretrained(tmp_path / "fused", device_map="auto")
    assert maps == ["auto"], "one group is left to transformers"


def test_what_cannot_be_measured_is_left_to_transformers(
    save, tmp_path: Path, maps: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse_entries([entry("a", save("a")), entry("b", save("b"))]).save_pretrained(tmp_path / "fused")

    def refuse(*args):
        raise CheckpointError("needs its own code")

    monkeypatch.setattr(placement, "empty_groups", refuse)
    maps.clear()
    UltraFuserForCausalLM.from_pretrained(tmp_path / "fused", device_map="auto")
    assert maps == ["auto", "auto"]


def test_a_specialist_with_its_own_map_leaves_the_others_to_transformers(save, tmp_path: Path, maps: list) -> None:
    fuse_entries([entry("a", save("a"), device_map="cpu"), entry("b", save("b"))]).save_pretrained(tmp_path / "fused")
    maps.clear()
    UltraFuserForCausalLM.from_pretrained(tmp_path / "fused", device_map="auto")
    assert maps == ["auto", "auto"], "load_base puts the entry's own first"


def test_one_device_is_left_to_transformers(save, tmp_path: Path, maps: list, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse_entries([entry("a", save("a"))]).save_pretrained(tmp_path / "fused")
    monkeypatch.setattr(checkpoint, "accelerators", dict)
    maps.clear()
    UltraFuserForCausalLM.from_pretrained(tmp_path / "fused", device_map="auto")
    assert maps == ["auto"]


def test_a_recipe_spreads_its_specialists_in_training(tiny_run: TinyRun, tmp_path: Path, maps: list) -> None:
    plain = tiny_run.train(tmp_path / "plain")
    maps.clear()
    output = tiny_run.train(tmp_path / "spread", device_map="auto", device="auto")
    assert set(maps) == {"cpu", "cpu:0"}
    models = [UltraFuserForCausalLM.from_pretrained(folder / "fused", device_map="cpu") for folder in (plain, output)]
    torch.testing.assert_close(models[0](IDS).logits, models[1](IDS).logits)


def test_several_processes_are_refused(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="got both 'device_map' and 'parallel', expected one of them"):
        load_recipe(tiny_run.fields(tmp_path, device_map="auto", device="auto", parallel={"specialist": 3}))
    with pytest.raises(RecipeError, match="got both 'device' and 'device_map', expected one of them. Leave one out"):
        load_recipe(tiny_run.fields(tmp_path, device_map="auto", device="cpu"))

    class Two:
        num_processes, is_main_process = 2, True

        def __init__(self, **options) -> None:
            pass

    monkeypatch.setattr(run_module, "PartialState", Two)
    monkeypatch.setattr(run_module, "refuse_wrappers", lambda: None)
    with pytest.raises(
        TrainingError, match="device_map spreads .* but 2 processes run. Start one, or leave device_map out"
    ):
        tiny_run.train(tmp_path / "two", [GATE], device_map="auto", device="auto")
