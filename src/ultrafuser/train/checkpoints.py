"""The checkpoints of a stage: which of them are complete, and the one to resume from."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from ultrafuser.progress import Progress

_STATE = "trainer_state.json"  # the Trainer writes it last
_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", _STATE)


def last_checkpoint(folder: Path, progress: Progress) -> str | None:
    """The last complete checkpoint of a stage. Incomplete ones, which a killed process left, are removed and logged."""
    if PartialState().is_main_process and folder.is_dir():
        drafts = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
        incomplete = {draft: problem for draft in drafts if (problem := find_problem(draft))}
        for draft in incomplete:
            shutil.rmtree(draft)
        checkpoint = get_last_checkpoint(str(folder))
        for draft, problem in sorted(incomplete.items()):
            source = Path(checkpoint).name if checkpoint else "the start of the stage"
            progress.log(f"{draft}: incomplete ({problem}), removed. Resuming from {source}")
    PartialState().wait_for_everyone()
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def find_problem(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is missing or torn, and how. None: the checkpoint is complete."""
    for name in _FILES:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    if not list(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    for file in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        if not _is_whole(file):
            return f"{file.name} is torn"
    return None


def _is_whole(file: Path) -> bool:
    """Whether a file ends where its format says that it ends. The weights are not read."""
    if file.suffix == ".json":
        try:
            return isinstance(json.loads(file.read_bytes()), dict)
        except ValueError:
            return False
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):  # compares the header with the size of the file
                return True
        except SafetensorError:
            return False
    if file.suffix in (".pt", ".pth", ".bin"):  # torch.save writes the directory of a ZIP archive last
        return zipfile.is_zipfile(file)
    return True
