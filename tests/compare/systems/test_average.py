"""Weight averaging, against the mean computed tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_models import fuse, tiny, tokens
from ultrafuser.compare.systems.average import weight_average
from ultrafuser.errors import UltraFuserError


def test_the_mean_of_full_models(full):
    group = weight_average(full)
    states = [full.specialist(name).state_dict() for name in full.config.names]
    for name, tensor in group.model.state_dict().items():
        torch.testing.assert_close(tensor, sum(state[name] for state in states) / 3, msg=name)
    assert group.names == ["weight_average"]


def test_the_mean_of_adapters_on_one_base(shared):
    merged = [shared.specialist(name).state_dict() for name in shared.config.names]
    group = weight_average(shared)
    for name, tensor in group.model.state_dict().items():
        torch.testing.assert_close(tensor, sum(state[name] for state in merged) / 3, atol=1e-5, rtol=1e-5, msg=name)


def test_averaging_leaves_the_specialists_alone(full, shared):
    ids = tokens(1, 6)
    for model in (full, shared):
        with torch.no_grad():
            logits = model(ids).logits
            group = weight_average(model)
            assert torch.equal(model(ids).logits, logits)
            states = group(ids[None])[0]
            plain = group.model(ids).logits
        torch.testing.assert_close(group.head(72).logits(states), plain)


def test_copies_average_to_themselves(tmp_path):
    model = fuse([tiny(seed=1), tiny(seed=1)])
    average = weight_average(model).model.state_dict()
    for name, tensor in tiny(seed=1).state_dict().items():
        torch.testing.assert_close(average[name], tensor)


def test_the_average_is_an_ordinary_model(full, tmp_path):
    weight_average(full).model.save_pretrained(tmp_path / "average")
    AutoModelForCausalLM.from_pretrained(tmp_path / "average")


@pytest.mark.parametrize(
    "specialist", [tiny("gpt2", 2), tiny("llama", 2, hidden_size=16)], ids=["architecture", "width"]
)
def test_different_shapes_have_no_average(specialist):
    model = fuse([tiny(seed=1), specialist], ["a", "b"])
    with pytest.raises(UltraFuserError, match="specialist 'b' has other weights than 'a' .names or shapes."):
        weight_average(model)
