"""AlpacaEval and MT-Bench with a judge of our own: symmetric, resumable, and honest about what was not judged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fake_endpoint import FakeEndpoint, MemoryStore, failing, fake_endpoint, fine
from ultrafuser.endpoint.client import Endpoint
from ultrafuser.errors import DataError, EndpointError
from ultrafuser.evaluate.judged import alpaca, mt_bench
from ultrafuser.evaluate.judged.alpaca import AlpacaRow
from ultrafuser.evaluate.judged.judge import Judge
from ultrafuser.evaluate.judged.mt_bench import MTBenchRow
from ultrafuser.evaluate.lm.chat import decode_chat, encode_chat

DATA = Path(__file__).parents[3] / "../shared/data/eval"
ALPACA = [AlpacaRow(str(i), "group", f"instruction {i}", f"reference {i}") for i in range(8)]
TALKS = [
    MTBenchRow("1", "writing", ("w1", "w2")),
    MTBenchRow("2", "math", ("m1", "m2"), ("truth m1", "truth m2")),
    MTBenchRow("3", "coding", ("c1", "c2"), ("truth c1", None)),
]


class Parrot:
    """An lm-eval model as far as the benchmarks need one: it answers by a function of the chat."""

    def __init__(self, answer: Callable[[list[dict[str, str]]], str] = lambda chat: f"answer to {chat[-1]['content']}"):
        self.answer, self.chats, self.options = answer, [], []

    def apply_chat_template(self, chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return encode_chat(chat)

    def generate_until(self, requests: list[Any]) -> list[str]:
        chats = [decode_chat(request.args[0]) for request in requests]
        self.chats += chats
        self.options += [request.args[1] for request in requests]
        return [self.answer(chat) for chat in chats]


@pytest.fixture
def server():
    for package in ("aiohttp", "lm_eval"):
        pytest.importorskip(package, reason="an extra is not installed")
    with fake_endpoint() as server:
        yield server


def judge_of(server: FakeEndpoint, store: MemoryStore | None = None, **changes: Any) -> Judge:
    return Judge(Endpoint(server.recipe(**changes)), MemoryStore() if store is None else store)


def section(prompt: str, name: str) -> str:
    """One section of a judge's prompt."""
    return re.search(rf"=== {name} \(\w+\)\n(.*?)\n=== End", prompt, re.S)[1]


def prefers(good: Callable[[str], float]):
    """A judge without favourites: the answer of the higher value wins."""

    def reply(prompt: str):
        a, b = good(section(prompt, "Answer A")), good(section(prompt, "Answer B"))
        return fine("Reasons.\n[[C]]" if a == b else f"Reasons.\n[[{'A' if a > b else 'B'}]]")

    return reply


# ---------------------------------------------------------------- AlpacaEval


@pytest.mark.parametrize("always", ["A", "B", "C"])
def test_a_judge_that_only_sees_the_order_gives_one_half(server: FakeEndpoint, always):
    server.reply = lambda _: fine(f"[[{always}]]")
    result = alpaca.evaluate(Parrot(), judge_of(server), ALPACA)
    assert result.value == 0.5 and set(result.scores.values()) == {0.5}
    assert result.details["inconsistent"] == (0 if always == "C" else len(ALPACA))
    win_rates = {"A": (1, 0), "B": (0, 1), "C": (0.5, 0.5)}[always]
    assert (result.details["win_rate_shown_first"], result.details["win_rate_shown_second"]) == win_rates
    assert result.counts == {"ok": 16, "unparsed": 0, "refused": 0, "error": 0, "unscored": 0}


def test_exchanging_model_and_reference_mirrors_the_win_rate(server: FakeEndpoint):
    def good(text: str) -> float:  # wins, ties and losses
        return int(text.split()[-1]) % 3 + (text.startswith("reference") and int(text.split()[-1]) % 2)

    server.reply = prefers(good)
    result = alpaca.evaluate(Parrot(), judge_of(server), ALPACA)
    exchanged = [AlpacaRow(r.id, r.group, r.instruction, f"answer to {r.instruction}") for r in ALPACA]
    parrot = Parrot(lambda chat: chat[-1]["content"].replace("instruction", "reference"))
    mirrored = alpaca.evaluate(parrot, judge_of(server), exchanged)
    assert {key: 1 - score for key, score in result.scores.items()} == mirrored.scores
    assert result.value == 0.25 and result.details["inconsistent"] == 0


