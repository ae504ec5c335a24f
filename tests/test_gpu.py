"""On a CUDA device: the same numbers as on the CPU, bfloat16, generation, and both stages."""

from __future__ import annotations

import pytest
import torch

from tiny_models import entry, fuse, fuse_entries, save_adapter, shake_gate, tiny, tokens
from ultrafuser.recipe import JointStage
from ultrafuser.train.stages import prepare_gate, prepare_joint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["logits", "probabilities"])
def mixing(request):
    return request.param


def shared_on_disk(save, tmp_path, mixing):
    base, plain = save("base"), tiny()
    adapters = {name: save_adapter(plain, tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b", "c"))}
    return shake_gate(fuse_entries([entry(name, base, path) for name, path in adapters.items()], mixing=mixing))


def test_logits_equal_those_of_the_cpu(mixing):
    model = fuse([tiny("llama", 0), tiny("gpt2", 1), tiny("gemma2", 2)], mixing=mixing)
    ids = tokens(3, 9)
    on_cpu = model(ids).logits
    on_gpu = model.to("cuda")(ids.cuda()).logits.cpu()
    torch.testing.assert_close(on_gpu, on_cpu, atol=2e-4, rtol=1e-3)


def test_shared_base_decodes_the_same_tokens_as_the_cpu(save, tmp_path, mixing):
    model = shared_on_disk(save, tmp_path, mixing)
    ids = tokens(2, 7)
    on_cpu = model.generate(ids, max_new_tokens=8, do_sample=False)
    on_gpu = model.to("cuda").generate(ids.cuda(), max_new_tokens=8, do_sample=False)
    assert torch.equal(on_gpu.cpu(), on_cpu)


def test_bfloat16_stays_close_and_keeps_the_gate_in_float32(mixing):
    models = [tiny("llama", seed) for seed in range(3)]
    model = fuse(models, mixing=mixing).cuda()
    ids = tokens(2, 9).cuda()
    exact = model(ids).logits
    model.groups.to(torch.bfloat16)
    rounded = model(ids, output_gate_weights=True)
    assert rounded.logits.dtype == torch.float32 and rounded.gate_weights.dtype == torch.float32
    p, q = exact.log_softmax(-1), rounded.logits.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.02  # nats


@pytest.mark.parametrize("stage", ["gate", "joint"])
def test_a_training_step_lowers_the_loss(save, tmp_path, mixing, stage):
    model = shared_on_disk(save, tmp_path, mixing).cuda()
    if stage == "gate":
        prepare_gate(model)
    else:
        prepare_joint(model, JointStage(name="joint"))
    ids = tokens(4, 12).cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_gradients_equal_those_of_the_cpu(save, tmp_path, mixing):
    model = shared_on_disk(save, tmp_path, mixing)
    prepare_joint(model, JointStage(name="joint"))
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    on_cpu = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.cuda()
    model(ids.cuda(), labels=ids.cuda()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.cpu(), on_cpu[name], atol=2e-4, rtol=2e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_specialists_are_spread_over_two_devices(save, tmp_path, mixing):
    model = shake_gate(fuse_entries([entry("a", save("a")), entry("b", save("b", seed=1))], mixing=mixing))
    model.save_pretrained(tmp_path / "fused")
    loaded = type(model).from_pretrained(tmp_path / "fused", device_map="auto")
    assert len(set(map(str, loaded.hf_device_map.values()))) == 2
    ids = tokens(2, 7)
    torch.testing.assert_close(loaded(ids.cuda()).logits.cpu(), model(ids).logits, atol=2e-4, rtol=1e-3)
