"""Packed rows are the rows that were packed, whatever is in them, and are rendered alike by one process or several."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrafuser.data import rendering
from ultrafuser.data.packed import (
    PackedRows,
    SampledRows,
    digest_of,
    domains_of,
    is_whole,
    label_counts_of,
    lengths_of,
    pack,
    write_packed,
)
from ultrafuser.data.rendering import render_packed
from ultrafuser.data.schema import Row
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import DataError, DiskError

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12).map(tuple)


@st.composite
def rendered_rows(draw, size):
    """Rows of K sequences with several answers. Half of the rows have equal sequences."""
    sequences = draw(st.one_of(TOKENS.map(lambda ids: (ids,) * size), st.tuples(*[TOKENS] * size)))
    num_labels = draw(st.integers(1, min(map(len, sequences))))
    index = tuple(tuple(sorted(draw(st.permutations(range(len(ids))))[:num_labels])) for ids in sequences)
    labels = draw(st.lists(st.integers(0, 2**31 - 1), min_size=num_labels, max_size=num_labels))
    row_id = draw(st.text())  # any text, with line breaks and lone surrogates
    return Rendered(
        row_id, draw(st.sampled_from(["text", "co\nde"])), sequences, index, tuple(labels), draw(st.integers(0, 9))
    )


@given(data=st.data(), count=st.integers(1, 6), seed=st.integers(0, 3))
def test_a_sample_of_the_response_tokens(data, count, seed):
    rows = data.draw(st.lists(rendered_rows(2), max_size=4))
    sampled = SampledRows(rows, count, seed)
    assert (domains_of(sampled), lengths_of(sampled)) == (domains_of(rows), lengths_of(rows))
    assert label_counts_of(sampled) == [len(row.labels) for row in sampled]
    assert list(sampled) == list(SampledRows(rows, count, seed)) == list(sampled[:])
    for row, whole in zip(sampled, rows, strict=True):
        assert len(row.labels) == min(count, len(whole.labels)) and row.input_ids == whole.input_ids
        picked = list(zip(*row.response_index, row.labels, strict=True))
        rest = iter(zip(*whole.response_index, whole.labels, strict=True))
        assert all(token in rest for token in picked), "a part of the row's tokens, in their order"
    assert digest_of(sampled) != digest_of(rows) and digest_of(sampled) != digest_of(SampledRows(rows, count + 1, seed))


def test_samples_differ_by_row_and_seed():
    row = Rendered("a", "text", (tuple(range(60)),), (tuple(range(50)),), tuple(range(1, 51)))
    drawn = {sampled.labels for seed in (0, 1) for sampled in SampledRows([row, row], 10, seed)}
    assert len(drawn) == 4


@given(data=st.data(), size=st.integers(1, 4), num_chunks=st.integers(1, 3))
def test_any_rows_come_back_as_they_were(tmp_path_factory, data, size, num_chunks):
    folder = tmp_path_factory.mktemp("packed")
    chunks = [data.draw(st.lists(rendered_rows(size), max_size=4)) for _ in range(num_chunks)]
    rows = [row for chunk in chunks for row in chunk]
    packed = write_packed((pack(chunk, size) for chunk in chunks), folder)
    assert list(packed) == rows and packed[1:] == rows[1:] and len(packed) == len(rows)
    for question in (domains_of, lengths_of, label_counts_of):
        assert question(packed) == question(rows)
    again = write_packed([pack(rows, size)], folder / "again")
    assert digest_of(again) == digest_of(packed)
    if rows:
        assert packed[-1] == rows[-1]
        assert digest_of(write_packed([pack(rows[:-1], size)], folder / "fewer")) != digest_of(packed)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted():
        yield pack([Rendered("a", "text", ((1, 2),), ((0,),), (2,))], 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_packed(interrupted(), tmp_path / "rows")
    assert not (tmp_path / "rows").exists() and not is_whole(tmp_path / "rows")
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        write_packed([], tmp_path / "file" / "rows")


# ---------------------------------------------------------------- several processes


@pytest.fixture
def renderer(tokenizer):
    return Renderer(tokenizer, [tokenizer.chat_template, "{% for m in messages %}{{ m['content'] }}{% endfor %}"], 64)


def rows(count, content="how many {i}?"):
    return [
        Row(f"r{i}", ("text", "code")[i % 2], (("user", content.format(i=i)), ("assistant", "ok " * (i % 5 + 1))))
        for i in range(count)
    ]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(rendering, "_ROWS_PER_CHUNK", 4)
    monkeypatch.setattr(rendering, "_CHUNKS_ALONE", 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_and_counts_do_not_depend_on_the_number_of_processes(renderer, tmp_path, small_chunks, workers):
    source = rows(30) + rows(3, "word " * 80)  # the last ones do not fit
    expected, stats = renderer.render_all(source)
    packed, counts = render_packed(renderer, iter(source), tmp_path / "rows", workers=workers)
    assert list(packed) == expected and counts == stats and stats.dropped_rows == 3
    assert isinstance(packed, PackedRows) and list(PackedRows(tmp_path / "rows")) == expected


def test_reading_does_not_run_ahead_of_rendering(renderer, tmp_path, small_chunks, monkeypatch):
    read, ahead = [], []
    render = rendering.write_packed

    def watch(chunks, folder):
        def counted():
            for i, chunk in enumerate(chunks):
                ahead.append(len(read) - 4 * i)
                yield chunk

        return render(counted(), folder)

    monkeypatch.setattr(rendering, "write_packed", watch)
    render_packed(renderer, (read.append(row) or row for row in rows(200)), tmp_path / "rows", workers=2)
    assert max(ahead) <= 4 * (2 * 2 + 2)


def test_a_bad_row_in_another_process_is_the_same_error(renderer, tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(renderer.formats[1], "table_rows", 1)  # an embedding table that no token fits into
    with pytest.raises(DataError, match=r"row 'r0': specialist 'model' has no row in its embedding table"):
        render_packed(renderer, rows(30), tmp_path / "rows", workers=2)
    assert not (tmp_path / "rows").exists()
    bad_rows: list = []
    with pytest.raises(DataError, match=r"none of 30 rows can be read"):
        render_packed(renderer, rows(30), tmp_path / "rows", workers=2, bad_rows=bad_rows)
    assert [row["where"] for row in bad_rows] == [f"row 'r{i}'" for i in range(30)]


def be_killed(rows):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_an_error_with_a_next_step(renderer, tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(rendering, "_work", be_killed)
    with pytest.raises(DataError, match=r"was killed.*data\.workers=1"):
        render_packed(renderer, rows(30), tmp_path / "rows", workers=2)
    assert not (tmp_path / "rows").exists()
