"""Token traces: what is refused, what the means are, and that JSON loses nothing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ultrafuser.errors import DataError
from ultrafuser.inspect.trace import (
    TokenTrace,
    leader,
    mean_weights,
    mean_weights_by_domain,
    on_one_line,
    printable,
)


def test_json_loses_nothing(trace: TokenTrace) -> None:
    assert TokenTrace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace


def test_numpy_weights_become_plain_lists() -> None:
    array = np.array([[0.25, 0.75], [1.0, 0.0]], dtype=np.float32)
    assert TokenTrace(["a", "b"], array, ["x", "y"]).weights == [[0.25, 0.75], [1.0, 0.0]]  # type: ignore[arg-type]


def test_weights_rounded_to_bfloat16_are_taken() -> None:
    exact = np.array([0.3337, 0.3331, 0.3332], dtype=np.float32)
    rounded = (exact.view(np.uint32) & 0xFFFF0000).view(np.float32)  # truncation: twice the error of rounding
    assert abs(float(rounded.sum()) - 1) > 1e-3
    TokenTrace(["a"], [rounded.tolist()], ["x", "y", "z"])


@pytest.mark.parametrize(
    ("tokens", "weights", "message"),
    [
        (["a", "b"], [[0.5, 0.5]], r"1 rows of weights for 2 tokens"),
        (["a", "b"], [[0.5, 0.5], [1.0]], r"token 1 \('b'\) has 1 weights, expected 2.*x, y"),
        (["a", "b"], [[0.5, 0.5], [0.5, 0.4]], r"token 1 \('b'\) has weights that sum to 0.9000, expected 1"),
        (["a", "b"], [[1.2, -0.2], [0.5, 0.5]], r"token 0 \('a'\).*not negative"),
        (["a", "\n"], [[0.5, 0.5], [math.nan, 0.5]], r"token 1 \('\\n'\).*finite"),
    ],
)
def test_weights_that_do_not_fit_name_the_token(tokens: list[str], weights: list[list[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TokenTrace(tokens, weights, ["x", "y"])


def test_specialists_must_be_named_and_differ() -> None:
    with pytest.raises(DataError, match="no specialists"):
        TokenTrace([], [], [])
    with pytest.raises(DataError, match="repeat a name"):
        TokenTrace([], [], ["x", "x"])


def test_unknown_and_missing_keys_are_named() -> None:
    with pytest.raises(DataError, match=r"unknown keys \['wieghts'\], missing keys \['weights'\]"):
        TokenTrace.from_dict({"tokens": [], "wieghts": [], "specialists": ["x"]})


def test_leader_and_margin() -> None:
    assert leader([0.2, 0.7, 0.1]) == (1, pytest.approx(0.5))
    assert leader([0.4, 0.4, 0.2]) == (0, 0.0)
    assert leader([1.0]) == (0, 1.0)


def test_mean_weights_count_tokens_not_traces() -> None:
    long = TokenTrace(["a", "b", "c"], [[1, 0], [1, 0], [0.5, 0.5]], ["x", "y"], domain="p")
    short = TokenTrace(["d"], [[0.1, 0.9]], ["x", "y"], domain="q")
    third = TokenTrace(["e"], [[0.3, 0.7]], ["x", "y"], domain="p")
    assert mean_weights([long, short]) == pytest.approx({"x": 2.6 / 4, "y": 1.4 / 4})
    by_domain = mean_weights_by_domain([long, short, third])
    assert list(by_domain) == ["p", "q"]
    assert by_domain["p"] == pytest.approx({"x": 2.8 / 4, "y": 1.2 / 4})
    assert by_domain["q"] == pytest.approx({"x": 0.1, "y": 0.9})


def test_means_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DataError, match="without a single token"):
        mean_weights([TokenTrace([], [], ["x"])])
    with pytest.raises(DataError, match=r"trace 1 has specialists \['y'\], expected \['x'\]"):
        mean_weights([TokenTrace(["a"], [[1]], ["x"]), TokenTrace(["a"], [[1]], ["y"])])
    with pytest.raises(DataError, match="trace 0 has no domain"):
        mean_weights_by_domain([TokenTrace(["a"], [[1]], ["x"])])


def test_control_characters_become_pictures_of_the_same_length() -> None:
    raw = "a\x00\x1b\x7f\x9b\r\ud800\t\n "
    assert printable(raw) == "a␀␛␡\ufffd␍\ufffd\t\n "
    assert on_one_line(" \t\n") == "·⇥↵"
