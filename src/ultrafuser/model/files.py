"""The files of a model folder: those that make the model, and links that lead out of the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .errors import CheckpointError

if TYPE_CHECKING:
    import torch

WEIGHTS = ("*.safetensors", "*.gguf")
WEIGHTS_FILE, INDEX_FILE, ADAPTER_FILE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
# Configuration, tokenizer and chat templates. A repository may hold much more, such as the weights in other formats.
METADATA = (
    *("config.json", "generation_config.json", "adapter_config.json", INDEX_FILE),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "tokenizer.model.v*", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
CODE = ("*.py",)
_SAFE = "Expected *.safetensors (load it once with transformers from a source you trust, then save_pretrained)"


def model_files(folder: Path, *, gguf_file: str | None = None, code: bool = False) -> list[Path]:
    """The files that make a model or an adapter.

    Args:
        code: also the Python files.
    """
    patterns = (*METADATA, *(CODE if code else ()))
    metadata = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(metadata.union([folder / gguf_file] if gguf_file else weight_files(folder)))


def weight_files(folder: Path) -> list[Path]:
    """The weights that transformers or PEFT read: one file or the files of the index, and those of an adapter."""
    names = [name for name in (WEIGHTS_FILE, ADAPTER_FILE) if (folder / name).is_file()]
    if WEIGHTS_FILE not in names and (folder / INDEX_FILE).is_file():
        names += read_index(folder / INDEX_FILE)
    if names:
        return sorted(folder / name for name in names)
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    return [file for file in files if not file.name.startswith("consolidated")]  # the same weights in another format


def read_index(file: Path) -> list[str]:
    """The weight files that an index names.

    Raises:
        CheckpointError: a broken index, or one that names pickled weights or files outside of the folder.
    """
    try:
        shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or JSON of another form
        raise CheckpointError(
            f"{file}: no index of weights ({type(error).__name__}: {error}). Expected JSON with a mapping 'weight_map'. Is it "
            "half written? Download it again"
        ) from error
    if pickled := [str(name) for name in shards if not str(name).endswith(".safetensors")]:
        raise CheckpointError(f"{file}: names pickled weights ({', '.join(pickled[:3])}), which can run code. {_SAFE}")
    for name in shards:
        if ".." in PurePosixPath(name).parts or Path(name).is_absolute():
            raise CheckpointError(f"{file}: names {name}, which is outside of its folder. Download the model again")
    return shards


def refuse_pickles(folder: Path, owner: str, weights: str | None = None) -> None:
    """
    Args:
        weights: the file or the index that the model's configuration names, if it does.

    Raises:
        CheckpointError: a folder without weights, or with weights that are read as pickles.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{owner}: {folder} is not a folder. Expected a checkpoint or an adapter")
    if weights and not weights.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{owner}: the configuration in {folder} names the weights {weights}. {_SAFE}")
    named = [folder / weights] if weights and weights.endswith(".json") else []
    for index in [*named, *sorted(folder.glob("*.safetensors.index*.json"))]:
        try:
            read_index(index)
        except CheckpointError as error:
            raise CheckpointError(f"{owner}: {error}") from error
    has_weights = any(file for pattern in WEIGHTS for file in folder.glob(pattern))
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if (folder / "adapter_config.json").is_file() and not (folder / ADAPTER_FILE).is_file():
        has_weights = has_weights and not pickled  # PEFT would read the pickle
    if not has_weights:
        contents = f"only pickled weights ({', '.join(pickled)}), which can run code" if pickled else "no weights"
        raise CheckpointError(f"{owner}: {folder} has {contents}. {_SAFE}")


# ---------------------------------------------------------------- links


def leaves(path: Path, folder: Path) -> bool:
    """Whether a path leads out of a folder, by `..` or a link. In the hub's cache, links to its blobs are fine."""
    try:
        target, real = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return True
    roots = [real]
    for parent in (real, *real.parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and repository.name.startswith("models--"):
            roots.append(repository / "blobs")
    return not any(target.is_relative_to(root) for root in roots)


def refuse_links(folder: Path) -> None:
    """
    Raises:
        CheckpointError: a link in the folder, or in one below it, leads out of it.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            refuse_to_leave(path, folder)


def refuse_to_leave(path: Path, folder: Path) -> None:
    """
    Raises:
        CheckpointError: a path leads out of a folder.
    """
    if leaves(path, folder):
        raise CheckpointError(
            f"{path} is a link that leads out of {folder}, so it could show or change other files. Replace it by the file "
            "itself if you trust this folder"
        )


def copy_model(
    folder: Path, target: Path, *, root: Path | None, gguf_file: str | None = None, code: bool = False
) -> None:
    """Copy the files that make a model or an adapter.

    Args:
        root: the files must lie within it, after links are followed. None: anywhere.
        code: also the Python files.

    Raises:
        CheckpointError: a link leads out of `root`.
    """
    for file in model_files(folder, gguf_file=gguf_file, code=code):
        if root is not None:
            refuse_to_leave(file, root)
        place = target / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: missing. The folder is half written or is no checkpoint")
    from safetensors.torch import load_file  # it loads torch, which commands that read no weights do without

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: corrupted or half written: {error}") from error
