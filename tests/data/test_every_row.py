"""Whatever the layouts, encodings and files of a folder: every row is read, or its file and line are named. None vanishes."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import RowReader
from ultrafuser.data.tools.streaming import convert
from ultrafuser.data.tools.validate import validate
from ultrafuser.errors import DataError

pa = pytest.importorskip("pyarrow")
Messages = tuple[tuple[str, str], ...]

# ---------------------------------------------------------------- rows

LAYOUTS: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "messages": lambda s, q, a: {"messages": [message("system", s), message("user", q), message("assistant", a)]},
    "parts": lambda s, q, a: {
        "messages": [message("user", parts(q)), message("assistant", parts(a))],
        "system": s,
    },
    "sharegpt": lambda s, q, a: {
        "system": s,
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}],
    },
    "alpaca": lambda s, q, a: {"instruction": q, "input": "", "output": a, "system": s, "history": []},
    "trl": lambda s, q, a: {
        "prompt": [message("system", s), message("user", q)],
        "completion": [message("assistant", a)],
    },
    "pair": lambda s, q, a: {"system_prompt": s, "question": q, "response": a},
}  # fmt: skip
FLAT = ("alpaca", "pair")  # fit into CSV


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def cleaned(text: str) -> str:
    """The slow and obvious form of `clean`."""
    lines = text.rstrip().split("\n")
    while not lines[0].strip():
        del lines[0]
    text = "\n".join(lines)
    return text[1:] if text[0].isspace() and text[0] != "\t" and not text[1].isspace() else text


CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x00")
SPECIAL = st.sampled_from(
    [
        *"\n\r\t ,;\"'\\{}[]#",
        "\r\n",
        "\u2028",
        "\x85",
        "\ufeff",
        "é",
        "हूँ",
        "👩🏽‍💻",
        "\U0010ffff",
        "\x1c",
        "    return x",
    ]
)
TEXTS = st.lists(st.one_of(CHARACTERS, SPECIAL), min_size=1, max_size=12).map("".join).filter(lambda text: text.strip())

JSON_FAULTS = ("missing", "empty", "surrogate", "bool", "part", "list", "deep")
LINE_FAULTS = ("not JSON", "not UTF-8", "digits", "cut")
CSV_FAULTS = ("empty", "surplus", "few", "unclosed", "not UTF-8")
FAULTS = {
    "jsonl": JSON_FAULTS + LINE_FAULTS, "json": JSON_FAULTS, "json lines": JSON_FAULTS + LINE_FAULTS,
    "csv": CSV_FAULTS, "parquet": ("empty", "null"), "arrow": ("empty", "null"), "saved": ("empty", "null"),
}  # fmt: skip


@dataclass
class Spec:
    """A row to write: good, or with a fault."""

    layout: str
    texts: tuple[str, str, str]
    fault: str | None

    def record(self) -> dict[str, Any]:
        system, question, answer = self.texts
        return {"domain": "d", **LAYOUTS[self.layout](system, question, answer)}

    @property
    def messages(self) -> Messages:
        return tuple(zip(("system", "user", "assistant"), map(cleaned, self.texts), strict=True))


@dataclass
class File:
    """A file to write."""

    kind: str
    rows: list[Spec]
    compression: str
    folder: str
    bom: bool
    newline: str
    blank_lines: bool


@st.composite
def files(draw: st.DrawFn) -> File:
    kind = draw(st.sampled_from(sorted(FAULTS)))
    columnar = kind in ("parquet", "arrow", "saved")
    layouts = st.sampled_from(FLAT if kind == "csv" else sorted(LAYOUTS))
    shared = draw(layouts)
    fault = st.one_of(st.none(), st.none(), st.sampled_from(FAULTS[kind]))
    spec = st.builds(
        Spec, st.just(shared) if columnar or kind == "csv" else layouts, st.tuples(TEXTS, TEXTS, TEXTS), fault
    )
    return File(
        kind,
        draw(st.lists(spec, min_size=1, max_size=6)),
        "" if columnar else draw(st.sampled_from(["", "", ".gz", ".zst", ".bz2", ".xz", ".GZ"])),
        draw(st.sampled_from(["", "sub", "sub/deep"])),
        draw(st.booleans()),
        draw(st.sampled_from(["\n", "\r\n"])),
        draw(st.booleans()),
    )


# ---------------------------------------------------------------- written, with the location of every row


def faulty(spec: Spec) -> bytes:
    """A record with a fault, as JSON."""
    record = spec.record()
    answer = next(key for key in ("messages", "conversations", "completion", "output", "response") if key in record)
    broken: dict[str | None, Any] = {
        "empty": " \n\t ", "surrogate": "half \ud83d", "bool": True, "part": [{"type": "image", "image": "x.png"}],
        "null": None,
    }  # fmt: skip
    if spec.fault == "missing":
        del record[answer]
    elif spec.fault in broken:
        value = broken[spec.fault]
        if isinstance(record[answer], list):
            record[answer] = [dict(turn) for turn in record[answer]]
            content = parts(value) if spec.layout == "parts" and isinstance(value, str) else value
            record[answer][-1]["value" if answer == "conversations" else "content"] = content
        else:
            record[answer] = value
    elif spec.fault == "deep":
        record["deep"] = json.loads("[" * 200 + "]" * 200)
    text = json.dumps(record if spec.fault != "list" else [record])
    if spec.fault == "digits":
        text = text[:-1] + ', "n": ' + "7" * 5000 + "}"
    elif spec.fault == "cut":
        text = text[:-1]
    elif spec.fault == "not JSON":
        text = "{'x': 1}"
    return text.encode() if spec.fault != "not UTF-8" else b'{"prompt": "\xe9"}'


def json_lines(file: File, path: Path) -> tuple[bytes, list[str]]:
    end = file.newline.encode()
    content, locations = [], []
    for spec in file.rows:
        if file.blank_lines:
            content.append(b" " if file.newline == "\n" else b"")
        content.append(faulty(spec))
        locations.append(f"{path}:{len(content)}")
    return end.join(content) + (end if file.blank_lines else b""), locations


def json_list(file: File, path: Path) -> tuple[bytes, list[str]]:
    separator = f",{file.newline}".encode() if file.blank_lines else b","
    return b"[" + separator.join(map(faulty, file.rows)) + b"]", [f"{path}[{i}]" for i in range(len(file.rows))]


def csv_table(file: File, path: Path) -> tuple[bytes, list[str]]:
    columns = list(file.rows[0].record())
    columns = [column for column in columns if column != "history"]
    stream, locations = io.StringIO(newline=""), []
    table = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator=file.newline)
    table.writerow(columns)
    for spec in file.rows:
        if file.blank_lines:
            stream.write(file.newline)
        locations.append(f"{path}:{len(list(io.StringIO(stream.getvalue(), newline=''))) + 1}")
        record = spec.record()
        cells = [record[column] for column in columns]
        if spec.fault == "empty":
            cells = ["d" if column == "domain" else "" for column in columns]
        elif spec.fault == "surplus":
            cells.append("more")
        elif spec.fault == "few":
            cells.pop()
        if spec.fault == "unclosed":
            stream.write(f'd,"never closed{file.newline}')
        elif spec.fault == "not UTF-8":
            stream.write(",".join(["\udce9"] * len(columns)) + file.newline)
        else:
            table.writerow(cells)
    return stream.getvalue().encode("utf-8", "surrogateescape"), locations


def arrow_table(file: File) -> Any:
    records = []
    for spec in file.rows:
        records.append(json.loads(faulty(spec)) if spec.fault else spec.record())
    return pa.Table.from_pylist(records)


def write(file: File, root: Path, index: int) -> list[str]:
    """Write a file, and return the location of each of its rows."""
    suffix = {"json lines": "json", "saved": "set"}.get(file.kind, file.kind)
    path = root / file.folder / f"{index:02}.{suffix}{file.compression}"
    path.parent.mkdir(parents=True, exist_ok=True)
    by_index = [f"{path}[{i}]" for i in range(len(file.rows))]
    if file.kind == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(arrow_table(file), path, row_group_size=2)
        return by_index
    if file.kind == "arrow":
        table = arrow_table(file)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return by_index
    if file.kind == "saved":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset(arrow_table(file)).save_to_disk(path)
        return by_index
    layouts = {"jsonl": json_lines, "json lines": json_lines, "json": json_list, "csv": csv_table}
    content, locations = layouts[file.kind](file, path)
    if file.bom:
        content = b"\xef\xbb\xbf" + content
    zstd = pa.Codec("zstd")
    compress = {
        "": bytes, ".gz": gzip.compress, ".GZ": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
        ".zst": lambda content: zstd.compress(content, asbytes=True),
    }  # fmt: skip
    path.write_bytes(compress[file.compression](content))
    return locations


def repaired(file: File) -> File:
    """A file without what no reader can tell: quotes that would close a quote that was left open, and JSON Lines in `.json`
    whose first line does not show that they are lines."""
    if file.kind == "csv" and any(spec.fault == "unclosed" for spec in file.rows):
        for spec in file.rows:
            spec.texts = tuple((text.replace('"', "") if text.replace('"', "").strip() else "x") for text in spec.texts)  # type: ignore[assignment]
    if file.kind == "json lines" and (len(file.rows) == 1 or file.rows[0].fault in (*LINE_FAULTS, "list")):
        file.kind = "jsonl"
    return file


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(written=st.lists(files().map(repaired), min_size=1, max_size=4))
def test_every_row_is_read_or_named(written, tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    (root / "notes.txt").write_text("no rows")
    good: list[tuple[str, Messages]] = []
    bad: list[str] = []
    locations: list[str] = []
    for index, file in sorted(enumerate(written), key=lambda pair: order(*pair)):
        rows = write(file, root, index)
        locations += rows
        good += [(location, spec.messages) for spec, location in zip(file.rows, rows, strict=True) if not spec.fault]
        bad += [location for spec, location in zip(file.rows, rows, strict=True) if spec.fault]

    reader = RowReader("skip")
    rows_read: list[Row] = []
    if good:
        rows_read = list(reader.read(str(root)))
    else:
        with pytest.raises(DataError, match=f"no rows, all {len(bad)} are bad"):
            list(reader.read(str(root)))
    assert [row.messages for row in rows_read] == [messages for _, messages in good]
    assert [row["where"] for row in reader.bad_rows] == bad
    assert reader.unread_files == [root / "notes.txt"]

    findings = validate([str(root)])
    assert {problem["where"] for problem in findings.problems} == set(bad)
    assert (findings.rows, findings.bad_rows) == (len(locations), len(bad))
    if bad:
        with pytest.raises(DataError) as error:
            list(RowReader().read(str(root)))
        assert str(error.value).startswith(f"{bad[0]}: ")
    if good:
        suffix = ("jsonl", "json", "parquet")[len(locations) % 3]
        output = root.with_suffix(f".{suffix}")
        assert convert([str(root)], output, reader=RowReader("skip"), force=True) == len(good)
        assert list(RowReader().read(str(output))) == rows_read


def order(index: int, file: File) -> tuple[Any, ...]:
    """Files are read in the order of their names, folder by folder."""
    return (*(name for name in file.folder.split("/") if name), f"{index:02}")
