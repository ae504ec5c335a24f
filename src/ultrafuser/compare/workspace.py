"""Where a comparison keeps its systems, and what several of them share: recipes, checkpoints, frozen features."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ultrafuser.compare.recipe import CompareRecipe, SystemRecipe, load_compare_recipe
from ultrafuser.compare.systems.plain_checkpoints import PlainCheckpoints, write_plain_checkpoints
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import CheckpointError, DataError, UltraFuserError
from ultrafuser.evaluate.lm.load import LoadedModel, as_served
from ultrafuser.evaluate.lm.response_cache import Store
from ultrafuser.evaluate.run import JUDGED, EvalOptions
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.references import PACKAGE, package_path, sha256
from ultrafuser.model.saving import plain_model
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.progress import Progress
from ultrafuser.recipe import Recipe, SpecialistRecipe
from ultrafuser.specialists import fuse
from ultrafuser.train.features import FeatureStore
from ultrafuser.train.rows import read_sources

RECIPE = "compare.yaml"
BUILT, MEASURED = "built.json", "measured.json"
# what a system depends on in the training recipe: all that trains it, or less
_SPECIALISTS = {"specialists", "share_base", "dtype", "device"}
_TRAINED = {*_SPECIALISTS, "mixing", "gate", "data", "stages", "balanced", "seed", "eval_every", "save_every", "keep_best",
            "early_stop_patience"}  # fmt: skip
_USED = {
    **dict.fromkeys(("base", "specialist", "oracle", "merge", "best_of"), _SPECIALISTS),
    "router": {*_SPECIALISTS, "data", "seed"},
}
# what a measurement depends on besides
_MEASURED_BY = {"test", "tasks", "decode", "seed", "device"}
_TASKS_BY = {"data_dir", "limit", "max_new_tokens", "batch_size", "unsafe_code"}
_JUDGED_BY = {"model", "base_url", "temperature", "max_tokens", "extra_body"}
_HASH_LIMIT_BYTES = 64 << 20  # larger files are told apart by size and time


class Workspace:
    """A comparison's folder.

    Attributes:
        recipe: of the comparison, as kept in the folder.
        folder: holds `systems/NAME/` for each system, `checkpoints/` of specialists and base, `features/` of the frozen
            specialists.
    """

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        self.folder, self.progress = folder, progress or Progress()
        self.recipe: CompareRecipe = load_compare_recipe(folder / RECIPE)

    def system(self, name: str) -> SystemRecipe:
        """The line of the recipe."""
        return next(system for system in self.recipe.systems if system.name == name)

    def home(self, name: str) -> Path:
        """A system's folder."""
        return self.folder / "systems" / name

    def training(self, system: SystemRecipe, *extra: str) -> Recipe:
        """The training recipe of a system, with its output in the system's folder."""
        return self.recipe.training(system, [f"output={self.home(str(system.name)) / 'run'}", *extra])

    def key(self, name: str, step: str) -> str:
        """Changes when what the step depends on does, the contents of local files included."""
        system = self.system(name)
        training = self.training(system)
        used = _USED.get(system.kind, _TRAINED)
        if system.kind == "static" and system.weights == "uniform":
            used = {*_SPECIALISTS, "mixing"}
        parts: list[Any] = [
            system.model_dump(exclude={"label", "set", "tasks", "versus"}),
            training.model_dump(include=used, mode="json"),
        ]
        paths = [p for one in training.specialists for p in (one.model, one.adapter, one.chat_template)]
        if self.recipe.base is not None and system.kind in ("base", "merge"):
            parts.append(self.recipe.base)
            paths.append(self.recipe.base)
        if "data" in used:
            paths += [source.path for source in (*training.data.train, *training.data.validation)]
        if system.after:
            parts.append(self.key(system.after, "build"))
        if step == "measure":
            tasks = self.recipe.tasks_of(system)
            fields = _MEASURED_BY | (_TASKS_BY if tasks else set())
            parts.append(self.recipe.model_dump(include=fields, mode="json") | {"tasks": tasks})
            if self.recipe.judge is not None and (system.by == "judge" or set(tasks) & set(JUDGED)):
                parts.append(self.recipe.judge.model_dump(include=_JUDGED_BY))
            paths += [source.path for source in self.recipe.test]
            if tasks and self.recipe.data_dir:
                paths += [str(file) for file in sorted(Path(self.recipe.data_dir).glob("*.json*"))]
        parts.append([_stamp(path) for path in paths if path])
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def answers(self, fingerprint: str) -> Store:
        """The answers of one model, whichever systems ask it: the router and best-of-K find the specialists' there."""
        return Store(
            self.folder / "answers" / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.sqlite", fingerprint
        )

    def facts(self, name: str, step: str) -> dict[str, Any] | None:
        """What a finished step left; None where it is missing or was made for another recipe."""
        file = self.home(name) / {"build": BUILT, "measure": MEASURED}[step]
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        return found if found is not None and found["key"] == self.key(name, step) else None

    # ---------------------------------------------------------------- what systems share

    def alone(self, specialist: SpecialistRecipe) -> LoadedModel:
        """One specialist, or the base, as a model by itself."""
        recipe = self.recipe.training()
        model, tokenizer = fuse(recipe.model_copy(update={"specialists": [specialist]}))
        return self.load_model(model, tokenizer, specialist.name)

    def whole(self) -> LoadedModel:
        """All specialists, frozen, in one model with an untrained gate."""
        return self.load_model(*fuse(self.recipe.training()), "specialists")

    def members(self, whole: LoadedModel) -> dict[str, LoadedModel]:
        """Each specialist of a fused model by itself, on the very weights of that model."""
        assert whole.model is not None and whole.renderer is not None
        tokenizer, config, out = whole.renderer.tokenizer, whole.model.config, {}
        for spec in config.specialists:
            own = UltraFuserConfig([spec], mixing=config.mixing, vocab_size=config.vocab_size)
            group = next(group for group in whole.model.groups if spec["name"] in group.names)
            model = UltraFuserForCausalLM(own, [Member(group, spec["name"])]).eval()
            model.generation_config = whole.model.generation_config
            out[spec["name"]] = self.load_model(model, tokenizer, spec["name"])
        return out

    def load_model(self, model: Any, tokenizer: Any, name: str, folder: Path | None = None) -> LoadedModel:
        """A loaded model as one that answers."""
        renderer = self.renderer(model, tokenizer)
        settings = {"batch_size": self.recipe.batch_size, "seed": self.recipe.seed}
        return as_served(model, renderer, name=name, folder=folder, **settings)

    def renderer(self, model: Any, tokenizer: Any, max_length: int | None = None) -> Renderer:
        """Test rows are cut at the context alone, so that all systems see the same tokens of them."""
        templates, context = (
            model.config.chat_templates,
            model.config.max_position_embeddings,
        )
        return Renderer(tokenizer, templates, min(max_length or context, context))

    def base(self) -> SpecialistRecipe:
        """The model that the specialists were trained from.

        Raises:
            DataError: they are not adapters on one base, and the recipe names none.
        """
        specialists = self.recipe.training().specialists
        if self.recipe.base is not None:
            return SpecialistRecipe(name="base", model=self.recipe.base, chat_template=specialists[0].chat_template)
        bases = {(one.model, one.revision, one.gguf_file) for one in specialists}
        if len(bases) > 1 or any(one.adapter is None for one in specialists):
            raise DataError("the specialists are not adapters on one base; name the model that they were trained from as "
                            "'base', beside 'recipe', or leave this system out")  # fmt: skip
        return specialists[0].model_copy(update={"name": "base", "adapter": None, "adapter_revision": None})

    def checkpoints(self) -> PlainCheckpoints:
        """The specialists and their base as ordinary checkpoints, written once."""
        training, folder = self.recipe.training(), self.folder / "checkpoints"
        found = write_plain_checkpoints(*fuse(training), folder, self.progress)
        if self.recipe.base is None:
            return found
        model, tokenizer = fuse(training.model_copy(update={"specialists": [self.base()]}))
        own = write_plain_checkpoints(model, tokenizer, folder / "from", self.progress)
        return replace(found, base=own.specialists["base"])

    def frozen_features(self, part: str) -> FeatureStore:
        """The frozen specialists' states on the `train` or `test` rows, computed once."""
        recipe = self.recipe.training()
        model, tokenizer = fuse(recipe)
        rows = self.rows(part, self.renderer(model, tokenizer, recipe.data.max_length if part == "train" else None))
        return FeatureStore.build(model, rows, self.folder / "features" / part, progress=self.progress)

    def rows(self, part: str, renderer: Renderer) -> list[Rendered]:
        """The `train` or `test` rows as a system reads them."""
        sources = self.recipe.training().data.train if part == "train" else self.recipe.test
        return read_sources(sources, renderer, self.progress, part)


