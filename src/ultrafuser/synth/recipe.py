"""What a synthesis does: domains, models, how each stage asks, what is kept; imports no torch."""

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
    """How one stage asks; a bare string is its model."""

    shorthand: ClassVar[str | None] = "model"

    model: str | None = Field(default=None, description="Name of the model; null: the first one of the recipe.")
    temperature: NonNegativeFloat | None = Field(
        default=None,
        description="Temperature; null: `endpoint.temperature`; a local model then takes the likeliest token.",
    )
    max_tokens: PositiveInt = Field(default=1024, description="Tokens of a reply at most.")


class ListCallRecipe(CallRecipe):
    """How a stage asks that wants several items in one reply; a bare string is its model."""

    per_call: PositiveInt = Field(default=10, description="Items wanted in one reply.")
    rounds: PositiveInt = Field(
        default=3, description="How often it asks again for what replies left out, until it has enough."
    )


class ExpandCallRecipe(CallRecipe):
    """How the expansion asks; a bare string is its model."""

    examples: PositiveInt = Field(default=4, description="Instructions shown in one question, as examples to expand.")


# A model that writes topics should vary, a judge should not; what else differs is how long replies are.
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
    """How each stage asks; what a stage does not say is that stage's usual value."""

    meta_topics: ListCallRecipe = _call(ListCallRecipe, "meta_topics", "Broad topics of a domain.")
    sub_topics: ListCallRecipe = _call(ListCallRecipe, "sub_topics", "Sub-topics of a topic, with concepts.")
    instructions: ListCallRecipe = _call(ListCallRecipe, "instructions", "Instructions on a sub-topic.")
    expand: ExpandCallRecipe = _call(
        ExpandCallRecipe, "expand", "New instructions, strongly or weakly related to those shown."
    )
    complex: CallRecipe = _call(CallRecipe, "complex", "An instruction made more complex.")
    responses: CallRecipe = _call(CallRecipe, "responses", "The answers.")
    turns: CallRecipe = _call(CallRecipe, "turns", "What the simulated user says next.")
    samples: CallRecipe = _call(CallRecipe, "samples", "Further answers, to see whether they agree.")
    judge: CallRecipe = _call(CallRecipe, "judge", "A score of 1 to 10.")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        out = dict(value)
        for stage, usual in CALL_DEFAULTS.items():
            if isinstance(given := out.get(stage), str):
                out[stage] = {**usual, "model": given}
            elif isinstance(given, Mapping):
                out[stage] = {**usual, **given}
        return out


class CountsRecipe(Node):
    """How many of everything a domain gets."""

    meta_topics: PositiveInt = Field(default=10, description="Topics, seed topics included.")
    sub_topics: PositiveInt = Field(default=50, description="Sub-topics of all topics together.")
    concepts: PositiveInt = Field(default=8, description="Concepts asked for with each sub-topic.")
    instructions: PositiveInt = Field(default=500, description="First instructions of all sub-topics together.")
    strong: NonNegativeFloat = Field(default=1.0, description="Strongly related ones for each first instruction.")
    weak: NonNegativeFloat = Field(default=1.0, description="Weakly related ones for each first instruction.")
    rows: PositiveInt | None = Field(
        default=None, description="Rows kept at most, evenly over topics and sub-topics; null: all that pass."
    )


class DomainRecipe(Node):
    """One domain: what it is, how its instructions and answers look, how answers are checked."""

    name: Identifier = Field(description="Its name; the `domain` of its rows.")
    description: str = Field(min_length=1, description="What the domain is, in a sentence or two for the models.")
    instruction_style: str = Field(default="", description="How its instructions look.")
    answer_style: str = Field(default="", description="How its answers look.")
    check: Literal["none", "python", "math"] = Field(
        default="none",
        description="`python`: code must parse, and pass its tests if it has any; `math`: the answer must settle on a "
        "result, its arithmetic must be right, and `samples` must agree.",
    )
    tests: bool = Field(default=False, description="`check: python`: ask for tests with each first answer.")
    samples: NonNegativeInt = Field(default=0, description="`check: math`: further answers that are compared.")
    agreement: Fraction = Field(default=0.5, description="Share of the samples that must agree with the answer.")
    topics: list[str] = Field(default=[], description="Seed topics, taken as the first ones; the models add the rest.")
    counts: CountsRecipe = Field(default_factory=CountsRecipe, description="How many of everything.")
    answer_model: str | None = Field(
        default=None, description="Model of this domain's answers and samples; null: that of `calls`."
    )

    @model_validator(mode="after")
    def _check(self) -> DomainRecipe:
        if self.check != "math" and self.samples:
            raise ValueError(f"domain {self.name!r}: 'samples' are compared with 'check: math' alone; remove it")
        if self.check != "python" and self.tests:
            raise ValueError(f"domain {self.name!r}: 'tests' are run with 'check: python' alone; remove it")
        if twice := [topic for topic in self.topics if self.topics.count(topic) > 1]:
            raise ValueError(f"domain {self.name!r}: the topic {twice[0]!r} is listed twice")
        return self


