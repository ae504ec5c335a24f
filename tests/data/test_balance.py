"""The balanced sampler: exact counts in every global batch, whatever the ranks, the accumulation and the interruptions."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from torch.utils.data import DataLoader

from ultrafuser.data.balance import BalancedBatchSampler, TokenBatches
from ultrafuser.errors import DataError

DOMAINS = ["text"] * 7 + ["code"] * 3 + ["math"] * 12
LENGTHS = [(37 * i) % 23 for i in range(len(DOMAINS))]


def sampler(samples: int = 4, batches: int = 6, **options) -> BalancedBatchSampler:
    return BalancedBatchSampler(DOMAINS, samples, batches, **options)


def global_batches(batches: BalancedBatchSampler) -> list[list[int]]:
    """The union of the micro-batches of one optimizer step."""
    micro = list(batches)
    size = batches.num_micro_batches
    assert len(micro) == len(batches) == size * batches.num_batches
    return [list(itertools.chain(*micro[i : i + size])) for i in range(0, len(micro), size)]


def by_rank(batches: BalancedBatchSampler, num_ranks: int) -> list[list[list[int]]]:
    """The micro-batches of each rank, as accelerate hands them out."""
    return [
        list(BatchSamplerShard(batches, num_processes=num_ranks, process_index=rank, split_batches=False))
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("rows_per_device", [1, 2, 5, None])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["as-drawn", "by-length"])
def test_exact_counts_in_every_global_batch_over_ranks_and_accumulation(num_ranks, rows_per_device, lengths):
    batches = sampler(rows_per_device=rows_per_device, num_ranks=num_ranks, lengths=lengths)
    ranks = by_rank(batches, num_ranks)
    assert {len(micro) for micro in ranks} == {batches.num_batches * batches.num_accumulation}
    for step in range(batches.num_batches):
        window = slice(step * batches.num_accumulation, (step + 1) * batches.num_accumulation)
        rows = [row for micro in ranks for batch in micro[window] for row in batch]
        assert Counter(DOMAINS[row] for row in rows) == {"text": 4, "code": 4, "math": 4}


def test_the_same_rows_in_every_step_whatever_the_ranks_and_the_micro_batches():
    expected = [Counter(rows) for rows in sampler().global_batches()]
    for num_ranks, size, lengths in itertools.product([1, 2, 3, 6], [1, 2, 3, None], [None, LENGTHS]):
        batches = sampler(rows_per_device=size, num_ranks=num_ranks, lengths=lengths)
        assert [Counter(rows) for rows in global_batches(batches)] == expected, (num_ranks, size)


@pytest.mark.parametrize(
    ("samples", "ranks", "limit", "size", "accumulation"),
    [(4, 1, 8, 6, 2), (4, 2, 8, 6, 1), (4, 1, 5, 4, 3), (4, 1, None, 12, 1), (4, 1, 1, 1, 12), (4, 3, 100, 4, 1)],
)
def test_micro_batches_are_as_large_as_allowed(samples, ranks, limit, size, accumulation):
    batches = sampler(samples, rows_per_device=limit, num_ranks=ranks)
    assert (batches.micro_size, batches.num_accumulation) == (size, accumulation)
    assert {len(batch) for batch in batches} == {size}


def test_rows_of_similar_length_share_a_micro_batch():
    batches = sampler(rows_per_device=3, lengths=LENGTHS)
    micro = list(itertools.islice(batches, batches.num_micro_batches))
    lengths = [[LENGTHS[row] for row in batch] for batch in micro]
    assert list(itertools.chain(*lengths)) == sorted(itertools.chain(*lengths))


def test_seeded():
    assert list(sampler(seed=3)) == list(sampler(seed=3)) == list(iter(sampler(seed=3)))
    assert list(sampler(seed=3)) != list(sampler(seed=4))
    batches = sampler(seed=3)
    assert list(batches) == list(batches), "iterating twice must give the same batches"


def test_more_batches_begin_with_the_same_ones():
    assert list(sampler(batches=3)) == list(sampler(batches=9))[: len(sampler(batches=3))]


@pytest.mark.parametrize("skipped", [1, 5, 12])
def test_skipping_batches_is_resuming(skipped):
    batches = sampler(rows_per_device=2, lengths=LENGTHS)
    loader = DataLoader(range(len(DOMAINS)), batch_sampler=batches, collate_fn=list)
    assert list(skip_first_batches(loader, skipped)) == list(loader)[skipped:]


def test_every_row_of_a_domain_is_seen_before_any_comes_again():
    drawn = [row for rows in sampler(samples=4, batches=20).global_batches() for row in rows]
    for domain in ("text", "code", "math"):
        domain_rows = [row for row in drawn if DOMAINS[row] == domain]
        have = DOMAINS.count(domain)
        epochs = [domain_rows[i : i + have] for i in range(0, len(domain_rows) - have + 1, have)]
        assert all(len(set(epoch)) == have for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1, "each epoch has an order of its own"


def test_domains_are_shuffled_apart_from_each_other():
    """Adding a domain does not change what is drawn of the others."""
    balanced = BalancedBatchSampler(DOMAINS, 2, 5)
    two = BalancedBatchSampler([*DOMAINS, "mixed"], 2, 5)
    for first, second in zip(balanced.global_batches(), two.global_batches(), strict=True):
        assert set(first) <= set(second)


def test_unbalanced_draws_from_all_rows_alike():
    batches = sampler(samples=4, batches=11, balanced=False)
    batches = global_batches(batches)
    assert {len(rows) for rows in batches} == {12}
    seen = Counter(itertools.chain(*batches))
    assert set(seen.values()) == {6}, "22 rows, 132 draws: every row 6 times"
    assert {tuple(sorted(Counter(DOMAINS[r] for r in rows).items())) for rows in batches} != {
        (("code", 4), ("math", 4), ("text", 4))
    }


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="no rows to draw batches from"):
        BalancedBatchSampler([], 4, 1)


def test_a_batch_that_ranks_cannot_share_is_an_error():
    with pytest.raises(
        DataError, match=r"5 rows from each of 3 domains \(code, math, text\).* 2 processes. Change samples"
    ):
        sampler(samples=5, num_ranks=2)


# ---------------------------------------------------------------- micro-batches of a number of tokens


def token_ranks(max_tokens: int, num_ranks: int, batches: BalancedBatchSampler) -> list[list[list[list[int]]]]:
    """The micro-batches of each rank and step."""
    return [list(TokenBatches(batches, max_tokens, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("max_tokens", [1, 22, 40, 60, 10_000])
def test_the_rows_of_each_step_in_passes_of_at_most_so_many_tokens(num_ranks, max_tokens):
    batches = sampler(rows_per_device=None, num_ranks=num_ranks, lengths=LENGTHS)
    steps = list(zip(*token_ranks(max_tokens, num_ranks, batches), strict=True))
    assert len(steps) == len(TokenBatches(batches, max_tokens)) == batches.num_batches
    for rows, ranks in zip(batches.global_batches(), steps, strict=True):
        assert Counter(rows) == Counter(row for rank in ranks for micro in rank for row in micro)
        assert len({tuple(map(len, rank)) for rank in ranks}) == 1, "as many passes of as many rows on all ranks"
        for micro in itertools.chain(*ranks):
            assert len(micro) == 1 or len(micro) * max(LENGTHS[row] for row in micro) <= max_tokens


@pytest.mark.parametrize(
    ("max_tokens", "sizes"), [(1, [1] * 12), (60, [2, 3, 4, 3]), (10_000, [12])], ids=["alone", "some", "all"]
)
def test_passes_are_as_large_as_allowed_from_the_longest_row_on(max_tokens, sizes):
    lengths = [21, 30, 20, 19, 18, 15, 15, 14, 13, 10, 9, 2]
    batches = BalancedBatchSampler(["text"] * 12, 12, 1, lengths=lengths, rows_per_device=None)
    ((*step,),) = TokenBatches(batches, max_tokens)
    assert list(map(len, step)) == sizes
    flat = [lengths[row] for micro in step for row in micro]
    assert flat == sorted(lengths, reverse=True)


def test_less_padding_and_smaller_passes_than_as_many_by_rows():
    rng = random.Random(0)
    lengths = [round(rng.lognormvariate(4.8, 0.5)) for _ in range(500)]  # many short rows and a few long ones
    by_rows = list(BalancedBatchSampler(["text"] * 500, 96, 5, rows_per_device=8, lengths=lengths))
    steps = TokenBatches(BalancedBatchSampler(["text"] * 500, 96, 5, rows_per_device=None, lengths=lengths), 1350)
    by_tokens = list(itertools.chain(*steps))
    padded = [[len(rows) * max(lengths[row] for row in rows) for rows in passes] for passes in (by_rows, by_tokens)]
    assert len(by_rows) == len(by_tokens) == 60
    assert list(map(sum, padded)) == [72728, 71631], "padding included"
    assert list(map(max, padded)) == [3320, 1350]
