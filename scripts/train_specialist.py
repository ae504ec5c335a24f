"""Train one zoo specialist: a LoRA adapter on the base model, in one plain loop.

    python scripts/train_specialist.py recipes/zoo/math.yaml --data ../shared/data/train --output runs/zoo/math

It takes seconds to minutes on a GPU, and runs at about 100 tokens/s on two CPU cores. A hash of the row's id splits the
data, whatever the seed. One twentieth is held out as the test set of scripts/zoo_table.py. Another is the validation set
on which the recipes' settings were chosen. Neither is ever trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultrafuser.data.chat_format import BUILTIN
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.model.references import package_path

SHARE_ALIKE = "CC-BY-SA"  # rows under these licences are not used, since they would bind the adapters


def split_of(row: Row) -> str:
    """`held_out` (1/20 of all ids), `validation` (another 1/20) or `train`."""
    bucket = int(hashlib.sha256(row.id.encode()).hexdigest(), 16) % 20
    return {0: "held_out", 1: "validation"}.get(bucket, "train")


def is_held_out(row: Row) -> bool:
    """Whether the row belongs to the test set of the table in the model cards."""
    return split_of(row) == "held_out"


def permissive_rows(file: Path, split: str) -> list[Row]:
    """The rows of one split of a data file, without those under a share-alike licence."""
    return [row for row in load_rows(str(file)) if SHARE_ALIKE not in row.licence and split_of(row) == split]


def training_rows(spec: dict[str, Any], data: Path) -> list[Row]:
    """The rows of one epoch, in which `sources` gives the number of passes over each source's rows.

    A factor of 2 repeats every row. A factor of 0.25 takes one row in four, always the same ones. Other sources are
    skipped.

    Raises:
        SystemExit: a source named in the recipe has no rows.
    """
    rows = [row for file in spec["data"] for row in permissive_rows(data / file, "train")]
    if unknown := set(spec["sources"]) - {row.source for row in rows}:
        raise SystemExit(
            f"{data}: no training rows of source {', '.join(sorted(unknown))} in {', '.join(spec['data'])}"
        )
    out = []
    for source, factor in spec["sources"].items():
        source_rows = sorted((row for row in rows if row.source == source), key=lambda row: fraction("share", row))
        repeats, remainder = divmod(factor, 1)
        out += source_rows * int(repeats) + source_rows[: round(remainder * len(source_rows))]
    return [rewritten(row, spec.get("rewrites", [])) for row in out]


def fraction(salt: str, row: Row) -> float:
    """A pseudo-random number in [0, 1) from the row's id and the salt."""
    return int(hashlib.sha256(f"{salt}{row.id}".encode()).hexdigest()[:8], 16) / 16**8


def rewritten(row: Row, rewrites: list[dict[str, Any]]) -> Row:
    """Rewrite the last answer of a row by the recipe's patterns, each in a `share` of all rows.

    Otherwise a specialist learns the typography of its sources, and gives any other one a low likelihood.
    """
    (*history, (role, answer)) = row.messages
    for rewrite in rewrites:
        if fraction(rewrite["pattern"], row) < rewrite["share"]:
            answer = re.sub(rewrite["pattern"], rewrite["by"], answer, flags=re.MULTILINE)
    return replace(row, messages=(*history, (role, answer)))


def batches(rows: list[Rendered], tokens_per_batch: int, rng: random.Random) -> list[list[Rendered]]:
    """Batches of rows of similar length, with at most `tokens_per_batch` padded tokens, in random order."""
    ordered = sorted(rows, key=lambda row: (row.num_tokens, rng.random()))
    out: list[list[Rendered]] = [[]]
    for row in ordered:
        if out[-1] and (len(out[-1]) + 1) * row.num_tokens > tokens_per_batch:
            out.append([])
        out[-1].append(row)
    rng.shuffle(out)
    return out


def token_losses(model: torch.nn.Module, batch: list[Rendered]) -> torch.Tensor:
    """Cross entropy of every response token of the batch, in nats, row after row."""
    device = next(model.parameters()).device
    ids = torch.zeros(len(batch), max(row.num_tokens for row in batch), dtype=torch.long)
    for i, row in enumerate(batch):
        ids[i, : row.num_tokens] = torch.tensor(row.input_ids[0])
    positions = [i * ids.shape[1] + t for i, row in enumerate(batch) for t in row.response_index[0]]
    labels = torch.tensor([token for row in batch for token in row.labels], device=device)
    causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # Padding is on the right, so a causal model needs no mask. Only response tokens go through the output layer.
    hidden = causal_lm.model(input_ids=ids.to(device), use_cache=False).last_hidden_state
    logits = causal_lm.lm_head(hidden.flatten(0, 1)[torch.tensor(positions, device=device)])
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


@torch.no_grad()
def row_losses(model: torch.nn.Module, rows: list[Rendered], tokens_per_batch: int) -> list[float]:
    """Each row's loss in nats, summed over its response tokens, in the order of `rows` and the model's precision."""
    model.eval()
    index = {id(row): i for i, row in enumerate(rows)}
    out = [0.0] * len(rows)
    for batch in batches(rows, tokens_per_batch, random.Random(0)):
        losses = token_losses(model, batch).double().split([len(row.labels) for row in batch])
        for row, row_loss in zip(batch, losses, strict=True):
            out[index[id(row)]] = row_loss.sum().item()
    model.train()
    return out


