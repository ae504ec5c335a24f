"""Fixtures of traces and results."""

from trace_fixtures import metrics, results, trace  # noqa: F401
