"""Fingerprints of weights: the hashes that caches on disk hold stay the same, and every kind of write shows."""

from __future__ import annotations

import hashlib

import torch

from ultrafuser.model.fingerprint import WeightMarks, hash_weights


def test_a_hash_is_that_of_64_values_of_each_tensor():
    weights = {"a": torch.arange(150.0).view(3, 50), "b": torch.ones(7, dtype=torch.bfloat16)}
    digest = hashlib.sha256(b"rows")
    digest.update(f"a(3, 50)torch.float32{[float(2 * i) for i in range(64)]}".encode())
    digest.update(f"b(7,)torch.bfloat16{[1.0] * 7}".encode())
    assert hash_weights(weights.items(), start=b"rows") == digest.hexdigest()


def test_marks_see_writes_in_place_and_through_data_and_new_tensors():
    weights = [torch.zeros(5), torch.zeros(3000)]
    marks = WeightMarks(weights)
    assert not marks.differ(weights)
    weights[0].add_(1)
    assert [marks.is_written(tensor) for tensor in weights] == [True, False]
    weights[1].data += 1
    assert marks.is_written(weights[1])
    assert WeightMarks(weights).differ([*weights, torch.zeros(5)])
    assert WeightMarks().differ(weights)
