"""Passes and padding of batches that are bounded by rows and by tokens, on the training rows of the zoo.

    python benchmarks/token_batches.py

32 rows of each domain in a step, 20 steps. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ultrafuser.data.balance import BalancedBatchSampler, TokenBatches
from ultrafuser.data.packed import domains_of, lengths_of
from ultrafuser.model.references import package_path
from ultrafuser.progress import Progress
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse, make_renderer
from ultrafuser.train.rows import read_sources

STEPS, ROWS_PER_DOMAIN, ROWS_PER_DEVICE = 20, 32, 8


def passes_by_rows(domains: Sequence[str], lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    options = {"rows_per_device": ROWS_PER_DEVICE, "num_ranks": num_ranks, "lengths": lengths}
    return list(BalancedBatchSampler(domains, ROWS_PER_DOMAIN, STEPS, **options))


def passes_by_tokens(
    domains: Sequence[str], lengths: Sequence[int], num_ranks: int, max_tokens: int
) -> Iterator[list[int]]:
    options = {"rows_per_device": None, "num_ranks": num_ranks, "lengths": lengths}
    sampler = BalancedBatchSampler(domains, ROWS_PER_DOMAIN, STEPS, **options)
    for rank in range(num_ranks):
        for step in TokenBatches(sampler, max_tokens, rank=rank, num_ranks=num_ranks):
            yield from step


def main() -> None:
    overrides = [f"data.train.{i}.limit=null" for i in range(4)]
    recipe = load_recipe(package_path("package:ultrafuser/zoo/fuse.yaml"), overrides)
    model, tokenizer = fuse(recipe)
    rows = read_sources(recipe.data.train, make_renderer(model, tokenizer, 512), Progress(), "training")
    domains, lengths = domains_of(rows), lengths_of(rows)
    print(f"{len(rows)} rows, {sorted(lengths)[len(rows) // 2]} tokens in the median, {max(lengths)} at most")

    def report(label: str, passes: Sequence[Sequence[int]], num_ranks: int) -> tuple[int, int]:
        sizes = [len(batch) * max(lengths[row] for row in batch) for batch in passes]
        padding = sum(sizes) / sum(lengths[row] for batch in passes for row in batch) - 1
        per_step = len(passes) / STEPS / num_ranks
        print(
            f"{label}: {per_step:.1f} passes for each step and process, largest {max(sizes)} tokens, padding {padding:.1%}"
        )
        return len(passes), max(sizes)

    for num_ranks in (1, 2):
        count, largest = report(f"{num_ranks} processes, rows", passes_by_rows(domains, lengths, num_ranks), num_ranks)
        same = list(passes_by_tokens(domains, lengths, num_ranks, largest))
        report(f"{num_ranks} processes, {largest} tokens", same, num_ranks)
        bound = next(
            tokens
            for tokens in range(max(lengths), largest + 1, 32)
            if len(list(passes_by_tokens(domains, lengths, num_ranks, tokens))) <= count
        )
        report(
            f"{num_ranks} processes, {bound} tokens",
            list(passes_by_tokens(domains, lengths, num_ranks, bound)),
            num_ranks,
        )


if __name__ == "__main__":
    main()
