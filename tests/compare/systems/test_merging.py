"""Merges by the real mergekit, against the formulas, and the errors when it cannot merge."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_models import tiny
from ultrafuser.compare.systems import merge as merging
from ultrafuser.compare.systems.merge import find_program, merge
from ultrafuser.errors import MissingExtraError, UltraFuserError


def has_mergekit() -> bool:
    try:
        find_program()
    except MissingExtraError:
        return False
    return True


needs_mergekit = pytest.mark.skipif(not has_mergekit(), reason="mergekit is not installed (extra `merge`)")


@pytest.fixture
def checkpoints(tmp_path: Path, tokenizer) -> Callable[..., list[Path]]:
    """checkpoints(kind): a base and three specialists."""

    def checkpoints(kind: str = "llama") -> list[Path]:
        folders = []
        for seed, name in enumerate(("base", "text", "code", "math")):
            folder = tmp_path / name
            tiny(kind, seed, vocab_size=len(tokenizer), tie_word_embeddings=False).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders.append(folder)
        return folders

    return checkpoints


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5, msg=name)


@needs_mergekit
@torch.no_grad()
@pytest.mark.parametrize(("kind", "weight"), [("llama", None), ("qwen2", 2.0)])
def test_linear_is_the_average(checkpoints, tmp_path, kind, weight):
    """Whatever the weight, which is the same for all."""
    _, *sources = checkpoints(kind)
    states = [weights(source) for source in sources]
    merged = merge(sources, None, "linear", tmp_path / "merged", weight=weight)
    assert_close(weights(merged), {name: sum(state[name] for state in states) / 3 for name in states[0]})


@needs_mergekit
@torch.no_grad()
def test_task_arithmetic_adds_differences_to_the_base(checkpoints, tmp_path, monkeypatch):
    """With equal shares their mean. The folder is made once, and anew for other settings."""
    base, *sources = checkpoints()
    start, states = weights(base), [weights(source) for source in sources]
    deltas = {name: sum(state[name] - tensor for state in states) for name, tensor in start.items()}
    output = merge(sources, base, "task_arithmetic", tmp_path / "merged")
    assert_close(weights(output), {name: tensor + deltas[name] / 3 for name, tensor in start.items()})
    merge(sources, base, "task_arithmetic", output, weight=1.0)
    assert_close(weights(output), {name: tensor + deltas[name] for name, tensor in start.items()})
    recipe = yaml.safe_load((output / "merge.yaml").read_text())
    assert (recipe["merge_method"], recipe["seed"]) == ("task_arithmetic", 0)
    assert [entry["parameters"] for entry in recipe["models"]] == [{"weight": 1.0}] * 3
    assert AutoTokenizer.from_pretrained(output).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    monkeypatch.setattr(merging.subprocess, "run", None)  # nothing runs again
    assert merge(sources, base, "task_arithmetic", output, weight=1.0) == output


@needs_mergekit
@torch.no_grad()
def test_ties_is_the_mean_of_large_differences_with_the_elected_sign(checkpoints, tmp_path):
    base, *sources = checkpoints()
    start, states = weights(base), [weights(source) for source in sources]
    merged = weights(merge(sources, base, "ties", tmp_path / "merged", density=0.5, weight=1.0))
    for name in (name for name, tensor in start.items() if tensor.dim() == 2):
        deltas = torch.stack([state[name] - start[name] for state in states])
        large = torch.stack(
            [state.abs() > state.abs().median() for state in deltas]
        )  # an even number of values: half of them
        deltas = deltas * large
        agrees = large & (deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0))
        mean = (deltas * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        torch.testing.assert_close(merged[name], start[name] + mean, atol=1e-5, rtol=1e-5, msg=name)


@needs_mergekit
@torch.no_grad()
def test_dare_keeps_a_random_share_by_its_seed(checkpoints, tmp_path):
    base, *sources = checkpoints()
    first, same = (
        weights(merge(sources[:1], base, "dare_ties", tmp_path / name, density=0.25, seed=3)) for name in ("a", "b")
    )
    for name, tensor in weights(base).items():
        assert torch.equal(first[name], same[name])
        if tensor.dim() == 2:
            kept = (first[name] - tensor).abs() > 1e-6
            assert kept.float().mean() == pytest.approx(0.25, abs=0.06)


@needs_mergekit
def test_an_error_of_mergekit_is_shown_and_no_folder_remains(checkpoints, tmp_path, tokenizer):
    base, *sources = checkpoints()
    foreign = tmp_path / "gpt2"
    tiny("gpt2", vocab_size=len(tokenizer)).save_pretrained(foreign)
    with pytest.raises(
        UltraFuserError, match=r"(?s)could not make the ties merge of text, gpt2 .exit status 1.:\n.*\w"
    ):
        merge([sources[0], foreign], base, "ties", tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


# ---------------------------------------------------------------- without mergekit


def test_a_missing_mergekit_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r'merging weights needs .mergekit.*pip install "ultrafuser\[merge\]"'):
        find_program()
    program = tmp_path / merging.PROGRAM
    program.write_text("#!/bin/sh\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    assert find_program() == str(program)


def test_a_method_that_needs_a_base_is_an_error_before_mergekit_runs(save, tmp_path):
    message = "ties adds differences to the model that the specialists were trained from. Name it as `base`"
    with pytest.raises(UltraFuserError, match=message):
        merge([save("a"), save("b", seed=1)], None, "ties", tmp_path / "out")
    assert not (tmp_path / "out").exists()