def test_an_answer_equal_to_the_reference_is_a_tie(server: FakeEndpoint):
    server.reply = lambda _: fine("[[B]]")
    rows = [AlpacaRow("0", "", "say hi", "hi")]
    result = alpaca.evaluate(Parrot(lambda _: "hi"), judge_of(server), rows)
    assert result.value == 0.5 and server.hits == 1


def test_samples_without_both_verdicts_are_left_out_and_counted(server: FakeEndpoint):
    server.script = [fine("[[A]]"), fine("nonsense"), fine(None), failing(400), *[fine("[[A]]")] * 4,
                     *[fine("[[B]]")] * 7, fine("", "content_filter")]  # fmt: skip
    result = alpaca.evaluate(Parrot(), judge_of(server), ALPACA)
    assert result.scores == {"0": 1.0, "4": 1.0, "5": 1.0, "6": 1.0} and result.value == 1.0
    assert result.counts == {"ok": 12, "unparsed": 1, "refused": 2, "error": 1, "unscored": 4}
    assert result.samples[1]["score"] is None and result.samples[1]["verdicts"] == [None, "B"]


def test_without_a_single_verdict_there_is_no_value(server: FakeEndpoint):
    server.reply = lambda _: fine("who knows")
    result = alpaca.evaluate(Parrot(), judge_of(server), ALPACA)
    assert result.value is None and result.scores == {} and result.counts["unscored"] == len(ALPACA)
    json.dumps(asdict(result), allow_nan=False)


def test_mean_lengths_are_reported(server: FakeEndpoint):
    server.reply = lambda _: fine("[[A]]")
    result = alpaca.evaluate(Parrot(lambda _: "x" * 30), judge_of(server), ALPACA)
    assert (result.details["answer_characters"], result.details["reference_characters"]) == (30, len("reference 0"))


def test_answers_are_greedy_and_asked_as_a_chat(server: FakeEndpoint):
    server.reply = lambda _: fine("[[A]]")
    parrot = Parrot()
    alpaca.evaluate(parrot, judge_of(server), ALPACA, max_tokens=9)
    assert parrot.chats == [[{"role": "user", "content": row.instruction}] for row in ALPACA]
    assert parrot.options == [{"until": [], "do_sample": False, "max_gen_toks": 9}] * len(ALPACA)


def test_a_judge_that_dies_half_way_is_resumed(server: FakeEndpoint):
    store = MemoryStore()
    server.script = [*[fine("[[A]]")] * 5, *[failing(500)] * 50]
    with pytest.raises(EndpointError, match="5 of 16 judgements are saved"):
        alpaca.evaluate(Parrot(), judge_of(server, store, retries=0), ALPACA)
    server.script, server.reply = [], lambda _: fine("[[A]]")
    hits = server.hits
    result = alpaca.evaluate(Parrot(), judge_of(server, store, retries=0), ALPACA)
    assert server.hits - hits == 11 and result.value == 0.5
    alpaca.evaluate(Parrot(), judge_of(server, store, retries=0), ALPACA)
    assert server.hits - hits == 11


# ---------------------------------------------------------------- MT-Bench


def rates(prompt: str):
    """Category by category, and the second turn two points below the first."""
    base = {"w": 9, "m": 5, "c": 4}[section(prompt, "Request 1")[0]]
    return fine(f"Reasons.\n[[{base - 2 * ('=== Request 2 ' in prompt)}]]")


def test_ratings_by_turn_and_category(server: FakeEndpoint):
    server.reply = rates
    result = mt_bench.evaluate(Parrot(), judge_of(server), TALKS)
    assert result.scores == {"1.1": 9, "1.2": 7, "2.1": 5, "2.2": 3, "3.1": 4, "3.2": 2}
    assert result.value == 5
    assert result.details["turns"] == {"1": 6, "2": 4}
    assert result.details["categories"] == {"writing": 8, "math": 4, "coding": 3}
    assert result.details["missing_references"] == 1


def test_the_second_turn_is_asked_with_the_first_answer(server: FakeEndpoint):
    server.reply = rates
    parrot = Parrot()
    mt_bench.evaluate(parrot, judge_of(server), TALKS[:1])
    assert parrot.chats[1] == [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "answer to w1"},
        {"role": "user", "content": "w2"},
    ]


