"""The recipe of a synthesis: models, domains, settings of each stage, filters. It imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ultrafuser import typed_yaml
from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.recipe import Dtype, Fraction, Identifier, LocalGlob, LocalPath, load_node
from ultrafuser.synth.calls.request import STAGES
from ultrafuser.typed_yaml import DiscriminatedBy, FreeForm, Node


class _Model(Node):
    """The fields that both kinds of models have."""

    # Fields of the other kind. They are ignored, so that `models.NAME.endpoint=local` is enough to change the kind.
    ignored: ClassVar[tuple[str, ...]] = ()

    name: Identifier = Field(description="Name of the model in stages and domains, unique in the recipe.")
    licence: str = Field(
        default="", description="Licence or terms of the model's output, shown in each row and in the data card."
    )
    prompt_usd: NonNegativeFloat = Field(default=0.0, description="Price in dollars per million prompt tokens.")
    completion_usd: NonNegativeFloat = Field(default=0.0, description="Price in dollars per million written tokens.")

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: item for key, item in value.items() if key not in cls.ignored}


class LocalModel(_Model):
    """A model that runs in this process."""

    ignored = ("requests_per_minute", "tokens_per_minute", "structured")

    endpoint: Literal["local"] = Field(description="Run `model` in this process.")
    model: LocalPath = Field(
        description="Model to run, as for `ultrafuser eval`: folder, hub id, BASE+ADAPTER or fused folder."
    )
    chat_template: LocalPath | None = Field(
        default=None,
        description="`chatml`, `plain`, `inst`, `alpaca`, a Jinja file or text. null: the model's own template.",
    )
    dtype: Dtype = Field(default="auto", description="Type of the weights.")
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda` or another torch device.")
    batch_size: PositiveInt = Field(default=8, description="Number of requests per batch.")
    generation: FreeForm = Field(default={}, description="Further arguments of transformers' `generate`.")
    trust_remote_code: bool = Field(default=False, description="Run the code in the repositories of the model.")

    @model_validator(mode="before")
    @classmethod
    def _check_model(cls, value: Any) -> Any:
        model = value.get("model") if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and (model is None or str(model).startswith("openai:")):
            raise ValueError(
                f"model {value.get('name')!r}: with 'endpoint: local' expected 'model' (a folder, a hub id, BASE+ADAPTER), "
                f"got {model or 'none'}; a served model is 'endpoint: NAME@http://host/v1'"
            )
        return value

    @property
    def served(self) -> str:
        """Name of the model that is the same on every machine: the reference without absolute folders."""
        references = self.model.split("+")
        return "+".join(Path(text).name if Path(text).is_absolute() else text for text in references)

    @property
    def location(self) -> str:
        """Where the model runs, for the data card."""
        return "this process"


class ServedModel(_Model):
    """A model behind an OpenAI-compatible endpoint."""

    ignored = ("model", "chat_template", "dtype", "device", "batch_size", "generation")

    endpoint: EndpointRecipe = Field(
        description="An OpenAI-compatible endpoint: `NAME@http://host/v1`, or a mapping with the fields below."
    )
    requests_per_minute: PositiveInt | None = Field(
        default=None, description="Rate limit in requests per minute. null: no limit."
    )
    tokens_per_minute: PositiveInt | None = Field(
        default=None, description="Rate limit in tokens per minute. null: no limit."
    )
    structured: bool = Field(
        default=False, description="Send a JSON schema with list stages. The endpoint must support structured output."
    )

    @model_validator(mode="before")
    @classmethod
    def _check_model(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("model") is not None:
            endpoint = EndpointRecipe.model_validate(value["endpoint"])
            raise ValueError(
                f"model {value.get('name')!r}: 'model' is for 'endpoint: local', got {value['model']} beside the endpoint "
                f"{endpoint.model}@{endpoint.base_url}; remove one of them"
            )
        return value

    @property
    def served(self) -> str:
        """Name of the model that is the same on every machine: the endpoint's name for it."""
        return self.endpoint.model

    @property
    def location(self) -> str:
        """Where the model runs, for the data card."""
        return self.endpoint.base_url


