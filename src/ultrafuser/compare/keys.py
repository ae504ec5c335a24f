"""When a finished build or measurement can be kept: a key over everything that it depends on."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from ultrafuser.compare.recipe import CompareRecipe
from ultrafuser.compare.systems import SystemRecipe
from ultrafuser.errors import CheckpointError
from ultrafuser.evaluate.options import JUDGED
from ultrafuser.model.references import PACKAGE, package_path, sha256

Step = Literal["build", "measure"]
# Settings of the comparison on which a measurement depends: always, with benchmarks, and with a judge.
_MEASURED_BY = {"test", "tasks", "decode", "seed", "device"}
_TASKS_BY = {"data_dir", "limit", "max_new_tokens", "batch_size", "unsafe_code"}
_JUDGED_BY = {"model", "base_url", "temperature", "max_tokens", "extra_body"}
# Every kind once had all fields. Their defaults stay in the key, so that systems that were built then are kept.
_ALL_FIELDS = {
    "specialist": None,
    "mixing": None,
    "weights": "uniform",
    "method": "linear",
    "weight": None,
    "density": 0.6,
    "by": "log_prob",
    "stages": None,
    "after": None,
}
_HASH_LIMIT_BYTES = 64 << 20  # larger files are told apart by size and time


def step_key(recipe: CompareRecipe, system: SystemRecipe, step: Step) -> str:
    """Changes when what the step depends on does, the contents of local files included."""
    training = system.training(recipe)
    ingredients: list[Any] = [
        _ALL_FIELDS | system.model_dump(exclude={"label", "set", "tasks", "versus"}),
        training.model_dump(include=set(system.depends_on), mode="json"),
    ]
    paths = [path for s in training.specialists for path in (s.model, s.adapter, s.chat_template)]
    paths += system.paths
    if recipe.base is not None and system.reads_base:
        ingredients.append(recipe.base)
        paths.append(recipe.base)
    if "data" in system.depends_on:
        paths += [source.path for source in (*training.data.train, *training.data.validation)]
    if system.predecessor is not None:
        ingredients.append(step_key(recipe, recipe.system(system.predecessor), "build"))
    if step == "measure":
        tasks = recipe.tasks_of(system)
        fields = _MEASURED_BY | (_TASKS_BY if tasks else set())
        ingredients.append(recipe.model_dump(include=fields, mode="json") | {"tasks": tasks})
        if recipe.judge is not None and (system.asks_judge or set(tasks) & set(JUDGED)):
            ingredients.append(recipe.judge.model_dump(include=_JUDGED_BY))
        paths += [source.path for source in recipe.test]
        if tasks and recipe.data_dir:
            paths += [str(file) for file in sorted(Path(recipe.data_dir).glob("*.json*"))]
    ingredients.append([_stamp(path) for path in paths if path])
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _stamp(reference: str) -> list[Any]:
    """Names, sizes and checksums of a local file or folder. Nothing for a hub id."""
    try:
        path = package_path(reference) if reference.startswith(PACKAGE) else Path(reference).expanduser()
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        if not all(file.is_file() for file in files):
            return []
    except (OSError, CheckpointError):  # Jinja text is no path, and a missing file is reported where it is read
        return []
    stats = ((file, file.stat()) for file in files)
    return [[file.name, stat.st_size, _content(file, stat.st_size, stat.st_mtime_ns)] for file, stat in stats]


@functools.cache
def _content(file: Path, size_bytes: int, time_ns: int) -> str | int:
    """The checksum of a file, computed once for each version. A large file has its time instead."""
    return sha256(file) if size_bytes < _HASH_LIMIT_BYTES else time_ns