def test_the_judge_sees_references_and_both_turns(server: FakeEndpoint):
    server.reply = rates
    mt_bench.evaluate(Parrot(), judge_of(server), TALKS)
    writing, _, first, second, _, coding = server.questions
    assert "eference" not in writing
    assert section(first, "Reference answer to request 1") == "truth m1" and "m2" not in first
    assert (
        section(second, "Answer to request 1") == "answer to m1"
        and section(second, "Answer to request 2") == "answer to m2"
    )
    assert section(second, "Reference answer to request 2") == "truth m2"
    assert "Reference answer to request 2" not in coding


def test_turns_without_a_rating_are_left_out_and_counted(server: FakeEndpoint):
    server.script = [fine("[[8]]"), fine("[[11]]"), fine(None), failing(400), fine("[[2]]"), fine("four")]
    result = mt_bench.evaluate(Parrot(), judge_of(server), TALKS)
    assert result.scores == {"1.1": 8, "3.1": 2} and result.value == 5
    assert result.counts == {"ok": 2, "unparsed": 2, "refused": 1, "error": 1, "unscored": 4}
    assert result.details["categories"] == {"writing": 8, "math": None, "coding": 2}
    assert result.details["turns"] == {"1": 5, "2": None}


def test_mt_bench_is_resumed(server: FakeEndpoint):
    store = MemoryStore()
    server.script = [fine("[[9]]"), fine("[[9]]"), failing(401)]
    with pytest.raises(EndpointError, match="status 401.*2 of 6 judgements are saved"):
        mt_bench.evaluate(Parrot(), judge_of(server, store), TALKS)
    server.reply = lambda _: fine("[[3]]")
    assert mt_bench.evaluate(Parrot(), judge_of(server, store), TALKS).value == 5
    assert server.hits == 3 + 4


def test_answers_are_saved_when_the_judge_dies(server: FakeEndpoint, tokenizer, tmp_path, monkeypatch):
    from tiny_models import fuse, tiny
    from ultrafuser.data.chat_format import BUILTIN
    from ultrafuser.data.templates import Renderer
    from ultrafuser.evaluate.lm.fused import FusionLM
    from ultrafuser.evaluate.lm.response_cache import CachedLM, ResponseCache

    model = fuse([tiny("llama", seed, vocab_size=len(tokenizer), max_position_embeddings=256) for seed in (0, 1)])
    lm = FusionLM(model, Renderer(tokenizer, [BUILTIN["chatml"], BUILTIN["plain"]]))

    def run() -> Any:
        store = ResponseCache(tmp_path / "answers.sqlite", "owner")
        try:
            return mt_bench.evaluate(CachedLM(lm, store), judge_of(server, store), TALKS, max_tokens=4)
        finally:
            store.close()

    server.script = [fine("[[7]]"), failing(401)]
    with pytest.raises(EndpointError, match="1 of 6 judgements are saved"):
        run()
    monkeypatch.setattr(lm, "generate_until", None)  # every answer is there
    server.reply = lambda _: fine("[[7]]")
    assert run().value == 7 and server.hits == 2 + 5


# ---------------------------------------------------------------- rows


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data beside the repository")
def test_the_rows_of_the_shared_data():
    rows = alpaca.load_rows(DATA)
    assert len(rows) == 805 and len({row.id for row in rows}) == 805 and all(row.instruction for row in rows)
    talks = mt_bench.load_rows(DATA)
    assert len(talks) == 80 and all(len(talk.turns) == 2 for talk in talks)
    for talk in talks:
        assert all((text is not None) == (talk.category in mt_bench.WITH_REFERENCE) for text in talk.references)
    references = {talk.id: talk.references for talk in talks}
    assert references["111"] == ("Area is 3", "5pi")  # a model's reference finds 0
    assert references["103"][0] == "Thomas may work at a hospital." and len(references["103"][1]) > 40  # a model's


def hub(monkeypatch, records: Any) -> list[Any]:
    """`datasets.load_dataset` that gives these records (or raises them) and remembers how it was called."""
    import datasets

    calls = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((*args, options))
        if isinstance(records, Exception):
            raise records
        return records

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_alpaca_rows_from_the_hub(monkeypatch):
    record = {"dataset": "koala", "instruction": "i", "output": "o", "generator": "text_davinci_003"}
    calls = hub(monkeypatch, [record])
    assert alpaca.load_rows() == [AlpacaRow("0", "koala", "i", "o")]
    assert calls == [("json", {"split": "train", "data_files": alpaca.HUB_FILE})]