ModelRecipe = LocalModel | ServedModel


class CallRecipe(Node):
    """Settings of the requests of one stage. A bare string is its model."""

    shorthand: ClassVar[str | None] = "model"

    model: str | None = Field(default=None, description="Name of the model. null: the first model of the recipe.")
    temperature: NonNegativeFloat | None = Field(
        default=None,
        description="Sampling temperature. null: `endpoint.temperature`, or greedy decoding for a local model.",
    )
    max_tokens: PositiveInt = Field(default=1024, description="Token limit of a reply.")


class ListCallRecipe(CallRecipe):
    """Settings of a stage with several items per reply. A bare string is its model."""

    per_call: PositiveInt = Field(default=10, description="Items per reply.")
    rounds: PositiveInt = Field(
        default=3, description="Maximum number of rounds of requests, until there are enough items."
    )


class ExpandCallRecipe(CallRecipe):
    """Settings of the expansion. A bare string is its model."""

    examples: PositiveInt = Field(default=4, description="Example instructions per prompt.")


# Topics should vary, ratings should not. The other differences are lengths of replies.
CALL_DEFAULTS: dict[str, dict[str, Any]] = {
    "meta_topics": {"temperature": 1.0, "max_tokens": 1024, "per_call": 20},
    "sub_topics": {"temperature": 1.0, "max_tokens": 2048, "per_call": 20},
    "instructions": {"temperature": 1.0, "max_tokens": 2048, "per_call": 10},
    "expand": {"temperature": 1.0, "max_tokens": 2048},
    "complex": {"temperature": 0.7, "max_tokens": 1024},
    "responses": {"temperature": 0.7, "max_tokens": 2048},
    "turns": {"temperature": 1.0, "max_tokens": 512},
    "samples": {"temperature": 0.7, "max_tokens": 2048},
    "judge": {"temperature": 0.0, "max_tokens": 512},
}


def _call(kind: type[CallRecipe], stage: str, description: str) -> Any:
    return Field(default_factory=lambda: kind(**CALL_DEFAULTS[stage]), description=description)


class CallsRecipe(Node):
    """Settings of each stage. Missing fields have the defaults of that stage."""

    meta_topics: ListCallRecipe = _call(ListCallRecipe, "meta_topics", "Broad topics of a domain.")
    sub_topics: ListCallRecipe = _call(ListCallRecipe, "sub_topics", "Sub-topics of a topic, with concepts.")
    instructions: ListCallRecipe = _call(ListCallRecipe, "instructions", "Instructions on a sub-topic.")
    expand: ExpandCallRecipe = _call(
        ExpandCallRecipe, "expand", "New instructions that are strongly or weakly related to examples."
    )
    complex: CallRecipe = _call(CallRecipe, "complex", "Rewriting of an instruction to be more complex.")
    responses: CallRecipe = _call(CallRecipe, "responses", "Answers.")
    turns: CallRecipe = _call(CallRecipe, "turns", "Next message of the simulated user.")
    samples: CallRecipe = _call(CallRecipe, "samples", "Further answers, whose agreement is checked.")
    judge: CallRecipe = _call(CallRecipe, "judge", "Scores from 1 to 10.")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        calls = dict(value)
        for stage, defaults in CALL_DEFAULTS.items():
            if isinstance(call := calls.get(stage), str):
                calls[stage] = {**defaults, "model": call}
            elif isinstance(call, Mapping):
                calls[stage] = {**defaults, **call}
        return calls


class CountsRecipe(Node):
    """Number of items of each kind in a domain."""

    meta_topics: PositiveInt = Field(default=10, description="Number of topics, seed topics included.")
    sub_topics: PositiveInt = Field(default=50, description="Number of sub-topics over all topics.")
    concepts: PositiveInt = Field(default=8, description="Concepts per sub-topic.")
    instructions: PositiveInt = Field(default=500, description="Number of first instructions over all sub-topics.")
    strong: NonNegativeFloat = Field(default=1.0, description="Strongly related instructions per first instruction.")
    weak: NonNegativeFloat = Field(default=1.0, description="Weakly related instructions per first instruction.")
    rows: PositiveInt | None = Field(
        default=None, description="Keep at most N rows, evenly over topics and sub-topics. null: all rows that pass."
    )


