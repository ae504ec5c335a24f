"""The map of a data set: vectors are true means, the page holds the rows and nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_models import fuse, tiny
from ultrafuser.data.schema import Row
from ultrafuser.datamap import layout as maps
from ultrafuser.datamap.embed import Reader, embed, load_reader
from ultrafuser.datamap.layout import Point
from ultrafuser.datamap.page import map_figure, map_page
from ultrafuser.display.page import text_file
from ultrafuser.errors import CheckpointError, DataError, MissingExtraError

SCRIPT = text_file("datamap/templates/map.js")
TEXTS = ["how many?", "The quick brown fox jumps over the lazy dog", "", "def add(a, b):\n    return a + b"]


# ---------------------------------------------------------------- vectors


@pytest.fixture
def reader_folder(save, tokenizer) -> Path:
    folder = save("reader", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder


def plain_mean(folder, tokenizer, text, limit=None):
    from transformers import AutoModel

    ids = tokenizer.encode(text, add_special_tokens=False)[:limit]
    with torch.no_grad():
        return AutoModel.from_pretrained(folder)(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_vector_is_the_mean_state_of_its_own_tokens(reader_folder, tokenizer, batch_size):
    reader = load_reader(str(reader_folder), device="cpu")
    vectors = embed(reader, TEXTS, batch_size=batch_size)
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    for index in (0, 1, 3):
        np.testing.assert_allclose(vectors[index], plain_mean(reader_folder, tokenizer, TEXTS[index]), atol=2e-5)


def test_long_texts_are_cut(reader_folder, tokenizer):
    reader = load_reader(str(reader_folder), device="cpu")
    [vector] = embed(reader, ["a b " * 400], max_tokens=7)
    np.testing.assert_allclose(vector, plain_mean(reader_folder, tokenizer, "a b " * 400, 7), atol=2e-5)
    assert np.isfinite(embed(reader, ["a b " * 400], max_tokens=10_000)).all()  # more than its context of 64


def test_a_fused_model_gives_the_states_of_all_its_specialists(tokenizer, tmp_path, reader_folder):
    from ultrafuser.datamap.embed import _ours

    first, second = tiny(seed=0, vocab_size=len(tokenizer)), tiny(seed=1, vocab_size=len(tokenizer))
    reader = _ours(fuse([first, second], vocab_size=len(tokenizer)), tokenizer)
    vectors = embed(reader, TEXTS)
    assert vectors.shape == (4, 64)
    np.testing.assert_allclose(vectors[1, :32], plain_mean(reader_folder, tokenizer, TEXTS[1]), atol=2e-5)


def test_a_base_with_an_adapter(save, tokenizer, tmp_path):
    from tiny_models import save_adapter

    folder = save("base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    adapter = save_adapter(tiny(vocab_size=len(tokenizer)), tmp_path / "lora", seed=3)
    changed = embed(load_reader(f"{folder}+{adapter}", device="cpu"), TEXTS)
    plain = embed(load_reader(str(folder), device="cpu"), TEXTS)
    assert changed.shape == plain.shape and np.abs(changed[1] - plain[1]).max() > 1e-3


def test_special_tokens_are_for_models_that_know_a_class_token():
    class Tokens:
        pad_token_id, eos_token_id = 0, None

        def __init__(self, cls):
            self.cls_token_id, self.asked = cls, None

        def __call__(self, texts, **options):
            self.asked = options["add_special_tokens"]
            return {"input_ids": [[5, 6] for _ in texts]}

    for cls, expected in ((None, False), (101, True)):
        tokens = Tokens(cls)
        embed(Reader(tokens, lambda ids, mask: ids[..., None].float(), 10), ["a"])
        assert tokens.asked is expected


def test_no_model_there(tmp_path):
    with pytest.raises(CheckpointError, match="has no weights"):
        load_reader(str(tmp_path), device="cpu")
    with pytest.raises(CheckpointError, match="no model that can read text"):
        load_reader(str(tmp_path / "absent"), device="cpu")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("model.safetensors", "cut", "no model that can read text: SafetensorError"),
        ("config.json", '{"model_type": "lla', "config.json"),
        ("tokenizer.json", "{", "no model that can read text"),
        ("model.safetensors.index.json", "null", "no index of weights"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "a.bin"}}', "names pickled weights"),
    ],
)
def test_a_broken_or_hostile_model(reader_folder, file, text, words):
    (reader_folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        load_reader(str(reader_folder), device="cpu")


def test_states_that_are_not_finite(reader_folder):
    reader = load_reader(str(reader_folder), device="cpu")
    broken = Reader(reader.tokenizer, lambda ids, mask: reader.states(ids, mask) * float("nan"), 10)
    with pytest.raises(CheckpointError, match="not finite for the text 'fox'"):
        embed(broken, ["fox"])


# ---------------------------------------------------------------- positions


def row(name, domain, question="Q"):
    return Row(
        name, domain, (("system", "S"), ("user", question), ("assistant", "A"), ("user", "Q2"), ("assistant", "A2"))
    )


def test_the_sample_does_not_depend_on_the_order():
    rows = [row(f"{domain}{n}", domain) for domain in ("text", "code") for n in range(20)]
    first = maps.sample(rows, 5, seed=1)
    assert [entry.domain for entry in first] == ["code"] * 5 + ["text"] * 5
    assert maps.sample(rows[::-1], 5, seed=1) == first != maps.sample(rows, 5, seed=2)
    assert len(maps.sample(rows, 100)) == 40


def test_what_is_read_of_a_row():
    assert maps.text_of(row("a", "text"), "instructions") == "Q\n\nQ2"
    assert maps.text_of(row("a", "text"), "answers") == "A\n\nA2"
    assert maps.text_of(row("a", "text"), "conversation") == "S\n\nQ\n\nA\n\nQ2\n\nA2"


def clouds(size=30):
    rng = np.random.default_rng(0)
    centres = {"text": np.zeros(60), "code": np.full(60, 8.0)}
    vectors = np.concatenate([rng.normal(centre, 1, (size, 60)) for centre in centres.values()])
    return vectors.astype(np.float32), [domain for domain in centres for _ in range(size)]


def test_domains_that_lie_apart_do_so_on_the_map_and_in_the_numbers():
    pytest.importorskip("sklearn")
    vectors, domains = clouds()
    reduced = maps.principal(vectors)
    assert reduced.shape == (60, 50)
    positions = maps.lay_out(reduced)
    assert positions.shape == (60, 2)
    np.testing.assert_array_equal(positions, maps.lay_out(reduced))  # the seed decides
    assert maps.neighbour_agreement(reduced, domains) == {"code": 1.0, "text": 1.0}
    assert set(maps.neighbour_agreement(positions, domains).values()) == {1.0}
    mixed = maps.neighbour_agreement(reduced, domains[::2] + domains[1::2])
    assert all(value < 0.9 for value in mixed.values())


def test_umap_keeps_domains_apart_too():
    pytest.importorskip("sklearn")
    pytest.importorskip("umap", reason="the umap extra is not installed")
    vectors, domains = clouds()
    positions = maps.lay_out(maps.principal(vectors), "umap")
    assert positions.shape == (60, 2)
    assert set(maps.neighbour_agreement(positions, domains).values()) == {1.0}


def test_few_rows_are_enough():
    pytest.importorskip("sklearn")
    reduced = maps.principal(np.random.default_rng(0).normal(size=(5, 3)))
    assert maps.lay_out(reduced).shape == (5, 2)
    with pytest.raises(DataError, match="a map of 4 rows: expected at least 5"):
        maps.principal(np.zeros((4, 3)))
    with pytest.raises(DataError, match="method 'pca': expected one of tsne, umap"):
        maps.lay_out(reduced, "pca")


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(MissingExtraError, match=r'scikit-learn.*"ultrafuser\[data\]"'):
        maps.principal(np.zeros((9, 3)))
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtraError, match=r'umap-learn.*"ultrafuser\[umap\]"'):
        maps.lay_out(np.zeros((9, 3)), "umap")


# ---------------------------------------------------------------- drawing


EVIL = "</script><script>alert(1)</script><!-- \u2028 & \x1b[31m"
POINTS = [
    Point("a", "text", "First", -1.0, 0.5),
    Point("b", "co<de>", EVIL, 2.0, 0.5),
    Point("c", "text", "word " * 200, 0.0, 3.5),
]


def make_page(points=POINTS):
    agreement = {point.domain: 0.5 for point in points}
    return map_page(points, model="m<1>", method="tsne", content="instructions", agreement=agreement)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="uf-map-data">(.*?)</script>', page, re.S)[1])


def test_the_page_holds_every_row_and_its_place():
    data = data_of(make_page())
    assert data["domains"] == ["co<de>", "text"] and len(data["colours"]) == 2
    assert [point[:4] for point in data["points"]] == [[0, 0, 1, "a"], [10_000, 0, 0, "b"], [3333, 10_000, 1, "c"]]
    assert data["points"][1][4] == EVIL.replace("\x1b", "␛")
    assert len(data["points"][2][4]) <= 400 and data["points"][2][4].endswith("…")


def test_no_row_gets_out_of_the_data_and_nothing_is_loaded():
    page = make_page()
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "alert(1)</script>" not in page and "<de>" not in page and "<1>" not in page
    assert not re.search(r"(?:src|href)=\"(?!#|data:)|https?://|@import|url\(", page)
    allowed = re.search(r"script-src '(sha256-[^']+)'", page)[1]
    run = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    assert run == SCRIPT
    assert allowed == "sha256-" + base64.b64encode(hashlib.sha256(run.encode()).digest()).decode()
    assert page == make_page()


def test_equal_places_and_one_domain_draw_too():
    data = data_of(make_page([Point(str(n), "text", "x", 1.0, 1.0) for n in range(5)]))
    assert [point[:2] for point in data["points"]] == [[0, 0]] * 5


def test_the_picture_has_a_point_for_each_row_in_its_domains_colour():
    pytest.importorskip("matplotlib")
    from matplotlib import colors

    from ultrafuser.display.palette import domain_colours

    figure = map_figure(POINTS)
    [cloud] = figure.axes[0].collections
    assert cloud.get_offsets().tolist() == [[-1.0, 0.5], [2.0, 0.5], [0.0, 3.5]]
    shades = domain_colours(["co<de>", "text"], [])
    assert [colors.to_hex(face) for face in cloud.get_facecolors()] == [
        shades["text"],
        shades["co<de>"],
        shades["text"],
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["co<de>", "text"]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to read the script with")
def test_the_script_is_javascript(tmp_path):
    (tmp_path / "map.js").write_text(SCRIPT, encoding="utf-8")
    subprocess.run(["node", "--check", str(tmp_path / "map.js")], check=True, capture_output=True, timeout=60)
