"""Fingerprints of weights: the hashes that caches on disk hold stay the same, and every kind of write shows."""

from __future__ import annotations

import hashlib

import pytest
import torch

from ultrafuser.model.fingerprint import WeightMarks, hash_weights


def test_a_hash_is_that_of_at_most_64_values_of_each_tensor():
    weights = {"a": torch.arange(150.0).view(3, 50), "b": torch.ones(7, dtype=torch.bfloat16)}
    digest = hashlib.sha256(b"rows")
    digest.update(f"a(3, 50)torch.float32{[float(3 * i) for i in range(50)]}".encode())
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


@pytest.mark.parametrize("rows", [1, 3, 63, 64, 65, 127, 128, 1023, 1025, 2047, 2049, 5000])
def test_samples_reach_from_the_first_row_to_the_last(rows):
    for row in (0, rows // 2, rows - 1):
        weight = torch.zeros(rows, 40)
        marks, digest = WeightMarks([weight]), hash_weights([("w", weight)])
        weight.data[max(0, row - 100) : row + 100] = 1
        assert marks.is_written(weight) and hash_weights([("w", weight)]) != digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8])
def test_marks_compare_every_type(dtype):
    weight = torch.arange(100).to(dtype)
    if dtype.is_floating_point:
        weight.view(10, 10)[3] = float("nan")
    marks = WeightMarks([weight])
    assert not marks.is_written(weight)
    weight.data.view(10, 10)[5] = 1
    assert marks.is_written(weight)


def test_weights_made_under_inference_mode_are_marked_by_their_values():
    """Such tensors count no writes."""
    with torch.inference_mode():
        tensor = torch.arange(4.0)
        marks = WeightMarks([tensor])
        assert not marks.is_written(tensor)
        tensor[2] = 7
        assert marks.is_written(tensor)
