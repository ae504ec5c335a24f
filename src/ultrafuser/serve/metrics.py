"""Counters and times of the server, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ultrafuser.serve.engine import Engine, Token

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60)
_TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2)


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._names: Sequence[str] = engine.names
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "ultrafuser_requests",
            "Requests by route and status. 499: the client left.",
            ["route", "status"],
            registry=registry,
        )
        self._request_s = Histogram(
            "ultrafuser_request_seconds", "Time of a request.", ["route"], buckets=_REQUEST_BUCKETS_S, registry=registry
        )
        self._first_token_s = Histogram(
            "ultrafuser_time_to_first_token_seconds",
            "Time from a request to the first token of each of its answers.",
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._token_s = Histogram(
            "ultrafuser_inter_token_seconds",
            "Time between two tokens of an answer.",
            buckets=_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._prompt_tokens = Counter("ultrafuser_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._generated_tokens = Counter("ultrafuser_generated_tokens", "Tokens of answers.", registry=registry)
        self._weights = Counter(
            "ultrafuser_gate_weight",
            "Gate weights of each specialist, summed over the tokens of answers.",
            ["specialist"],
            registry=registry,
        )
        running = Gauge("ultrafuser_answers_running", "Answers that are being generated.", registry=registry)
        waiting = Gauge("ultrafuser_answers_waiting", "Answers in the queue.", registry=registry)
        running.set_function(lambda: engine.running)
        waiting.set_function(lambda: engine.waiting)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request."""
        self._requests.labels(route, str(status)).inc()
        self._request_s.labels(route).observe(seconds)

    def prompt(self, tokens: int) -> None:
        """Count an accepted prompt."""
        self._prompt_tokens.inc(tokens)

    def token(self, token: Token, seconds: float, is_first: bool) -> None:
        """Count a token of an answer.

        Args:
            seconds: since the answer's token before it, or since the request.
        """
        self._generated_tokens.inc()
        for name, weight in zip(self._names, token.weights, strict=True):
            self._weights.labels(name).inc(weight)
        (self._first_token_s if is_first else self._token_s).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