class FiltersRecipe(Node):
    """What is left out of the data set."""

    language: str | None = Field(default="en", description="ISO 639-1 code of the only language kept; null: any.")
    language_confidence: Fraction = Field(
        default=0.5, description="Confidence in another language from which a text is left out."
    )
    min_instruction_chars: NonNegativeInt = Field(default=12, description="Characters of an instruction at least.")
    max_instruction_chars: PositiveInt = Field(default=6000, description="Characters of an instruction at most.")
    min_answer_chars: NonNegativeInt = Field(default=20, description="Characters of an answer at least.")
    max_answer_chars: PositiveInt = Field(default=20000, description="Characters of an answer at most.")
    refusals: bool = Field(default=True, description="Leave out refusals and boilerplate about being a model.")
    max_repetition: Fraction = Field(
        default=0.3, description="Share of an answer's words that repeat a run of words from before it, at most."
    )
    near_duplicates: Annotated[float, Field(ge=0.1, le=1)] | None = Field(
        default=0.7,
        description="Jaccard similarity from which instructions or answers are duplicates; null: exact only.",
    )
    decontaminate: list[LocalGlob] = Field(
        default=[],
        description="Test files, folders or globs: rows that share an n-gram of words with one are left out.",
    )
    ngram: Annotated[int, Field(ge=3)] = Field(default=13, description="Words of that n-gram; the paper's 13.")
    min_score: Annotated[int, Field(ge=1, le=10)] | None = Field(
        default=None, description="The judge's score of an answer at least, of 10; null: nothing is judged."
    )
    unsafe_code: bool = Field(default=False, description="Run generated code without a sandbox.")


class SynthRecipe(Node):
    """A synthesis: domains, models, and what becomes of them."""

    title: str = Field(
        default="Synthetic instructions", description="Heading of the data card; a store belongs to one title."
    )
    licence: str = Field(default="", description="Licence of the data set as a whole; the models' terms apply too.")
    models: list[Annotated[ModelRecipe, DiscriminatedBy("endpoint")]] = Field(
        description="Models that answer requests. `endpoint: local` runs one in this process."
    )
    domains: list[DomainRecipe] = Field(description="The domains.")
    calls: CallsRecipe = Field(default_factory=CallsRecipe, description="How each stage asks.")
    prompts: LocalPath | None = Field(
        default=None, description="Folder with Jinja files that replace our own of the same name."
    )
    complex_share: Fraction = Field(default=0.3, description="Share of the instructions that are made more complex.")
    turns: PositiveInt = Field(
        default=1, description="Turns of a multi-turn conversation; 1: one question, one answer."
    )
    multi_turn_share: Fraction = Field(default=1.0, description="Share of conversations that go on beyond one turn.")
    filters: FiltersRecipe = Field(default_factory=FiltersRecipe, description="What is left out.")
    budget_usd: PositiveFloat | None = Field(default=None, description="Money to spend at most; null: no limit.")
    budget_tokens: PositiveInt | None = Field(
        default=None, description="Tokens read and written after which nothing more is sent; null: no limit."
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of what is drawn at random.")
    output: str = Field(default="runs/synth", description="Folder of store and data set, seen from the working folder.")

    @model_validator(mode="after")
    def _check(self) -> SynthRecipe:
        for key in ("models", "domains"):
            names = [item.name for item in getattr(self, key)]
            if not names:
                raise ValueError(f"{key!r} is empty, expected at least one")
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key!r} has two items named {twice[0]!r}; names must differ")
        named = {f"calls.{stage}.model": self.call(stage).model for stage in STAGES}
        named |= {f"domains.{domain.name}.answer_model": domain.answer_model for domain in self.domains}
        known = [model.name for model in self.models]
        for where, name in named.items():
            if name is not None and name not in known:
                raise ValueError(f"{where}: no model {name!r}; there are: {', '.join(known)}")
        return self

    def call(self, stage: str) -> CallRecipe:
        """How a stage asks."""
        return getattr(self.calls, stage)

    def role(self, stage: str, domain: DomainRecipe) -> str:
        """Name of the model that answers for a stage and domain."""
        if stage in ("responses", "samples") and domain.answer_model is not None:
            return domain.answer_model
        return self.call(stage).model or self.models[0].name

    def asked_as(self, stage: str, prompt: str) -> str:
        """The stage whose model and settings hold for a question: a later turn's answer is asked for like the first."""
        return "responses" if (stage, prompt) == ("turns", "responses") else stage

    def model(self, name: str) -> ModelRecipe:
        """A model by its name."""
        return next(model for model in self.models if model.name == name)

    def domain(self, name: str) -> DomainRecipe:
        """A domain by its name."""
        return next(domain for domain in self.domains if domain.name == name)

    def used_models(self) -> list[ModelRecipe]:
        """The models that some stage of some domain may ask."""
        stages = [stage for stage in STAGES if stage != "judge" or self.filters.min_score is not None]
        names = {self.role(stage, domain) for stage in stages for domain in self.domains}
        return [model for model in self.models if model.name in names]

    def identity(self) -> str:
        """What a store belongs to. Calls are found by what was asked, so any change of the recipe may go on with its store."""
        return self.title


def load_synth_recipe(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> SynthRecipe:
    """Read a synthesis recipe, as `load_recipe` does.

    Raises:
        RecipeError: a file, key, value or override that cannot be used.
    """
    return load_node(SynthRecipe, source, overrides)


def dump_synth_recipe(recipe: SynthRecipe) -> str:
    """The whole recipe as YAML, defaults included; `load_synth_recipe` reads it back exactly."""
    return typed_yaml.dump(recipe.model_dump())
