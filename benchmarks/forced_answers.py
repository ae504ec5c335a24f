"""How often fused models would give the answer of an exam word for word, read in one pass instead of generated.

    for exam in text code math mixed; do ultrafuser data exam $exam --split test --rows 250 --output runs/forced/$exam.jsonl; done
    python benchmarks/forced_answers.py runs/forced/*.jsonl --models plain=runs/plain/fused held=runs/held/fused --rows 150

An answer counts if each of its tokens is the most likely one after those before it. Other right answers do not count, so the
shares are below those of the exams, but one pass takes a quarter of the time. The table has the share and nats per response
token of the fused model and of each of its specialists, and differences between the models on the same rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import ultrafuser
from ultrafuser.data.collate import collate_rows, length_batches
from ultrafuser.data.packed import lengths_of
from ultrafuser.data.sources import load_rows
from ultrafuser.evaluate.intervals import Stratum, difference, estimate
from ultrafuser.model.loss import select_responses, token_chunks
from ultrafuser.model.mixing import mix_logits
from ultrafuser.progress import ConsoleProgress

TOKENS_PER_PASS = 1024


@torch.no_grad()
def read(folder: str, files: list[Path], limit: int) -> dict[str, dict[str, list[dict]]]:
    """By domain and system (`fused` or a specialist): id, nats, tokens, and whether all tokens were the most likely ones."""
    model, renderer = ultrafuser.load(folder, dtype="float32", device_map="cpu")
    rows, _ = renderer.render_all([row for file in files for row in load_rows(str(file))[:limit]])
    results: dict[str, dict[str, list[dict]]] = {}
    progress = ConsoleProgress()
    progress.start(folder, len(rows))
    for batch in length_batches(lengths_of(rows), TOKENS_PER_PASS):
        inputs = collate_rows([rows[i] for i in batch])
        labelled = inputs["labels"] != -100
        states = model.specialist_states(inputs["specialist_input_ids"])
        states = select_responses(states, inputs["response_index"], labelled)  # K x (N, D_k)
        labels, log_weights = inputs["labels"][labelled], model.log_weights(states)
        scores = []
        for chunk in token_chunks(len(labels), model.heads()[0].weight):
            logits = [head.logits(state[chunk]) for head, state in zip(model.heads(), states, strict=True)]
            scored = [_score(z, labels[chunk]) for z in logits]
            fused = mix_logits(logits, log_weights[chunk], model.config.mixing, model.config.masked_token_ids)
            scores.append(torch.stack([_score(fused, labels[chunk]), *scored], 1))  # (n, 1 + K, 2)
        for i, values in zip(batch, torch.cat(scores).split([len(rows[i].labels) for i in batch]), strict=True):
            for k, name in enumerate(("fused", *model.config.names)):
                nats, likely = values[:, k].unbind(-1)
                row = {
                    "id": rows[i].row_id,
                    "nats": float(nats.sum()),
                    "tokens": len(nats),
                    "right": bool(likely.all()),
                }
                results.setdefault(rows[i].domain, {}).setdefault(name, []).append(row)
        progress.advance(len(batch))
    progress.finish()
    return results


def _score(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of each label, and whether it is the most likely token: (n, V), (n,) -> (n, 2)."""
    log_p = logits.log_softmax(-1)
    return torch.stack([-log_p.gather(1, labels[:, None])[:, 0], (log_p.argmax(-1) == labels).float()], -1)


def share(rows: list[dict]) -> Stratum:
    """The share of right answers in percent, over rows."""
    return Stratum({row["id"]: 100.0 * row["right"] for row in rows}, {row["id"]: 1.0 for row in rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="Rows of each exam.")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--rows", type=int, default=150, help="Of each file, the first ones.")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results: dict[str, dict] = {}
    for model in args.models:
        name, _, folder = model.partition("=")
        results[name] = read(folder, args.files, args.rows)
        for domain, systems in results[name].items():
            for system, rows in systems.items():
                cell, tokens = estimate([share(rows)]), sum(row["tokens"] for row in rows)
                low, high = cell["ci95"]
                nats = sum(row["nats"] for row in rows) / tokens
                print(f"{name} {domain} {system}: {cell['value']:.1f}% ({low:.1f} to {high:.1f}), {nats:.4f} nats")
        first = next(iter(results))
        for domain in results[name] if name != first else ():
            pair = difference([share(results[name][domain]["fused"])], [share(results[first][domain]["fused"])])
            assert pair is not None
            low, high = pair["ci95"]
            print(f"{name} - {first} {domain}: {pair['difference']:+.1f} ({low:+.1f} to {high:+.1f})", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
