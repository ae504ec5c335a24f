"""The label and the description of each kind of system."""

from __future__ import annotations

KINDS = {
    "base": ("base", "The model that the specialists were tuned from, untouched."),
    "specialist": ("specialist", "A model tuned for one domain, by itself."),
    "oracle": (
        "oracle",
        "The best specialist of each domain or task, chosen after the fact: a mark to reach, not a system.",
    ),
    "static": ("static", "The specialists mixed with the same weights at every token."),
    "merge": ("merged", "One model made from the weights of the specialists."),
    "tuned": ("tuned", "One model trained further on the data that the fused model is trained on."),
    "router": ("router", "Each sample is answered by the one specialist that a classifier picks."),
    "best_of": ("best of n", "Every specialist answers, and a judge picks an answer; it has no loss."),
    "btx": (
        "BTX",
        "Branch-Train-MiX: the specialists' feed-forward layers as experts of one mixture, trained further.",
    ),
    "fused": ("fused", "The specialists mixed at every token by a trained gate."),
}
