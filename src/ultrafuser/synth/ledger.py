"""What became of everything that was asked for: asked = kept + rejected by reason (+ open, while a run is under way)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 3  # rejected texts that are quoted for each reason
EXCERPT_CHARS = 300
# The order in which items go through: stages that ask, then what is decided without asking.
ORDER = ("meta_topics", "sub_topics", "instructions", "expand", "complex", "responses", "filters", "checks", "samples", "judge",
         "turns", "review", "duplicates", "decontamination", "balance")  # fmt: skip


@dataclass
class Entry:
    """One stage of one domain.

    Attributes:
        surplus: items of replies beyond what was asked for; they are left alone and count nowhere else.
        examples: reason -> a few rejected texts, shortened.
    """

    asked: int = 0
    kept: int = 0
    open: int = 0
    surplus: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def balanced(self) -> bool:
        """Whether everything asked for is accounted for."""
        return self.asked == self.kept + self.open + self.rejected.total()


class Ledger:
    """The entries of all stages and domains."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Entry] = {}

    def entry(self, stage: str, domain: str) -> Entry:
        """The entry of a stage and domain."""
        return self.entries.setdefault((stage, domain), Entry())

    def request(self, stage: str, domain: str, number: int = 1) -> None:
        """So many items are wanted."""
        self.entry(stage, domain).asked += number

    def keep(self, stage: str, domain: str, number: int = 1) -> None:
        """So many items went on."""
        self.entry(stage, domain).kept += number

    def leave_open(self, stage: str, domain: str, number: int = 1) -> None:
        """So many items are not answered yet."""
        self.entry(stage, domain).open += number

    def reject(self, stage: str, domain: str, reason: str, text: str = "", number: int = 1) -> None:
        """So many items were left out, and why; `text` is an example."""
        if not number:
            return
        entry = self.entry(stage, domain)
        entry.rejected[reason] += number
        examples = entry.examples.setdefault(reason, [])
        if text and len(examples) < EXAMPLES:
            text = text.encode("utf-8", "replace").decode()  # without halves of characters, which no file can hold
            examples.append(text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS] + "...")

    def decide(self, stage: str, domain: str, reason: str | None, text: str = "") -> bool:
        """One item is asked about and at once kept (no reason) or rejected; whether it was kept."""
        self.request(stage, domain)
        if reason is None:
            self.keep(stage, domain)
        else:
            self.reject(stage, domain, reason, text)
        return reason is None

    def unbalanced(self) -> list[str]:
        """Stages whose numbers do not add up; always empty, or there is a mistake in this program."""
        return [
            f"{stage} of {domain}: asked {one.asked}, kept {one.kept}, open {one.open}, rejected {one.rejected.total()}"
            for (stage, domain), one in self.entries.items()
            if not one.balanced
        ]

    def open(self) -> int:
        """Items of all stages that are not answered yet."""
        return sum(entry.open for entry in self.entries.values())

    def rows(self) -> list[dict[str, Any]]:
        """Every entry as JSON, in the order in which items go through."""
        out = []
        for (stage, domain), one in sorted(self.entries.items(), key=lambda pair: _place(pair[0])):
            out.append({"stage": stage, "domain": domain, "asked": one.asked, "kept": one.kept, "open": one.open,
                        "surplus": one.surplus, "rejected": dict(one.rejected.most_common()),
                        "examples": {reason: one.examples[reason] for reason in sorted(one.examples) if one.examples[reason]}})  # fmt: skip
        return out

    def reasons(self, stage: str | None = None) -> Counter[str]:
        """Rejected items by reason, over all domains."""
        total: Counter[str] = Counter()
        for (own, _), entry in self.entries.items():
            if stage is None or own == stage:
                total.update(entry.rejected)
        return total


def _place(key: tuple[str, str]) -> tuple[int, str, str]:
    stage, domain = key
    return (ORDER.index(stage) if stage in ORDER else len(ORDER), stage, domain)
