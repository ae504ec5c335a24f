"""Draw batches with exactly the same number of rows of every domain (paper, section 3.1 and algorithm 1)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from ultrafuser.data.collate import length_batches
from ultrafuser.errors import DataError


class BalancedBatchSampler:
    """Micro-batches, of which each `num_micro_batches` form one global batch with n rows of each domain.

    With several ranks, rank r takes the micro-batches r, r + W, r + 2W, ... (as accelerate distributes them). So the
    global batch does not depend on W or on the accumulation. The order depends on the seed alone, so a run resumes in
    mid-epoch by skipping the batches it has used. When all rows of a domain are used, they start over in a new order.

    Source: "Balanced sampler" in section 3.1. The ablation of table 2 is `balanced=False`, which draws from all rows.
    """

    def __init__(
        self,
        domains: Sequence[str],
        samples_per_domain: int,
        num_batches: int,
        *,
        rows_per_device: int | None = 8,
        num_ranks: int = 1,
        lengths: Sequence[int] | None = None,
        seed: int = 0,
        balanced: bool = True,
    ) -> None:
        """
        Args:
            domains: the domain of each row.
            samples_per_domain: rows of each domain in a global batch.
            num_batches: global batches, i.e. optimizer steps.
            rows_per_device: maximum rows of a micro-batch. None: the global batch divided by the ranks.
            lengths: tokens of each row. Rows of similar length then share a micro-batch, which saves padding.

        Raises:
            DataError: there are no rows, or the ranks cannot share a global batch equally.
        """
        self.rows: dict[str, list[int]] = {}
        for index, domain in enumerate(domains):
            self.rows.setdefault(domain, []).append(index)
        if not self.rows:
            raise DataError("there are no rows to draw batches from, expected at least one")
        self.global_batch_size = samples_per_domain * len(self.rows)
        if self.global_batch_size % num_ranks:
            raise DataError(
                f"a global batch of {samples_per_domain} rows from each of {len(self.rows)} domains "
                f"({', '.join(sorted(self.rows))}) cannot be shared equally by {num_ranks} processes. "
                "Change samples_per_domain"
            )
        share = self.global_batch_size // num_ranks
        self.micro_size = max(size for size in range(1, min(rows_per_device or share, share) + 1) if share % size == 0)
        self.num_accumulation = share // self.micro_size
        self.num_micro_batches = self.num_accumulation * num_ranks
        self.samples_per_domain, self.num_batches = samples_per_domain, num_batches
        self.lengths, self.seed, self.balanced = lengths, seed, balanced
        self.batch_size, self.drop_last = self.micro_size, False  # attributes that accelerate reads

    def __len__(self) -> int:
        return self.num_batches * self.num_micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        lengths = self.lengths
        for rows in self.global_batches():
            if lengths is not None:
                rows = sorted(rows, key=lengths.__getitem__)
            for start in range(0, self.global_batch_size, self.micro_size):
                yield rows[start : start + self.micro_size]

    def global_batches(self) -> Iterator[list[int]]:
        """The rows of each global batch, domain by domain."""
        pools = self.rows if self.balanced else {"": [row for rows in self.rows.values() for row in rows]}
        rows_per_pool = self.global_batch_size // len(pools)
        streams = [_endless(rows, f"{self.seed}/{name}") for name, rows in sorted(pools.items())]
        for _ in range(self.num_batches):
            yield [next(stream) for stream in streams for _ in range(rows_per_pool)]


class TokenBatches:
    """The rows of one rank in each global batch, as micro-batches of similar length and at most so many padded tokens.

    Rank r takes the rows r, r + W, r + 2W, ... of the batch in the order of length. Its row i is then no longer than that of
    the last rank, so micro-batches that fit there fit everywhere: all ranks have equally many, of equally many rows.
    """

    def __init__(self, sampler: BalancedBatchSampler, max_tokens: int, *, rank: int = 0, num_ranks: int = 1) -> None:
        """
        Args:
            sampler: of the global batches. It knows the lengths of the rows.
            max_tokens: rows times longest row of a micro-batch. A row that is longer is alone in one.
        """
        self.sampler, self.max_tokens, self.rank, self.num_ranks = sampler, max_tokens, rank, num_ranks
        self.batch_size, self.drop_last = 1, False  # attributes that accelerate reads

    def __len__(self) -> int:
        return self.sampler.num_batches

    def __iter__(self) -> Iterator[list[list[int]]]:
        assert self.sampler.lengths is not None
        lengths = self.sampler.lengths
        for rows in self.sampler.global_batches():
            rows = sorted(rows, key=lengths.__getitem__)
            longest = [lengths[row] for row in rows[self.num_ranks - 1 :: self.num_ranks]]
            rank_rows = rows[self.rank :: self.num_ranks]
            yield [[rank_rows[i] for i in batch] for batch in length_batches(longest, self.max_tokens)]


def _endless(rows: Sequence[int], seed: str) -> Iterator[int]:
    """The rows in random order without end, each round in a new order."""
    rng = random.Random(seed)
    while True:
        order = list(rows)
        rng.shuffle(order)
        yield from order
