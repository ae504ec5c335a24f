"""A response with the gate weights of each of its tokens: the plain data that every renderer here reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ultrafuser.errors import DataError

# Weights computed in bfloat16 have 8 significant bits: three of them may miss 1 by about 0.006.
SUM_TOLERANCE = 1e-2

# Control characters would act on the terminal, break XML, or vanish: show pictures of them.
_PICTURES = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], 0xFFFD)
)


@dataclass(frozen=True)
class TokenTrace:
    """The tokens of one response and, for each, the weight of every specialist.

    tokens: (T) decoded pieces. Joined they are the response.
    weights: (T, K) rows. Each is non-negative and sums to 1. Any nested sequence of numbers will do.
    specialists: (K) names, in the order of a row.
    domain: the domain (stratum) of the data row, where known.

    Raises:
        DataError: T or K disagree, or a row of weights is not a distribution. The message names the token.
    """

    tokens: list[str]
    weights: list[list[float]]
    specialists: list[str]
    prompt: str = ""
    domain: str | None = None
    title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", list(self.tokens))
        object.__setattr__(self, "specialists", list(self.specialists))
        object.__setattr__(self, "weights", [[float(w) for w in row] for row in self.weights])
        if not self.specialists:
            raise DataError("token trace: no specialists, expected at least one name")
        if len(set(self.specialists)) < len(self.specialists):
            raise DataError(f"token trace: specialists {self.specialists} repeat a name. Names must differ")
        if len(self.weights) != len(self.tokens):
            raise DataError(
                f"token trace: {len(self.weights)} rows of weights for {len(self.tokens)} tokens; "
                "expected one row per response token (cut the prompt's rows off)"
            )
        for position, row in enumerate(self.weights):
            self._check_row(position, row)

    def _check_row(self, position: int, row: list[float]) -> None:
        location = f"token trace: token {position} ({self.tokens[position]!r})"
        if len(row) != len(self.specialists):
            raise DataError(
                f"{location} has {len(row)} weights, expected {len(self.specialists)}, one per specialist "
                f"({', '.join(self.specialists)})"
            )
        if any(not math.isfinite(w) or w < 0 for w in row):
            raise DataError(f"{location} has weights {row}, expected finite numbers that are not negative")
        if abs(sum(row) - 1) > SUM_TOLERANCE:
            raise DataError(
                f"{location} has weights that sum to {sum(row):.4f}, expected 1; "
                "pass the gate's weights after the softmax, not its scores"
            )

    @property
    def text(self) -> str:
        """The response: all tokens joined."""
        return "".join(self.tokens)

    @property
    def leaders(self) -> list[tuple[int, float]]:
        """(T) pairs of the leading specialist's index and its margin over the next one, in [0, 1]."""
        return [leader(row) for row in self.weights]

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenTrace:
        """Rebuild what `to_dict` wrote.

        Raises:
            DataError: a key is unknown or missing, or the trace itself is not sound.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(names))
        missing = [name for name in ("tokens", "weights", "specialists") if name not in data]
        if unknown or missing:
            raise DataError(f"token trace: unknown keys {unknown}, missing keys {missing}, expected {names}")
        return cls(**data)


def leader(row: Sequence[float]) -> tuple[int, float]:
    """Index of the largest weight and its margin over the second. The margin of a lone specialist is its weight."""
    best = max(range(len(row)), key=lambda k: row[k])
    second = max((w for k, w in enumerate(row) if k != best), default=0.0)
    return best, row[best] - second


def mean_weights(traces: Iterable[TokenTrace]) -> dict[str, float]:
    """Mean weight of each specialist over all tokens of all traces (long responses count for more).

    Raises:
        DataError: the traces name different specialists, or hold no token at all.
    """
    traces = list(traces)
    rows = [row for trace in traces for row in trace.weights]
    if not rows:
        raise DataError(f"mean weights: {len(traces)} traces without a single token, expected at least one token")
    specialists = traces[0].specialists
    for index, trace in enumerate(traces):
        if trace.specialists != specialists:
            raise DataError(
                f"mean weights: trace {index} has specialists {trace.specialists}, expected {specialists} as in trace 0"
            )
    return {name: math.fsum(row[k] for row in rows) / len(rows) for k, name in enumerate(specialists)}


def mean_weights_by_domain(traces: Iterable[TokenTrace]) -> dict[str, dict[str, float]]:
    """`mean_weights` of each domain, domains in order of first appearance (table 6 of the paper).

    Raises:
        DataError: a trace has no domain, or as in `mean_weights`.
    """
    groups: dict[str, list[TokenTrace]] = {}
    for index, trace in enumerate(traces):
        if trace.domain is None:
            raise DataError(f"mean weights by domain: trace {index} has no domain. Set TokenTrace.domain")
        groups.setdefault(trace.domain, []).append(trace)
    return {domain: mean_weights(group) for domain, group in groups.items()}


def printable(text: str) -> str:
    """The text with control characters replaced by visible pictures. Length, tabs and newlines stay the same."""
    return text.translate(_PICTURES)


def on_one_line(token: str) -> str:
    """A token as a table cell or tooltip shows it: its whitespace made visible."""
    return printable(token).replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
