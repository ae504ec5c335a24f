"""What a comparison shows, in sentences computed from its numbers alone, and what each number means."""

from __future__ import annotations

from collections.abc import Sequence

from ultrafuser.report.data import BASELINES, MEAN, Column, Comparison
from ultrafuser.report.tables import decimals, in_one_line

_VERDICTS = {"better": "wins on", "level": "ties on", "worse": "loses on"}


def summary(comparison: Comparison) -> list[str]:
    """Where the main system stands, wins, ties and loses; and what failed. A sentence or two an item."""
    main = comparison.main
    if main is None or main not in comparison.done:
        named = "The main system" if main is None else f"{comparison.label(main)}, the main system,"
        said = [f"{named} was not measured, so nothing can be said about it."]
    else:
        pairs = [text for rival in BASELINES if (text := _against(comparison, main, rival))]
        said = [*_loss_rank(comparison, main), *_task_ranks(comparison, main), *pairs]
        said += _not_compared(comparison, main)
        if pairs:
            said.append(
                "To win or lose means that the 95% interval of the paired difference on the same samples excludes "
                "zero; all else is a tie."
            )
    return [*said, *_choices(comparison), *_failures(comparison)]


def _loss_rank(comparison: Comparison, main: str) -> list[str]:
    """The mean loss and the place that it gives."""
    if not comparison.losses:
        return []
    column = comparison.losses[-1]
    values = {
        name: cell.value
        for name, cell in comparison.values(column, finite=True).items()
        if comparison.systems[name].kind != "oracle"
    }
    label = comparison.label(main)
    if main not in values:
        return [f"{label} has no loss that could be compared."]
    own = values.pop(main)
    places = decimals(column, comparison)
    over = f"the mean of {len(comparison.domains)} domains" if column.name == MEAN else column.heading
    text = f"{label} has a loss of {own:.{places}f} nats per response token on {over}"
    if not values:
        return [f"{text}."]
    ahead = sum(value < own for value in values.values())
    rival = min(values, key=lambda name: values[name])
    other = f"{comparison.label(rival)} ({values[rival]:.{places}f})"
    if not ahead:
        tied = "tied with" if values[rival] == own else "next is"
        return [f"{text}, the lowest of {len(values) + 1} systems; {tied} {other}."]
    return [f"{text}, number {ahead + 1} of {len(values) + 1} systems; the lowest is that of {other}."]


def _task_ranks(comparison: Comparison, main: str) -> list[str]:
    """On how many tasks the main system has the best score."""
    mine = [column for column in comparison.scores if comparison.value(main, column)]
    if not mine:
        return []
    first = [column for column in mine if main in comparison.best(column)]
    where = f": {_listed(first)}" if first else ""
    size = "the one task" if len(mine) == 1 else f"{len(first)} of {len(mine)} tasks"
    best = f"the best score on {size}{where}" if first else f"the best score on none of {len(mine)} tasks"
    return [f"{comparison.label(main)} has {best}."]


def _against(comparison: Comparison, main: str, rival: str) -> str:
    """Wins, ties and losses of the main system against a rival, losses and tasks apart."""
    clauses = []
    for what, columns in (("in loss", comparison.losses), ("in task scores", comparison.scores)):
        found: dict[str, list[Column]] = {verdict: [] for verdict in _VERDICTS}
        for column in columns:
            pair = comparison.pair(main, rival, column)
            if pair and pair.versus != main:
                found[comparison.verdict(pair, column)].append(column)
        said = [f"{words} {_listed(found[verdict])}" for verdict, words in _VERDICTS.items() if found[verdict]]
        if said:
            clauses.append(f"{what} it {_joined(said)}")
    if not clauses:
        return ""
    return f"Against {BASELINES[rival]}, {'; '.join(clauses)}."


def _not_compared(comparison: Comparison, main: str) -> list[str]:
    """Rivals that were measured, but that the main system has no paired differences to."""
    measured = {
        "best_specialist": bool(comparison.specialist_systems),
        "oracle": any(system.kind == "oracle" for system in comparison.done.values()),
        "router": any(system.kind == "router" for system in comparison.done.values()),
    }
    lacks = [BASELINES[rival] for rival in measured if measured[rival] and not _against(comparison, main, rival)]
    if not lacks:
        return []
    return [f"There are no paired differences to {_joined(lacks, 'or')}, so no win or loss is claimed there."]