def test_mt_bench_rows_from_the_hub(monkeypatch):
    records = [
        {"prompt_id": 7, "category": "math", "prompt": ["a", "b"], "reference": ["x", "y"]},
        {"prompt_id": 8, "category": "coding", "prompt": ["a", "b"], "reference": ["x"]},
        {"prompt_id": 9, "category": "writing", "prompt": ["a", "b"], "reference": []},
    ]
    calls = hub(monkeypatch, records)
    assert [(row.id, row.references) for row in mt_bench.load_rows()] == [
        ("7", ("x", "y")), ("8", ("x", None)), ("9", (None, None))]  # fmt: skip
    assert calls == [("HuggingFaceH4/mt_bench_prompts", {"split": "train"})]


@pytest.mark.parametrize("error", [OSError("offline"), ValueError("no split"), RuntimeError("a script")])
@pytest.mark.parametrize("benchmark", [alpaca, mt_bench])
def test_a_hub_that_cannot_be_reached(monkeypatch, benchmark, error):
    hub(monkeypatch, error)
    with pytest.raises(DataError, match=f"could not be loaded from the hub .{error}.*--data-dir"):
        benchmark.load_rows()


@pytest.mark.parametrize("benchmark, name", [(alpaca, alpaca.FILE), (mt_bench, mt_bench.REFERENCES)])
def test_a_missing_file_is_named_with_its_folder(tmp_path, benchmark, name):
    with pytest.raises(DataError, match=rf"{tmp_path / name}: cannot be read .*{name} in the folder .*{tmp_path}"):
        benchmark.load_rows(tmp_path)


def write(folder: Path, questions: str, references: str = "") -> Path:
    (folder / mt_bench.QUESTIONS).write_text(questions)
    (folder / mt_bench.REFERENCES).write_text(references)
    return folder


@pytest.mark.parametrize("questions, references, message", [
    ('{"question_id": 1, "category": "math", "turns": ["one"]}', "", ":1: 'turns' is .*'one'.*expected 2 texts"),
    ('{"question_id": 1, "turns": ["one", "two"]}', "", ":1: 'category' is NoneType, expected text"),
    ('{"category": "math", "turns": ["one", "two"]}', "", ":1: got .*expected an object with 'question_id'"),
    (r'{"question_id": 1, "category": "x", "turns": ["\ud83d", "b"]}', "", ":1: holds a lone surrogate, half of a char"),
    ("", "", "mt_bench_questions.jsonl: no rows"),
    ("3", "", ":1: got 3, expected an object"), ("{", "", ":1: not JSON"),
    ("", '{"question_id": 1, "choices": []}', ":1: no .*expected question_id and choices"),
])  # fmt: skip
def test_malformed_mt_bench_files(tmp_path, questions, references, message):
    with pytest.raises(DataError, match=message):
        mt_bench.load_rows(write(tmp_path, questions, references))


@pytest.mark.parametrize("text, message", [
    ("[", "not JSON"), ("3", "expected a JSON list of rows, got int"), ("", "no rows"), ("{}", "'instruction' is NoneType"),
    ('[{"instruction": "i"}]', r"\[0\]: 'output' is NoneType, expected text"),
    (r'[{"instruction": "\ud83d", "output": "b"}]', r"\[0\]: holds a lone surrogate, half of a character"),
    ("[3]", r"\[0\]: 'instruction' is NoneType"),
])  # fmt: skip
def test_malformed_alpaca_files(tmp_path, text, message):
    (tmp_path / alpaca.FILE).write_text(text)
    with pytest.raises(DataError, match=message):
        alpaca.load_rows(tmp_path)


def test_zero_samples(server: FakeEndpoint):
    for benchmark, rows, limit in ((alpaca, ALPACA, 0), (alpaca, [], None), (mt_bench, TALKS, 0)):
        with pytest.raises(DataError, match="zero samples"):
            benchmark.evaluate(Parrot(), judge_of(server), rows, limit=limit)
    assert server.hits == 0
