"""Sentences about a comparison, computed from its numbers alone, and a glossary."""

from __future__ import annotations

from collections.abc import Sequence

from ultrafuser.report.data import BASELINES, MEAN, Column, Comparison
from ultrafuser.report.tables import decimals, in_one_line

_VERDICTS = {"better": "wins on", "level": "ties on", "worse": "loses on"}


def summary(comparison: Comparison) -> list[str]:
    """The rank of the main system, its wins, ties and losses, and the failures. One or two sentences per item."""
    main = comparison.main
    if main is None or main not in comparison.done:
        label = "The main system" if main is None else f"{comparison.label(main)}, the main system,"
        sentences = [f"{label} was not measured, so nothing can be said about it."]
    else:
        pairs = [text for rival in BASELINES if (text := _against(comparison, main, rival))]
        sentences = [*_loss_rank(comparison, main), *_task_ranks(comparison, main), *pairs]
        sentences += _not_compared(comparison, main)
        if pairs:
            sentences.append(
                "A win or a loss means that the 95% interval of the paired difference on the same samples excludes "
                "zero. All else is a tie."
            )
    return [*sentences, *_choices(comparison), *_failures(comparison)]


def _loss_rank(comparison: Comparison, main: str) -> list[str]:
    """The mean loss and its rank."""
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
    loss = values.pop(main)
    digits = decimals(column, comparison)
    over = f"the mean of {len(comparison.domains)} domains" if column.name == MEAN else column.heading
    text = f"{label} has a loss of {loss:.{digits}f} nats per response token on {over}"
    if not values:
        return [f"{text}."]
    ahead = sum(value < loss for value in values.values())
    rival = min(values, key=lambda name: values[name])
    rival_label = f"{comparison.label(rival)} ({values[rival]:.{digits}f})"
    if not ahead:
        tied = "tied with" if values[rival] == loss else "next is"
        return [f"{text}, the lowest of {len(values) + 1} systems; {tied} {rival_label}."]
    return [f"{text}, number {ahead + 1} of {len(values) + 1} systems; the lowest is that of {rival_label}."]


def _task_ranks(comparison: Comparison, main: str) -> list[str]:
    """On how many tasks the main system has the best score."""
    scored = [column for column in comparison.scores if comparison.value(main, column)]
    if not scored:
        return []
    label = comparison.label(main)
    first = [column for column in scored if main in comparison.best(column)]
    if not first:
        return [f"{label} has the best score on none of {len(scored)} tasks."]
    size = "the one task" if len(scored) == 1 else f"{len(first)} of {len(scored)} tasks"
    return [f"{label} has the best score on {size}: {_listed(first)}."]


def _against(comparison: Comparison, main: str, rival: str) -> str:
    """Wins, ties and losses of the main system against a rival, by loss and by task score."""
    clauses = []
    for measure, columns in (("in loss", comparison.losses), ("in task scores", comparison.scores)):
        outcomes: dict[str, list[Column]] = {verdict: [] for verdict in _VERDICTS}
        for column in columns:
            pair = comparison.pair(main, rival, column)
            if pair and pair.versus != main:
                outcomes[comparison.verdict(pair, column)].append(column)
        phrases = [f"{verb} {_listed(outcomes[verdict])}" for verdict, verb in _VERDICTS.items() if outcomes[verdict]]
        if phrases:
            clauses.append(f"{measure} it {_joined(phrases)}")
    if not clauses:
        return ""
    return f"Against {BASELINES[rival]}, {'; '.join(clauses)}."


def _not_compared(comparison: Comparison, main: str) -> list[str]:
    """Measured rivals to which the main system has no paired differences."""
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
    """How often a judge gave no verdict on the answers of a system."""
    sentences = []
    for system in comparison.done.values():
        by = (system.chosen or {}).get("by", {})
        if by.get("judge") and (undecided := by.get("log_prob", 0)):
            total = undecided + by["judge"]
            sentences.append(
                f"{system.label}: the judge gave no verdict on {undecided:,} of {total:,} questions. The log-probability chose "
                "those answers."
            )
    return sentences


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
        "answer. Its exponential is the perplexity. Prompts do not count. Within a domain every token has the same weight. In "
        "the mean every domain has the same weight. A dash: the loss is not defined for this kind of system."
    ),
}
_INTERVALS = {
    "95% interval": (
        "Percentiles of the number over bootstrap resamples of the test samples: how far it might move with other "
        "samples of the same kind. Answers that are right or wrong have Wilson's interval."
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
    "refused, unparsed, error, unscored": "With a judge: verdicts that it refused, that could not be parsed or that are "
    "missing, and samples without a score for that reason. They count for no system.",
}
_COSTS = {
    "tokens/s": "New tokens per second, one prompt at a time: the median of several runs on the same machine.",
    "peak memory": "The most memory that the process, or torch on a GPU, held from loading to those answers.",
    "parameters": "Total: all parameters. Active: used for one token. Trained: changed by training.",
}
_GATE = {
    "gate weight": (
        "The share of a specialist in the mix at a token. At every token the weights of all specialists sum to 1. The "
        "report shows means over response tokens."
    ),
}
_STABILITY = {
    "deviation over checkpoints": "The sample standard deviation (n − 1) of the loss over the saved steps of a training.",
}


def glossary(comparison: Comparison) -> dict[str, str]:
    """The terms of the page and their meanings."""
    groups = [
        (bool(comparison.losses), _LOSS),
        (bool(comparison.columns), _INTERVALS),
        (bool(comparison.columns) and len(comparison.done) > 1, _RELATIVE),
        (any(system.paired for system in comparison.done.values()), _PAIRED),
        (bool(comparison.scores), _TASKS),
        (any(system.tokens_per_s or system.peak_memory_mb for system in comparison.done.values()), _COSTS),
        (bool(comparison.gate_weights or comparison.sample_weights), _GATE),
        (bool(comparison.stability), _STABILITY),
    ]
    entries = {term: meaning for is_used, group in groups if is_used for term, meaning in group.items()}
    for column in comparison.scores:
        if description := comparison.tasks[column.name].description:
            entries[f"{column.heading}, {column.metric}"] = description
    return entries | {s.kind_label: s.description for s in comparison.systems.values() if s.description}
