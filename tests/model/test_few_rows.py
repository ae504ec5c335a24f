"""Linear layers of few rows give what `nn.Linear` gives, in either order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tiny_models import fuse, tiny, tokens
from ultrafuser.model import few_rows
from ultrafuser.model.few_rows import FewRowsLinear, linear, use_few_rows

BIG = (512, 256)  # (out, in), more weights than the bound


@pytest.fixture
def faster(monkeypatch):
    """The other order is always taken, whatever the machine. Counts how often."""
    calls = []
    original = few_rows._other_order
    monkeypatch.setattr(few_rows, "_other_order_is_faster", lambda *_: True)
    monkeypatch.setattr(few_rows, "_other_order", lambda *args: calls.append(args[3]) or original(*args))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "filled"),
    [((1, 1), None), ((2, 1), 4), ((3, 1), 4), ((4, 1), 4), ((1, 5), 8), ((3, 3), 16), ((16,), 16), ((17,), None)],
)
def test_both_orders_agree(faster, shape, filled, bias):
    layer = nn.Linear(BIG[1], BIG[0], bias=bias)
    x = torch.randn(*shape, BIG[1])
    with torch.no_grad():
        expected = layer(x)
        use_few_rows(layer)
        got = layer(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous() and faster == ([] if filled is None else [filled])


def test_the_usual_order_where_the_other_one_does_not_apply(faster):
    layer = nn.Linear(BIG[1], BIG[0])
    use_few_rows(layer)
    x = torch.randn(3, BIG[1])
    layer(x).sum().backward()  # gradients
    assert layer.weight.grad is not None and not faster
    with torch.no_grad():
        linear(torch.randn(3, 8), torch.randn(8, 8))  # a small weight
        with torch.autocast("cpu", torch.bfloat16):  # autocast chooses the type of the product
            assert layer(x).dtype == torch.bfloat16
    assert not faster


class Packed(torch.Tensor):
    """Stands for the weights of quantisation libraries, which are tensors of types of their own."""


def test_packed_weights_keep_their_product(faster):
    layer = nn.Linear(BIG[1], BIG[0])
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    use_few_rows(layer)
    with torch.no_grad():
        layer(torch.randn(3, BIG[1]))
    assert not faster


def test_a_model_keeps_its_names_weights_and_copies():
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_few_rows(model)
    assert type(model.model.layers[0].mlp.up_proj) is FewRowsLinear and isinstance(model.lm_head, nn.Linear)
    after = copy.deepcopy(model).state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_fused_model_decodes_alike_in_both_orders(monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 2048, "num_attention_heads": 4}
    model = fuse([tiny("llama", s, **sizes) for s in range(3)])
    ids, outs = tokens(1, 6), {}
    for order in (True, False):
        monkeypatch.setattr(few_rows, "_other_order_is_faster", lambda *_, order=order: order)
        with torch.no_grad():
            outs[order] = model(ids).logits
    torch.testing.assert_close(outs[True], outs[False], rtol=1e-4, atol=1e-5)


def test_the_order_is_measured_once():
    few_rows._other_order_is_faster.cache_clear()
    with torch.inference_mode():
        for _ in range(3):
            linear(torch.randn(3, BIG[1]), torch.randn(BIG))
    assert few_rows._other_order_is_faster.cache_info().misses == 1