class DomainRecipe(Node):
    """One domain: its description, the style of its texts, and the checks of its answers."""

    name: Identifier = Field(description="Name of the domain, and `domain` of its rows.")
    description: str = Field(
        min_length=1, description="Description of the domain in one or two sentences, for the models."
    )
    instruction_style: str = Field(default="", description="Style of the instructions.")
    answer_style: str = Field(default="", description="Style of the answers.")
    check: Literal["none", "python", "math"] = Field(
        default="none",
        description="`python`: code must parse and pass its tests, if there are any. `math`: the answer must have a "
        "final result, its arithmetic must be right, and `samples` must agree.",
    )
    tests: bool = Field(default=False, description="With `check: python`: request tests with each first answer.")
    samples: NonNegativeInt = Field(default=0, description="With `check: math`: number of further answers to compare.")
    agreement: Fraction = Field(default=0.5, description="Minimum share of samples that agree with the answer.")
    topics: list[str] = Field(default=[], description="Seed topics. The model adds the rest.")
    counts: CountsRecipe = Field(default_factory=CountsRecipe, description="Number of items of each kind.")
    answer_model: str | None = Field(
        default=None, description="Model for answers and samples of this domain. null: the model in `calls`."
    )

    @model_validator(mode="after")
    def _check(self) -> DomainRecipe:
        if self.check != "math" and self.samples:
            raise ValueError(f"domain {self.name!r}: 'samples' needs 'check: math'; remove 'samples' or set the check")
        if self.check != "python" and self.tests:
            raise ValueError(f"domain {self.name!r}: 'tests' needs 'check: python'; remove 'tests' or set the check")
        if repeated := [topic for topic in self.topics if self.topics.count(topic) > 1]:
            raise ValueError(f"domain {self.name!r}: the topic {repeated[0]!r} is listed twice")
        return self


class FiltersRecipe(Node):
    """Filters of the data set."""

    language: str | None = Field(
        default="en", description="Language to keep, as an ISO 639-1 code. null: any language."
    )
    language_confidence: Fraction = Field(
        default=0.5, description="Reject a text if another language has at least this confidence."
    )
    min_instruction_chars: NonNegativeInt = Field(
        default=12, description="Minimum length of an instruction in characters."
    )
    max_instruction_chars: PositiveInt = Field(
        default=6000, description="Maximum length of an instruction in characters."
    )
    min_answer_chars: NonNegativeInt = Field(default=20, description="Minimum length of an answer in characters.")
    max_answer_chars: PositiveInt = Field(default=20000, description="Maximum length of an answer in characters.")
    refusals: bool = Field(default=True, description='Reject refusals and boilerplate such as "as an AI".')
    max_repetition: Fraction = Field(default=0.3, description="Maximum share of repeated runs of five words.")
    near_duplicates: Annotated[float, Field(ge=0.1, le=1)] | None = Field(
        default=0.7,
        description="Jaccard similarity from which texts are duplicates. null: exact duplicates only.",
    )
    decontaminate: list[LocalGlob] = Field(
        default=[],
        description="Test files, folders or globs. Rows that share an n-gram of words with one are rejected.",
    )
    ngram: Annotated[int, Field(ge=3)] = Field(default=13, description="Words per n-gram. The paper has 13.")
    min_score: Annotated[int, Field(ge=1, le=10)] | None = Field(
        default=None, description="Minimum score by the judge, from 1 to 10. null: no judge."
    )
    unsafe_code: bool = Field(default=False, description="Run generated code without a sandbox.")


