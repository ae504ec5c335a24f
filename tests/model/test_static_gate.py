"""A static gate: equal weights until it is trained, K numbers then, and an ordinary checkpoint."""

from __future__ import annotations

import pytest
import torch

from tiny_models import fuse, naive_mix, tiny, tokens
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.model.errors import CheckpointError
from ultrafuser.model.gate import StaticGate


@pytest.mark.parametrize("mixing", ["logits", "probabilities"])
def test_untrained_it_mixes_equally_at_every_token(mixing):
    models = [tiny("llama", seed) for seed in range(3)]
    fused = fuse(models, gate_type="static", gate_scale=0.0, mixing=mixing)
    ids = tokens(2, 7)
    out = fused(ids, output_gate_weights=True)
    assert torch.allclose(out.gate_weights, torch.full_like(out.gate_weights, 1 / 3))
    expected = naive_mix([model(ids).logits for model in models], torch.full((2, 7, 3), 1 / 3), mixing)
    assert torch.allclose(out.logits.double().log_softmax(-1), expected.log_softmax(-1), atol=1e-4)


def test_only_k_numbers_learn():
    gate = StaticGate(3)
    assert sum(p.numel() for p in gate.parameters()) == 3
    weights = gate([torch.randn(5, 4) for _ in range(3)])
    assert weights.shape == (5, 3)
    assert torch.allclose(weights.exp().sum(-1), torch.ones(5))


def test_the_best_constant_weights_are_found():
    """With probability mixing the loss is convex in the weights, and one specialist that is always right takes all."""
    gate, optimizer = StaticGate(2), None
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.05, weight_decay=0.0)
    log_probs = torch.tensor([[0.9, 0.1]]).log().expand(20, 2)
    for _ in range(200):
        optimizer.zero_grad()
        (-torch.logsumexp(gate([torch.zeros(20, 4)] * 2) + log_probs, -1).mean()).backward()
        optimizer.step()
    assert gate.scores.softmax(-1)[0] > 0.99


def test_a_saved_one_is_read_back(full, tmp_path):
    config = full.config.to_dict() | {"gate_type": "static"}
    config = UltraFuserConfig(**{k: v for k, v in config.items() if k in ("specialists", "gate_type", "mixing")})
    model = type(full)(config, list(full.groups))
    with torch.no_grad():
        model.gate.scores.copy_(torch.tensor([1.0, 2.0, 3.0]))
    model.save_pretrained(tmp_path / "static")
    reloaded = type(full).from_pretrained(tmp_path / "static")
    assert isinstance(reloaded.gate, StaticGate)
    assert torch.equal(reloaded.gate.scores, model.gate.scores)


def test_an_unknown_gate_is_refused():
    with pytest.raises(CheckpointError, match="gate_type is 'mpl', expected one of mlp, static"):
        UltraFuserConfig([], gate_type="mpl")
