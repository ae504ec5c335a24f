"""The records of gate weights: positions, choices, and what is forgotten."""

from __future__ import annotations

import numpy as np
import pytest

from ultrafuser.vllm_plugin.gate_records import (
    KEY,
    MASK,
    MAX_FINISHED,
    MAX_RELEASED,
    AnswerRecord,
    GateRecords,
    choice_of,
)


def write(records: GateRecords, record: AnswerRecord, position: int, *weights: float) -> None:
    records.write(np.array([record.slot]), np.array([position]), np.array([weights]))


def fetched(records: GateRecords, key: str, choice: str, first: int, end: int) -> list[list[float]]:
    data = records.take({key: {choice: (first, end)}})[key][choice]["weights"]
    return np.frombuffer(data, dtype=np.float32).reshape(-1, 2).tolist()


@pytest.mark.parametrize(
    ("request_id", "choice"),
    [
        ("chatcmpl-0a1b-deadbeef", "0:0"),
        ("3_chatcmpl-0a1b-deadbeef", "0:3"),
        ("cmpl-0a1b-2-deadbeef", "2:0"),
        ("1_cmpl-my-7_cmpl-id-12-deadbeef", "12:1"),
        ("chatcmpl-x-3-deadbeef", "0:0"),
    ],
)
def test_the_name_of_a_request_tells_its_choice(request_id, choice):
    assert choice_of(request_id) == choice


def test_positions_are_overwritten_and_grow():
    records = GateRecords(2)
    record = records.find("chatcmpl-a-00000000", lambda _: {KEY: "k"})
    for position in range(1000):
        write(records, record, position, position, 0)
    write(records, record, 7, -1, 1)
    assert fetched(records, "k", "0:0", 6, 9) == [[6, 0], [-1, 1], [8, 0]]
    assert fetched(records, "k", "0:0", 999, 1000) == [[999, 0]]


def test_requests_that_ask_for_nothing_have_no_record():
    records = GateRecords(2)
    assert records.find("a", lambda _: None) is None and records.find("b", lambda _: {"other": 1}) is None
    assert records.find("c", lambda _: {MASK: [0, 1]}).mask == (False, True)
    assert records.find("d", lambda _: {MASK: [0, 0]}) is None, "a mask of none is no mask"
    assert len(records) == 0


def test_a_released_key_collects_nothing_more():
    records = GateRecords(2)
    record = records.find("chatcmpl-a-00000000", lambda _: {KEY: "k"})
    write(records, record, 0, 1, 2)
    records.release("k")
    assert len(records) == 0 and (record.key, record.slot) == (None, -1), "its request may run for another step"
    assert records.find("chatcmpl-a-00000000", lambda _: {KEY: "k"}) is record and len(records) == 0


def test_a_request_may_come_after_its_release():
    records = GateRecords(2)
    for i in range(MAX_RELEASED + 10):
        records.release(f"k{i}")
    late = records.find("chatcmpl-a-00000000", lambda _: {KEY: f"k{i}", MASK: [1, 0]})
    assert late.key is None and late.mask == (True, False) and len(records) == 0
    assert records.find("chatcmpl-b-00000000", lambda _: {KEY: "k0"}).key == "k0", "only the newest are remembered"


def test_a_preempted_answer_keeps_its_weights():
    records = GateRecords(2)
    record = records.find("chatcmpl-a-00000000", lambda _: {KEY: "k"})
    write(records, record, 0, 1, 0)
    records.forget_ended({"chatcmpl-a-00000000"})
    assert records.find("chatcmpl-a-00000000", lambda _: {KEY: "k"}) is record
    assert fetched(records, "k", "0:0", 0, 1) == [[1, 0]]


def test_answers_that_nobody_fetches_are_bounded():
    records = GateRecords(2)
    for i in range(MAX_FINISHED + 10):
        records.find(f"chatcmpl-{i}-00000000", lambda _, i=i: {KEY: str(i)})
    records.find("chatcmpl-x-00000000", lambda _: {KEY: "runs"})
    records.forget_ended({"chatcmpl-x-00000000"})
    assert len(records) == MAX_FINISHED + 1
    assert fetched(records, "runs", "0:0", 0, 1) == [[0, 0]]
    assert records.take({"3": {"0:0": (0, 1)}}) == {"3": {}}
