"""Outputs are checked before the work, appear whole or not at all, and errors of the disk name the file."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from disks import UNWRITABLE, file_limit, unwritable
from ultrafuser.data.files import (
    allocate,
    atomic_file,
    atomic_files,
    check_folder,
    check_target,
    disk_errors,
    disk_problem,
    make_folder,
    run_folder,
    write_json,
)
from ultrafuser.data.schema import Row
from ultrafuser.data.writing import row_writer
from ultrafuser.errors import DataError, DiskError


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(kind, folder, tmp_path):
    with unwritable(kind, tmp_path, folder=folder) as (target, words):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DataError, match=words):
            check_folder(target) if folder else check_target(target, force=True)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_check_leaves_nothing_behind(tmp_path):
    check_target(tmp_path / "a" / "b" / "out.json", force=False)
    check_folder(tmp_path / "c" / "d")
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_in_place(tmp_path):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    check_target(link, force=True)
    write_json(link, {"a": 1})
    assert link.is_symlink() and Path("/dev/null").is_char_device()
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(
        DiskError, match="full: could not be written: the disk is full. Nothing was changed. Free space"
    ):
        write_json(full, {"a": 1})


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_disk_that_fills_while_rows_are_written_leaves_the_old_file(suffix, tmp_path):
    target = tmp_path / f"out{suffix}"
    target.write_text("old")
    rows = [Row(str(n), "text", (("user", f"{n:x} " * 40), ("assistant", f"{n * n:x} " * 40))) for n in range(3000)]
    with file_limit(30_000), pytest.raises(DiskError, match=f"out{suffix}: could not be written: the file is larger"):
        with row_writer(target, force=True) as write:
            for row in rows:
                write(row)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_several_files_appear_together_or_not_at_all(tmp_path):
    targets = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(KeyboardInterrupt), atomic_files(targets) as drafts:
        drafts[0].write_text("new")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), atomic_files([tmp_path / "new" / "a", tmp_path / "new" / "b" / "c"]):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with atomic_files(targets) as drafts:
        for draft in drafts:
            draft.write_text("new")
        assert not any(target.exists() for target in targets)
    assert sorted(tmp_path.iterdir()) == targets


def test_a_run_that_wrote_nothing_leaves_no_folders(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for folder in old, old / "new" / "run", tmp_path / "new" / "run":
        with pytest.raises(ValueError, match="refused"), run_folder(folder):
            assert folder.is_dir()
            raise ValueError("refused")
    assert [*tmp_path.rglob("*")] == [old]
    with pytest.raises(ValueError, match="refused"), run_folder(old / "new" / "run"):
        (old / "new" / "file").touch()
        raise ValueError("refused")
    assert [*old.rglob("*")] == [old / "new", old / "new" / "file"]


def test_drafts_of_dead_processes_are_removed_and_those_of_living_ones_stay(dead_pid, tmp_path):
    living = tmp_path / f".out.json.{os.getppid()}.tmp"
    other = tmp_path / f".other.json.{dead_pid}.tmp"
    foreign = tmp_path / ".out.json.tmp"
    for file in (tmp_path / f".out.json.{dead_pid}.tmp", living, other, foreign):
        file.write_text("half")
    (tmp_path / f".out.json.{dead_pid}.uneven").write_text("half")
    write_json(tmp_path / "out.json", {})
    assert set(tmp_path.iterdir()) == {tmp_path / "out.json", living, other, foreign}
    (tmp_path / f".fused.{dead_pid}.tmp").mkdir()
    make_folder(tmp_path)
    assert set(tmp_path.iterdir()) == {tmp_path / "out.json", living, foreign}


def test_a_target_with_glob_characters_has_its_own_drafts(dead_pid, tmp_path):
    own, other = tmp_path / f".a[b]*.{dead_pid}.tmp", tmp_path / f".ab.{dead_pid}.tmp"
    own.write_text("")
    other.write_text("")
    write_json(tmp_path / "a[b]*", {})
    assert set(tmp_path.iterdir()) == {tmp_path / "a[b]*", other}


def test_allocated_blocks_are_on_the_disk(tmp_path):
    allocate(tmp_path / "file", 100_000)
    status = (tmp_path / "file").stat()
    assert status.st_size == 100_000 and status.st_blocks * 512 >= 100_000
    with file_limit(50_000), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        allocate(tmp_path / "other", 100_000)


def test_errors_of_every_library_are_read(tmp_path):
    import torch
    from safetensors.torch import save_file

    values = {"a": torch.zeros(50_000)}
    with file_limit(100_000):
        with pytest.raises(DiskError, match="torch.pt: could not be written: the disk is full, or not writable"):
            with disk_errors(tmp_path / "torch.pt"):
                torch.save(values, tmp_path / "torch.pt")
        with pytest.raises(DiskError, match="weights: could not be written: the file is larger than the limit"):
            with disk_errors(tmp_path / "weights"):
                save_file(values, tmp_path / "weights")
    assert disk_problem(SafetensorError("Error while deserializing header: incomplete metadata")) is None
    assert disk_problem(RuntimeError("shape mismatch")) is None
    with pytest.raises(RuntimeError, match="shape"), disk_errors(tmp_path):
        raise RuntimeError("shape mismatch")
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "out"):
        json.loads((tmp_path / "missing").read_text())
