"""Ask a fused model behind a server, and print each token on the colour of the specialist that leads.

    ultrafuser serve my-fused --engine embedded     # in another terminal
    pip install openai
    python examples/serve_and_chat.py http://127.0.0.1:8000/v1 "What is 15% of 80?"

The key is read from ULTRAFUSER_API_KEY, if the server wants one.
"""

from __future__ import annotations

import argparse
import os

from openai import OpenAI
from rich.console import Console
from rich.text import Text

from ultrafuser.inspect.terminal import token_style
from ultrafuser.inspect.trace import leader


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="address of the server, including /v1")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args(arguments)

    client = OpenAI(base_url=options.url, api_key=os.environ.get("ULTRAFUSER_API_KEY", "none"))
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": options.prompt}],
        max_tokens=options.max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"gate_weights": True},  # a field of ultrafuser
    )
    console, shares = Console(highlight=False), {}
    for chunk in stream:
        for choice in chunk.choices:
            extension = (choice.model_extra or {}).get("gate_weights") or {"tokens": [], "weights": []}
            for token, weights in zip(extension["tokens"], extension["weights"], strict=True):
                console.print(Text(token, token_style(*leader(weights)), end=""), end="", soft_wrap=True)
        if chunk.usage:
            shares = (chunk.usage.model_extra or {}).get("specialist_shares", {})
    console.print()
    line = Text()
    for index, (name, share) in enumerate(shares.items()):
        line.append(f" {name} ", token_style(index, 1.0)).append(f" {share:.2f}   ")
    console.print(line)


if __name__ == "__main__":
    main()