class Member(SpecialistGroup):
    """One specialist of a group, as a group of its own on the same weights."""

    def __init__(self, group: SpecialistGroup, name: str) -> None:
        nn.Module.__init__(self)
        self.group, self.names, self.row = group, [name], group.names.index(name)
        self.loras = {}

    @property
    def model(self) -> Any:
        """The transformers model of the whole group."""
        return self.group.model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: object | None = None
    ) -> torch.Tensor:
        """(1, B, T) -> (1, B, T, D)."""
        with self.group.only([self.row]):
            return self.group(input_ids, attention_mask, cache)


def eval_options(recipe: CompareRecipe, names: Sequence[str]) -> EvalOptions:
    """A comparison's settings of the benchmarks `names`."""
    settings = {"max_new_tokens": recipe.max_new_tokens, "unsafe_code": recipe.unsafe_code}
    return EvalOptions(
        names, data_dir=recipe.data_dir, limit=recipe.limit, seed=recipe.seed, judge=recipe.judge, task_options=settings
    )


def only_model(served: LoadedModel) -> Any:
    """The one model in it, as transformers knows it.

    Raises:
        UltraFuserError: there are several.
    """
    if served.model is None or len(served.model.config.names) != 1:
        raise UltraFuserError(f"{served.name}: expected one model, got several specialists or an endpoint")
    group = served.model.groups[0]
    return plain_model(group, {0: 1.0}) if group.loras else group.model


def _stamp(reference: str) -> list[Any]:
    """What tells a local file or folder from another version of itself; nothing for a hub id."""
    try:
        path = package_path(reference) if reference.startswith(PACKAGE) else Path(reference).expanduser()
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        if not all(file.is_file() for file in files):
            return []
    except (OSError, CheckpointError):  # Jinja text is no path; what is missing is reported where it is read
        return []
    stats = [file.stat() for file in files]
    return [
        [file.name, at.st_size, _content(file, at.st_size, at.st_mtime_ns)]
        for file, at in zip(files, stats, strict=True)
    ]


@functools.cache
def _content(file: Path, size_bytes: int, time_ns: int) -> str | int:
    """A file's checksum, computed once while it stays as it is; a large file's time instead."""
    return sha256(file) if size_bytes < _HASH_LIMIT_BYTES else time_ns
