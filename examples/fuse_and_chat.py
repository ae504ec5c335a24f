"""Fuse checkpoints that share a tokenizer, answer one question, and show the weights at every token.

    python examples/fuse_and_chat.py text=path/to/a code=path/to/b --prompt "What is a heap?" --output fused

The weights of an untrained gate are about equal. Train it with `ultrafuser train` and a recipe that has `fused: fused`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ultrafuser
from ultrafuser.inspect.run import answer, trace_tokens


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specialists", nargs="+", metavar="NAME=MODEL", help="hub id or folder, two or more")
    parser.add_argument("--prompt", default="Write a Python function that returns the n-th prime.")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, help="save the fused checkpoint in this folder")
    options = parser.parse_args(arguments)

    pairs = [text.partition("=")[::2] for text in options.specialists]
    recipe = ultrafuser.load_recipe({"specialists": [{"name": name, "model": model} for name, model in pairs]})
    model, tokenizer = ultrafuser.fuse(recipe)
    renderer = ultrafuser.Renderer(tokenizer, [spec["chat_template"] for spec in model.config.specialists])

    chat = [{"role": "user", "content": options.prompt}]
    [ids] = answer(model, renderer, [chat], max_new_tokens=options.max_new_tokens, do_sample=False)
    if ids:
        trace = trace_tokens(model, renderer, chat, ids)
        print("  ".join(f"{name:>8}" for name in trace.specialists))
        for token, weights in zip(trace.tokens, trace.weights, strict=True):
            print("  ".join(f"{weight:8.3f}" for weight in weights), repr(token))
        print(trace.text)

    if options.output:
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