class SynthRecipe(Node):
    """A synthesis: models, domains, settings of each stage, filters and budgets."""

    title: str = Field(
        default="Synthetic instructions", description="Heading of the data card. A store belongs to one title."
    )
    licence: str = Field(default="", description="Licence of the whole data set. The terms of the models apply too.")
    models: list[Annotated[ModelRecipe, DiscriminatedBy("endpoint")]] = Field(
        description="Models that answer requests. `endpoint: local` runs one in this process."
    )
    domains: list[DomainRecipe] = Field(description="Domains of the data set.")
    calls: CallsRecipe = Field(default_factory=CallsRecipe, description="Settings of each stage.")
    prompts: LocalPath | None = Field(
        default=None, description="Folder with Jinja files that replace the built-in ones of the same name."
    )
    complex_share: Fraction = Field(default=0.3, description="Share of instructions to rewrite to be more complex.")
    turns: PositiveInt = Field(
        default=1, description="Turns per multi-turn conversation. 1: one question and one answer."
    )
    multi_turn_share: Fraction = Field(default=1.0, description="Share of conversations with more than one turn.")
    filters: FiltersRecipe = Field(default_factory=FiltersRecipe, description="Filters of the data set.")
    budget_usd: PositiveFloat | None = Field(
        default=None, description="Maximum cost in dollars over all runs. null: no limit."
    )
    budget_tokens: PositiveInt | None = Field(
        default=None, description="Stop after this many tokens read and written. null: no limit."
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of random draws.")
    output: str = Field(
        default="runs/synth", description="Folder of store and data set, relative to the working directory."
    )

    @model_validator(mode="after")
    def _check(self) -> SynthRecipe:
        for key in ("models", "domains"):
            names = [item.name for item in getattr(self, key)]
            if not names:
                raise ValueError(f"{key!r} is empty, expected at least one")
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key!r} has two items named {repeated[0]!r}; names must differ")
        references = {f"calls.{stage}.model": self.call(stage).model for stage in STAGES}
        references |= {f"domains.{domain.name}.answer_model": domain.answer_model for domain in self.domains}
        names = [model.name for model in self.models]
        for field, name in references.items():
            if name is not None and name not in names:
                raise ValueError(f"{field}: no model {name!r}; there are: {', '.join(names)}")
        return self

    def call(self, stage: str) -> CallRecipe:
        """The settings of a stage."""
        return getattr(self.calls, stage)

    def role(self, stage: str, domain: DomainRecipe) -> str:
        """Name of the model that answers for a stage and domain."""
        if stage in ("responses", "samples") and domain.answer_model is not None:
            return domain.answer_model
        return self.call(stage).model or self.models[0].name

    def settings(self, stage: str, prompt: str, domain: DomainRecipe) -> tuple[CallRecipe, str]:
        """Settings and model name of a request. The answers of later turns have those of `responses`."""
        settings_stage = "responses" if (stage, prompt) == ("turns", "responses") else stage
        return self.call(settings_stage), self.role(settings_stage, domain)

    def model(self, name: str) -> ModelRecipe:
        """A model by its name."""
        return next(model for model in self.models if model.name == name)

    def domain(self, name: str) -> DomainRecipe:
        """A domain by its name."""
        return next(domain for domain in self.domains if domain.name == name)

    def used_models(self) -> list[ModelRecipe]:
        """The models that a stage of a domain may use."""
        stages = [stage for stage in STAGES if stage != "judge" or self.filters.min_score is not None]
        names = {self.role(stage, domain) for stage in stages for domain in self.domains}
        return [model for model in self.models if model.name in names]

    def identity(self) -> str:
        """What a store belongs to. Calls are found by their request, so a changed recipe can reuse its store."""
        return self.title


def load_synth_recipe(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> SynthRecipe:
    """Read a synthesis recipe, as `load_recipe` does.

    Raises:
        RecipeError: a file, key, value or override is invalid.
    """
    return load_node(SynthRecipe, source, overrides)


def dump_synth_recipe(recipe: SynthRecipe) -> str:
    """The recipe as YAML, defaults included. `load_synth_recipe` reads it back exactly."""
    return typed_yaml.dump(recipe.model_dump())