def nats_per_token(model: torch.nn.Module, rows: list[Rendered], tokens_per_batch: int) -> float:
    """Mean loss over all response tokens of the rows."""
    return sum(row_losses(model, rows, tokens_per_batch)) / sum(len(row.labels) for row in rows)


def load_base(reference: str, device: str) -> tuple[torch.nn.Module, Any]:
    """The base model in float32 and its tokenizer, from a GGUF file inside a Python package."""
    gguf = package_path(reference)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    base = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers 5.17 sets the bos_token here. An adapter trained with it never ends an answer.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(base.config.eos_token_id)
    return base.to(device), tokenizer


def train(
    spec: dict[str, Any], training: list[Rendered], base: torch.nn.Module, checkpoint: Path
) -> tuple[PeftModel, dict[str, Any]]:
    """Train on the rendered rows of one epoch. Returns the model (base and adapter) and its costs.

    Every 50 steps the state is written to `checkpoint`. A run that finds the file of the same recipe there goes on
    from it. The adapter's weights end rounded to bfloat16, the precision in which they are saved.
    """
    torch.manual_seed(spec["seed"])
    rng = random.Random(spec["seed"])
    device = next(base.parameters()).device.type
    lora = LoraConfig(task_type="CAUSAL_LM", r=spec["lora"]["r"], lora_alpha=spec["lora"]["alpha"],
                      lora_dropout=spec["lora"]["dropout"], target_modules=spec["lora"]["target_modules"])  # fmt: skip
    model = get_peft_model(base, lora)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=spec["lr"], weight_decay=spec["weight_decay"], betas=(0.9, 0.95))
    plan = [batch for _ in range(spec["epochs"]) for batch in batches(training, spec["tokens_per_batch"], rng)]
    warmup = max(1, round(spec["warmup_ratio"] * len(plan)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / len(plan))),
    )
    done, trained, seconds = 0, 0, 0.0
    if checkpoint.is_file() and (state := torch.load(checkpoint, weights_only=True))["recipe"] == spec:
        set_peft_model_state_dict(model, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done, trained, seconds = state["step"], state["trained"], state["seconds"]
    start = time.time() - seconds
    model.train()
    for step, batch in enumerate(plan[done:], done + 1):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda" or spec.get("autocast", False)):
            loss = token_losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        trained += sum(len(row.labels) for row in batch)
        if step % 20 == 0 or step == len(plan):
            rate = trained / (time.time() - start)
            print(f"{spec['name']} {step}/{len(plan)} loss {loss.item():.3f} {rate:.0f} tokens/s", file=sys.stderr)
        if step % 50 == 0:
            state = {"recipe": spec, "step": step, "trained": trained, "seconds": time.time() - start,
                     "adapter": get_peft_model_state_dict(model, save_embedding_layers=False), "optimizer": optimizer.state_dict(),
                     "schedule": schedule.state_dict()}  # fmt: skip
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    for parameter in weights:
        parameter.data = parameter.data.bfloat16().float()
    return model, {
        "steps": len(plan),
        "response_tokens_trained": trained,
        "seconds": round(time.time() - start, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def save(model: PeftModel, spec: dict[str, Any], output: Path) -> None:
    """Write the adapter in bfloat16, with the recipe's reference to the base."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = spec["base"]
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if "lora_" in name}
    # By default PEFT looks for the base on the hub, to see whether its vocabulary was changed.
    model.save_pretrained(output, state_dict=state, save_embedding_layers=False)
    (output / "adapter_model.safetensors").chmod(0o644)


def override(spec: dict[str, Any], settings: list[str]) -> None:
    """Apply `KEY.KEY=VALUE` settings in place. A value is read as YAML and cast to the type of the one that it replaces."""
    for setting in settings:
        path, value = setting.split("=", 1)
        *parents, last = path.split(".")
        node = spec
        for parent in parents:
            node = node[parent]
        node[last] = type(node[last])(yaml.safe_load(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with the recipe's data files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override a field, e.g. lora.r=16")
    options = parser.parse_args()
    spec = yaml.safe_load(options.recipe.read_text())
    override(spec, options.set)
    base, tokenizer = load_base(spec["base"], options.device)
    renderer = Renderer(tokenizer, [BUILTIN[spec["template"]]], spec["max_length"])
    rows = training_rows(spec, options.data)
    training, truncation = renderer.render_all(rows)
    model, spent = train(spec, training, base, options.output / "checkpoint.pt")
    save(model, spec, options.output)

    measured: dict[str, Any] = {}
    home = f"{spec['name']}.jsonl"
    files = [home] if home in spec["data"] else spec["data"]  # a specialist is measured at home
    for split in ("validation", "held_out"):
        rendered, _ = renderer.render_all(
            [row for file in files for row in permissive_rows(options.data / file, split)]
        )
        adapted = nats_per_token(model, rendered, spec["tokens_per_batch"])
        with model.disable_adapter():
            measured[split] = {
                "rows": len(rendered),
                "response_tokens": sum(len(row.labels) for row in rendered),
                "base": nats_per_token(model, rendered, spec["tokens_per_batch"]),
                "adapter": adapted,
            }
    report = {
        "recipe": spec,
        "nats_per_response_token": measured,
        "rows_per_epoch": dict(Counter(row.source for row in rows)),
        "licences": {row.source: row.licence for row in rows},
        "truncation": str(truncation),
        "response_tokens_per_epoch": sum(len(row.labels) for row in training),
        **spent,
    }
    (options.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "checkpoint.pt").unlink(missing_ok=True)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
