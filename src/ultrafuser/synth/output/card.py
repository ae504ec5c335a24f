"""Writes the data set into its folder: rows, topics, report and data card."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, StrictUndefined

from ultrafuser import __version__
from ultrafuser.data.files import atomic_file, write_json, write_text
from ultrafuser.data.schema import Row
from ultrafuser.data.writing import row_writer
from ultrafuser.synth.calls.store import CallStore
from ultrafuser.synth.output.dataset import DataSet
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import SynthRecipe, dump_synth_recipe

ROWS, PARQUET = "data.jsonl", "data.parquet"
REPORT, CARD, RECIPE = "report.json", "README.md", "recipe.yaml"
TOPICS, INSTRUCTIONS = "topics.json", "instructions.jsonl"
_REASONS_SHOWN = 4
# Kinds of overlap besides n-grams.
_SHARED = {"whole text": "a whole short text", "whole message": "a user's whole message"}


def write_data_set(recipe: SynthRecipe, prompts: Prompts, data: DataSet, store: CallStore) -> None:
    """Write every file. Rows and card are written only if the run reached its end.

    Raises:
        DataError: the folder cannot be written to.
    """
    folder = Path(recipe.output)
    facts = report(recipe, prompts, data, store)
    write_json(folder / REPORT, facts)
    write_items(recipe, data)
    write_text(folder / RECIPE, dump_synth_recipe(recipe))
    if data.stopped_after is not None:
        return
    for name in (ROWS, PARQUET):
        with row_writer(folder / name, force=True) as write:
            for row in data.rows:
                write(row)
    write_text(folder / CARD, card(recipe, facts, data.rows))


def write_items(recipe: SynthRecipe, data: DataSet) -> None:
    """Write topics and instructions so far, so that they can be read before the answers are requested.

    Raises:
        DataError: the folder cannot be written to.
    """
    folder = Path(recipe.output)
    write_json(folder / TOPICS, _topics(data))
    if data.instructions is not None:
        with atomic_file(folder / INSTRUCTIONS, force=True) as draft, draft.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in data.instructions)


def report(recipe: SynthRecipe, prompts: Prompts, data: DataSet, store: CallStore) -> dict[str, Any]:
    """The report as JSON."""
    models = [
        {"name": model.name, "model": model.served, "where": model.location, "licence": model.licence}
        for model in recipe.used_models()
    ]
    return {
        "title": recipe.title,
        "version": __version__,
        "rows": len(data.rows),
        "rows_by_domain": dict(sorted(Counter(row.domain for row in data.rows).items())),
        "open": data.ledger.pending(),
        "stopped_after": data.stopped_after,
        "stages": data.ledger.rows(),
        "calls": [asdict(count) for count in store.counts()],
        "spent_usd": store.spent_usd(),
        "models": models,
        "prompts_sha256": prompts.hashes(),
        "recipe_sha256": hashlib.sha256(dump_synth_recipe(recipe).encode()).hexdigest(),
        "overlaps_with_test_data": data.overlaps,
    }


def _topics(data: DataSet) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Domain -> topic -> sub-topic -> concepts."""
    tree: dict[str, dict[str, dict[str, list[str]]]] = {}
    for domain, topics in data.topics.items():
        tree[domain] = {topic.name: {} for topic in topics}
        for sub_topic in data.sub_topics.get(domain, []):
            tree[domain][sub_topic.topic][sub_topic.name] = list(sub_topic.concepts)
    return tree


# ---------------------------------------------------------------- the card


def card(recipe: SynthRecipe, facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The data card. Its head is also read by the hub and by `datasets`."""
    text = (resources.files("ultrafuser.synth.output") / "card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    with_open = bool(facts["open"])
    sums = {key: sum(count[key] for count in facts["calls"]) for key in ("calls", "prompt_tokens", "completion_tokens")}
    return environment.from_string(text).render(
        recipe=recipe,
        facts=facts,
        rows=rows,
        pretty_name=json.dumps(recipe.title),
        files={"parquet": PARQUET, "report": REPORT, "recipe": RECIPE, "topics": TOPICS},
        domain_lines=[
            _domain_line(item.name, [row for row in rows if row.domain == item.name]) for item in recipe.domains
        ],
        model_lines=[_model_line(recipe, model) for model in facts["models"]],
        licences=Counter(row.licence or "not stated" for row in rows).most_common(),
        complex_share=f"{recipe.complex_share:.0%}",
        stage_lines=[_stage_line(entry, with_open) for entry in facts["stages"]],
        filter_lines=_filter_lines(recipe, facts),
        sums=sums,
        spent_usd=f"{facts['spent_usd']:.2f}",
    )


def _domain_line(name: str, rows: Sequence[Row]) -> str:
    if not rows:
        return f"| {name} | 0 | 0 | 0 | | | 0 |"
    answers = [content for row in rows for role, content in row.messages if role == "assistant"]
    topics, sub_topics = {row.topic for row in rows}, {(row.topic, row.subtopic) for row in rows}
    turns, length = len(answers) / len(rows), mean(len(answer.split()) for answer in answers)
    tests = sum(row.tests is not None for row in rows)
    return f"| {name} | {len(rows)} | {len(topics)} | {len(sub_topics)} | {turns:.2f} | {length:.0f} | {tests} |"


def _model_line(recipe: SynthRecipe, model: Mapping[str, Any]) -> str:
    stages = [
        stage
        for stage in type(recipe.calls).model_fields
        if any(recipe.role(stage, domain) == model["name"] for domain in recipe.domains)
        and (stage != "judge" or recipe.filters.min_score is not None)
        and (stage != "turns" or recipe.turns > 1)
        and (stage != "samples" or any(domain.samples for domain in recipe.domains))
    ]
    cells = (model["name"], f"`{model['model']}`", model["where"], model["licence"] or "not stated", ", ".join(stages))
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _stage_line(entry: Mapping[str, Any], with_open: bool) -> str:
    reasons = list(entry["rejected"].items())
    rejected = ", ".join(f"{_cell(reason)} {count}" for reason, count in reasons[:_REASONS_SHOWN])
    rest = sum(count for _, count in reasons[_REASONS_SHOWN:])
    rejected += f", others {rest}" if rest else ""
    line = f"| {entry['stage']} | {entry['domain']} | {entry['asked']} | {entry['kept']} | {rejected} |"
    return line + (f" {entry['open']} |" if with_open else "")


def _filter_lines(recipe: SynthRecipe, facts: Mapping[str, Any]) -> list[str]:
    filters = recipe.filters
    similarity = "equal"
    if filters.near_duplicates is not None:
        similarity = f"at least {filters.near_duplicates:g} alike (Jaccard, runs of three words)"
    tests = ", ".join(f"`{Path(path).name}`" for path in filters.decontaminate)
    lines = [f"- Duplicates: instructions or answers that are {similarity}."]
    if tests:
        kinds = Counter(overlap["touches"][0]["kind"] for overlap in facts["overlaps_with_test_data"])
        rows = f"{kinds.total()} {'row' if kinds.total() == 1 else 'rows'}"
        names = {f"{filters.ngram}-gram": f"{filters.ngram} words in a row"} | _SHARED
        overlaps = ", ".join(f"{name} {kinds[kind]}" for kind, name in names.items() if kinds[kind])
        lines.append(f"- Test data: {rows} left out for sharing words with {tests}{overlaps and ': '}{overlaps}.")
    else:
        lines.append("- Test data: **none was named, so the rows may hold test items.**")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