def _choices(comparison: Comparison) -> list[str]:
    """On how many answers a judge gave no verdict."""
    out = []
    for system in comparison.done.values():
        by = (system.chosen or {}).get("by", {})
        if by.get("judge") and (others := by.get("log_prob", 0)):
            out.append(f"{system.label}: the judge gave no verdict on {others:,} of {others + by['judge']:,} questions; there the "
                       "log-probability chose.")  # fmt: skip
    return out


def _failures(comparison: Comparison) -> list[str]:
    failed = [f"{system.label} ({in_one_line(system.error or '')})" for system in comparison.failed.values()]
    if not failed:
        return []
    size = "1 system" if len(failed) == 1 else f"{len(failed)} systems"
    return [f"{size} failed and {'has' if len(failed) == 1 else 'have'} no numbers: {'; '.join(failed)}."]


def _listed(columns: Sequence[Column]) -> str:
    return _joined([column.heading if column.name != MEAN or column.is_task else "the mean" for column in columns])


def _joined(items: Sequence[str], word: str = "and") -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"


_LOSS = {
    "nats per response token": (
        "Minus the mean natural logarithm of the probability that a system gives to each token of the reference "
        "answer; e to its power is the perplexity. Prompts do not count. Within a domain every token counts the "
        "same; in the mean every domain does. A dash: the loss is not defined for this kind of system."
    ),
}
_INTERVALS = {
    "95% interval": (
        "Percentiles of the number over bootstrap resamples of the test samples: how far it might move with other "
        "samples of the same kind. For answers that are right or wrong: Wilson's interval."
    ),
}
_PAIRED = {
    "paired difference": (
        "The mean over the samples of the difference between two systems on the same sample. Samples differ much in "
        "difficulty, so two intervals may overlap although the difference, which takes that out, is clear."
    ),
    "best specialist at home": "The specialist with the best number on that domain or task, chosen for each afterwards.",
}
_RELATIVE = {
    "relative score": (
        "A number against that of the best specialist of the same column, which is 100%. For a loss: the ratio of the "
        "geometric mean probabilities of a reference token, exp(loss of the specialist − loss of the system). For a "
        "task: the ratio of the scores (its inverse where lower is better)."
    ),
}
_TASKS = {
    "unparsed": "Answers that held no readable result. They count as wrong.",
    "refused, unparsed, error, unscored": "With a judge: verdicts that it refused, that could not be read, or that never "
    "came, and samples that have no score for it. They count for no one.",
}
_COSTS = {
    "tokens/s": "New tokens a second, one prompt at a time: the median of several runs on the same machine.",
    "peak memory": "The most memory that the process, or torch on a GPU, held from loading to those answers.",
    "parameters": "Total: all that are kept. Active: those that take part in one token. Trained: those that were changed.",
}
_GATE = {
    "gate weight": (
        "The share of a specialist in the mix at a token. At every token the weights of all specialists sum to 1; "
        "means over response tokens are shown."
    ),
}
_STABILITY = {
    "deviation over checkpoints": "The sample standard deviation (n − 1) of the loss over the saved steps of a training.",
}


def glossary(comparison: Comparison) -> dict[str, str]:
    """Terms that the page uses, and what they mean."""
    parts = [
        (bool(comparison.losses), _LOSS),
        (bool(comparison.columns), _INTERVALS),
        (bool(comparison.columns) and len(comparison.done) > 1, _RELATIVE),
        (any(system.paired for system in comparison.done.values()), _PAIRED),
        (bool(comparison.scores), _TASKS),
        (any(system.tokens_per_s or system.peak_memory_mb for system in comparison.done.values()), _COSTS),
        (bool(comparison.gate_weights or comparison.sample_weights), _GATE),
        (bool(comparison.stability), _STABILITY),
    ]
    entries = {term: words for shown, part in parts if shown for term, words in part.items()}
    for column in comparison.scores:
        if description := comparison.tasks[column.name].description:
            entries[f"{column.heading}, {column.metric}"] = description
    return entries | {s.kind_label: s.description for s in comparison.systems.values() if s.description}
