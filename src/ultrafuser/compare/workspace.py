"""The folder of a comparison, and what several systems share in it: specialists, checkpoints, states, answers."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ultrafuser.compare.settings import CompareSettings
from ultrafuser.compare.systems.plain_checkpoints import PlainCheckpoints, write_plain_checkpoints
from ultrafuser.data.sources import RowReader
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import DataError
from ultrafuser.evaluate.lm.load import LoadedModel, wrap_model
from ultrafuser.evaluate.lm.response_cache import ResponseCache
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.progress import Progress
from ultrafuser.recipe import SpecialistRecipe
from ultrafuser.specialists import answers_apart, fuse, make_renderer
from ultrafuser.train.features import FeatureStore
from ultrafuser.train.rows import read_sources

BUILT = "built.json"
DataSet = Literal["train", "test"]


class Workspace:
    """What systems share.

    Attributes:
        settings: of the comparison.
        folder: holds `systems/NAME/` of each system, `checkpoints/` of specialists and base, `features/` of the frozen
            specialists, and `answers/` by model.
    """

    def __init__(self, settings: CompareSettings, progress: Progress | None = None) -> None:
        self.settings, self.folder, self.progress = settings, Path(settings.output), progress or Progress()

    def system_folder(self, name: str) -> Path:
        """The folder of one system."""
        return self.folder / "systems" / name

    def build_key(self, name: str) -> str:
        """Differs for every build of a system."""
        return json.loads((self.system_folder(name) / BUILT).read_text(encoding="utf-8"))["key"]

    def answers(self, fingerprint: str) -> ResponseCache:
        """The cached answers of one model. The router and best-of-K find the specialists' answers there."""
        name = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
        return ResponseCache(self.folder / "answers" / f"{name}.sqlite", fingerprint)

    def load_specialist(self, specialist: SpecialistRecipe) -> LoadedModel:
        """One specialist, or the base, as a model by itself."""
        recipe = self.settings.training().model_copy(update={"specialists": [specialist]})
        return self.load_model(*fuse(recipe), specialist.name)

    def load_all(self) -> tuple[UltraFuserForCausalLM, Renderer]:
        """All specialists, frozen, in one model with an untrained gate."""
        model, tokenizer = fuse(self.settings.training())
        return model.eval(), self.renderer(model, tokenizer)

    def split(self, model: UltraFuserForCausalLM, renderer: Renderer) -> dict[str, LoadedModel]:
        """Each specialist of a fused model as a model by itself, on the very weights of the fused one."""
        specialists = {}
        for spec in model.config.specialists:
            name = spec["name"]
            config = copy.deepcopy(model.config)
            config.specialists = [spec]
            group = next(group for group in model.groups if name in group.names)
            single = UltraFuserForCausalLM(config, [SpecialistView(group, name)]).eval()
            single.generation_config = model.generation_config
            single.specialist_tokenizers = model.specialist_tokenizers
            specialists[name] = self.load_model(single, renderer.tokenizer, name)
        return specialists

    def load_model(self, model: Any, tokenizer: Any, name: str, folder: Path | None = None) -> LoadedModel:
        """Prepare a model in memory for answering. `folder`: its weight files."""
        renderer, batch_size, seed = self.renderer(model, tokenizer), self.settings.batch_size, self.settings.seed
        return wrap_model(model, renderer, name=name, folder=folder, batch_size=batch_size, seed=seed)

    def renderer(self, model: Any, tokenizer: Any, max_length: int | None = None) -> Renderer:
        """A renderer that truncates test rows at the context alone, so that all systems see the same tokens."""
        return make_renderer(model, tokenizer, max_length, apart=self._answers_apart)

    @cached_property
    def _answers_apart(self) -> bool:
        return answers_apart(self.settings.training())

    def base(self) -> SpecialistRecipe:
        """The model that the specialists were trained from.

        Raises:
            DataError: they are not adapters on one base, and the recipe names none.
        """
        specialists = self.settings.training().specialists
        if self.settings.base is not None:
            template = specialists[0].chat_template
            return SpecialistRecipe(name="base", model=self.settings.base, chat_template=template)
        bases = {(specialist.model, specialist.revision, specialist.gguf_file) for specialist in specialists}
        if len(bases) > 1 or any(specialist.adapter is None for specialist in specialists):
            raise DataError(
                "the specialists are not adapters on one base. Name the model that they were trained from as 'base', "
                "beside 'recipe', or leave this system out"
            )
        return specialists[0].model_copy(update={"name": "base", "adapter": None, "adapter_revision": None})

    def checkpoints(self) -> PlainCheckpoints:
        """The specialists and their base as ordinary checkpoints, written once."""
        training, folder = self.settings.training(), self.folder / "checkpoints"
        checkpoints = write_plain_checkpoints(*fuse(training), folder, self.progress)
        if self.settings.base is None:
            return checkpoints
        model, tokenizer = fuse(training.model_copy(update={"specialists": [self.base()]}))
        bases = write_plain_checkpoints(model, tokenizer, folder / "from", self.progress)
        return replace(checkpoints, base=bases.specialists["base"])

    def rows(self, data_set: DataSet, renderer: Renderer) -> Sequence[Rendered]:
        """The training or test rows as a system reads them."""
        data = self.settings.training().data
        sources = data.train if data_set == "train" else self.settings.test
        reader = RowReader(data.on_bad_row)
        rows = read_sources(sources, renderer, self.progress, data_set, reader)
        reader.write_bad_rows(self.folder / f"bad_rows.{data_set}.jsonl")
        return rows

    def features(self, data_set: DataSet, model: UltraFuserForCausalLM, rows: Sequence[Rendered]) -> FeatureStore:
        """The frozen specialists' states on the rows, computed once for all systems."""
        return FeatureStore.build(model, rows, self.folder / "features" / data_set, progress=self.progress)

    def frozen_features(self, data_set: DataSet) -> FeatureStore:
        """The same, with the specialists loaded for it."""
        recipe = self.settings.training()
        model, tokenizer = fuse(recipe)
        renderer = self.renderer(model, tokenizer, recipe.data.max_length if data_set == "train" else None)
        return self.features(data_set, model, self.rows(data_set, renderer))


class SpecialistView(SpecialistGroup):
    """One specialist of a group, as a group of its own on the same weights."""

    def __init__(self, group: SpecialistGroup, name: str) -> None:
        nn.Module.__init__(self)
        self.group, self.model, self.loras = group, group.model, {}
        self.names, self.row = [name], group.names.index(name)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: object | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(1, B, T) -> (1, B, T, D)."""
        with self.group.only([self.row]):
            return self.group(input_ids, attention_mask, cache, position_ids)
