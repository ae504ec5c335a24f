"""Counts of the items of every stage and domain: asked = kept + rejected + pending."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TypedDict

EXAMPLES = 3  # rejected texts that are quoted for each reason
EXCERPT_CHARS = 300
# The order in which items go through: stages that make requests, then decisions without a model.
ORDER = ("meta_topics", "sub_topics", "instructions", "expand", "complex", "responses", "filters", "checks", "samples", "judge",
         "turns", "review", "duplicates", "decontamination", "balance")  # fmt: skip


class EntryRow(TypedDict):
    """An entry in `report.json`. `open`: items that are pending."""

    stage: str
    domain: str
    asked: int
    kept: int
    open: int
    surplus: int
    rejected: dict[str, int]
    examples: dict[str, list[str]]


@dataclass
class Entry:
    """One stage of one domain.

    Attributes:
        pending: items without a response so far.
        surplus: items of replies beyond the number asked for. They are ignored.
        examples: reason -> a few rejected texts, shortened.
    """

    asked: int = 0
    kept: int = 0
    pending: int = 0
    surplus: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def balanced(self) -> bool:
        """Whether every item asked for is accounted for."""
        return self.asked == self.kept + self.pending + self.rejected.total()


class Ledger:
    """The entries of all stages and domains."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Entry] = {}

    def entry(self, stage: str, domain: str) -> Entry:
        """The entry of a stage and domain."""
        return self.entries.setdefault((stage, domain), Entry())

    def request(self, stage: str, domain: str, count: int = 1) -> None:
        """Count items that are asked for."""
        self.entry(stage, domain).asked += count

    def keep(self, stage: str, domain: str, count: int = 1) -> None:
        """Count items that go on to the next stage."""
        self.entry(stage, domain).kept += count

    def mark_pending(self, stage: str, domain: str, count: int = 1) -> None:
        """Count items without a response so far."""
        self.entry(stage, domain).pending += count

    def reject(self, stage: str, domain: str, reason: str, text: str = "", count: int = 1) -> None:
        """Count items that are left out. `text` is an example."""
        if not count:
            return
        entry = self.entry(stage, domain)
        entry.rejected[reason] += count
        examples = entry.examples.setdefault(reason, [])
        if text and len(examples) < EXAMPLES:
            text = text.encode("utf-8", "replace").decode()  # no file can hold lone surrogates
            examples.append(text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS] + "...")

    def decide(self, stage: str, domain: str, reason: str | None, text: str = "") -> bool:
        """Count one item as asked for, and as kept (no reason) or rejected. Returns whether it is kept."""
        self.request(stage, domain)
        return self.settle(stage, domain, reason, text)

    def settle(self, stage: str, domain: str, reason: str | None, text: str = "") -> bool:
        """Count one item that was asked for as kept (no reason) or rejected. Returns whether it is kept."""
        if reason is None:
            self.keep(stage, domain)
        else:
            self.reject(stage, domain, reason, text)
        return reason is None

    def unbalanced(self) -> list[str]:
        """Entries whose numbers do not add up. Any such entry is a mistake in this program."""
        return [
            f"{stage} of {domain}: asked {entry.asked}, kept {entry.kept}, pending {entry.pending}, "
            f"rejected {entry.rejected.total()}"
            for (stage, domain), entry in self.entries.items()
            if not entry.balanced
        ]

    def pending(self) -> int:
        """Items of all stages without a response so far."""
        return sum(entry.pending for entry in self.entries.values())

    def rows(self) -> list[EntryRow]:
        """Every entry as JSON, in the order in which items go through."""
        return [
            {
                "stage": stage,
                "domain": domain,
                "asked": entry.asked,
                "kept": entry.kept,
                "open": entry.pending,
                "surplus": entry.surplus,
                "rejected": dict(entry.rejected.most_common()),
                "examples": {reason: texts for reason, texts in sorted(entry.examples.items()) if texts},
            }
            for (stage, domain), entry in sorted(self.entries.items(), key=lambda pair: _order(pair[0]))
        ]

    def reasons(self, stage: str | None = None) -> Counter[str]:
        """Rejected items by reason, over all domains."""
        total: Counter[str] = Counter()
        for (entry_stage, _), entry in self.entries.items():
            if stage in (None, entry_stage):
                total.update(entry.rejected)
        return total


def _order(key: tuple[str, str]) -> tuple[int, str, str]:
    stage, domain = key
    return (ORDER.index(stage) if stage in ORDER else len(ORDER), stage, domain)
