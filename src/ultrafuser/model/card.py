"""The model card of a fused checkpoint: its front matter, its specialists, and how to load, serve and chat with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .configuration_ultrafuser import UltraFuserConfig
from .manifest import weight_sources
from .references import PACKAGE, is_hub_id

# A card that has this line is written again at the next push. Without it, it belongs to its reader.
MARK = "<!-- written by ultrafuser. Remove this line to keep your own text -->"


def model_card(
    config: UltraFuserConfig,
    *,
    title: str,
    address: str = ".",
    sections: Sequence[str] = (),
    tags: Sequence[str] = (),
    licence: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        address: hub id of the checkpoint, or the folder that holds the card.
        sections: Markdown below the table of the specialists.
        tags: further tags of the hub.
        licence: of all specialists, as the hub names it. None: not known, or they differ.
    """
    names = ", ".join(config.names)
    lines = [
        *_front_matter(config, tags, licence),
        MARK,
        "",
        f"# {title}: {names} fused at the token level",
        "",
        f"{len(config.specialists)} specialists. A gate weighs them at every token, and their {config.mixing} are mixed by "
        "[UltraFuser](https://arxiv.org/abs/2403.08281).",
        "",
        *_specialists(config),
        "",
        *_packages(config),
        *sections,
        *_usage(address),
    ]
    lines += ["## Licence", "", "The specialists' own licences apply.", ""]
    return "\n".join(lines)


def hub_sources(config: UltraFuserConfig) -> list[str]:
    """The hub ids of the specialists' models and adapters, each once."""
    references = [reference for spec in config.specialists for _, reference in weight_sources(spec["source"])]
    inside = ("specialists/", "bases/", PACKAGE)
    ids = [text for text in references if is_hub_id(text) and not text.startswith(inside) and not Path(text).exists()]
    return list(dict.fromkeys(ids))


def _front_matter(config: UltraFuserConfig, tags: Sequence[str], licence: str | None) -> list[str]:
    """The YAML that the hub reads. JSON texts and lists are YAML too, whatever signs they hold."""
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["ultrafuser", "model-fusion", *tags])),
    }
    if models := hub_sources(config):
        fields |= {"base_model": models, "base_model_relation": "merge"}
    if licence:
        fields["license"] = licence
    return ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()), "---", ""]


def _specialists(config: UltraFuserConfig) -> list[str]:
    """The table of the specialists."""
    lines = ["| specialist | domain | model | adapter | temperature |", "|---|---|---|---|---:|"]
    for spec, temperature in zip(config.specialists, config.temperatures, strict=True):
        source = spec["source"]
        model = _source(source["model"], source.get("revision"))
        adapter = _source(source.get("adapter"), source.get("adapter_revision"))
        lines.append(f"| {spec['name']} | {spec.get('domain', '')} | {model} | {adapter} | {temperature:g} |")
    return lines


def _source(reference: str | None, revision: str | None) -> str:
    return "" if not reference else f"`{reference}`" + (f" at `{revision}`" if revision else "")


def _packages(config: UltraFuserConfig) -> list[str]:
    """The Python packages that hold weights."""
    references = [reference for spec in config.specialists for _, reference in weight_sources(spec["source"])]
    packages = {text.removeprefix(PACKAGE).partition("/")[0] for text in references if text.startswith(PACKAGE)}
    return [f"Weights come from the Python package `{name}`, which must be installed." for name in sorted(packages)] + (
        [""] if packages else []
    )


def _usage(address: str) -> list[str]:
    return [
        "## Use",
        "",
        "```console",
        f"ultrafuser chat {address}      # in the terminal, each token on the colour of its specialist",
        f"ultrafuser serve {address}     # the OpenAI API, with the weights of every token",
        f"vllm serve {address}           # the same on vLLM, with the plugin of ultrafuser",
        "```",
        "",
        "```python",
        "import ultrafuser",
        "",
        f"model, renderer = ultrafuser.load({json.dumps(address)})" + ("  # this folder" if address == "." else ""),
        'inputs = ultrafuser.prompt_inputs(renderer, [[{"role": "user", "content": "Hello"}]], model.device)',
        "tokens = model.generate(**inputs, max_new_tokens=64)",
        'print(renderer.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        "",
        f"`AutoModelForCausalLM.from_pretrained({json.dumps(address)})` works after `import ultrafuser`.",
        "",
    ]
