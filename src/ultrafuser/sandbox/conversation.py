"""The parent's side of the protocol with driver.py: send a program, read its replies, enforce the time limit."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import time
from collections.abc import Mapping
from typing import Any

from ultrafuser.sandbox.isolation import Driver
from ultrafuser.sandbox.program import Limits, Outcome, Program

START_TIMEOUT_S = 60.0  # for bubblewrap and the interpreter on a busy machine. Not counted against the program
MAX_LINE_BYTES = 64 * 1024  # of one reply
_READ_BYTES = 64 * 1024
_SEND_BYTES = 1 << 20


class Conversation:
    """Messages to the driver and from it, until a verdict or the first limit.

    Args:
        uid: the user that the driver becomes. None: it stays the user that it is.
        resources: names and values for resource.setrlimit.

    Attributes:
        printed: the program's output so far.
        started: whether the program's own code has begun.
    """

    def __init__(
        self, driver: Driver, program: Program, limits: Limits, uid: int | None, resources: Mapping[str, int]
    ) -> None:
        self.channel, self.output, self.limits = driver.channel, driver.output, limits
        self.proof = secrets.token_hex(32)
        request = {"module": program.module, "setup": program.setup, "answer": program.answer}
        self.unsent = _encode_line({**request, "uid": uid, "limits": dict(resources)})
        # Sent only after the answer's own code has ended, so that it cannot read the proof.
        self.final = _encode_line({"tests": program.tests, "proof": self.proof})
        self.received = b""  # of a reply that is not complete
        self.printed = bytearray()
        self.started = self.ready = self.hung_up = False
        self.deadline = time.monotonic() + START_TIMEOUT_S

    def run(self) -> Outcome | None:
        """The outcome, or None when the driver hung up without one."""
        outcome = self._exchange_messages()
        # The program may have printed more before its last message.
        while not self._printed_too_much() and self._read_output():
            pass
        if self._printed_too_much():
            return Outcome("output", f"printed more than {self.limits.output_bytes} bytes")
        if outcome is not None or self.hung_up:
            return outcome
        if self.started:
            return Outcome("timeout", f"still running after {self.limits.timeout_s:g} s")
        return Outcome("error", f"the sandbox did not start within {START_TIMEOUT_S:g} s")

    def _exchange_messages(self) -> Outcome | None:
        """Send and receive until an outcome, a limit, or the end of the channel."""
        outcome: Outcome | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self.channel, selectors.EVENT_READ | selectors.EVENT_WRITE)
            selector.register(self.output, selectors.EVENT_READ)
            while outcome is None and not self.hung_up:
                # 1. Wait until something can be read or sent, or the time is over.
                selector.modify(self.channel, selectors.EVENT_READ | (selectors.EVENT_WRITE if self.unsent else 0))
                events = selector.select(max(0.0, self.deadline - time.monotonic()))
                # 2. Read the output, and exchange messages.
                for key, mask in events:
                    if key.fd != self.output:
                        outcome = self._use_channel(mask) or outcome
                    elif not self._read_output():  # closed
                        selector.unregister(self.output)
                # 3. Stop at a limit.
                if self._printed_too_much() or time.monotonic() >= self.deadline:
                    break
        return outcome

    def _printed_too_much(self) -> bool:
        return len(self.printed) > self.limits.output_bytes

    def _read_output(self) -> bool:
        """Read what was printed. False if there was nothing."""
        with contextlib.suppress(BlockingIOError):
            chunk = os.read(self.output, _READ_BYTES)
            self.printed += chunk
            return bool(chunk)
        return False

    def _use_channel(self, mask: int) -> Outcome | None:
        """Send and receive as much as is possible without waiting."""
        try:
            if mask & selectors.EVENT_WRITE:
                self.unsent = self.unsent[self.channel.send(self.unsent[:_SEND_BYTES]) :]
            if mask & selectors.EVENT_READ:
                return self._receive(self.channel.recv(_READ_BYTES))
        except BlockingIOError:
            return None
        except OSError:  # reset or closed by the other side
            self.hung_up = True
        return None

    def _receive(self, chunk: bytes) -> Outcome | None:
        """Split what arrived into replies, and read each."""
        self.hung_up = not chunk
        *lines, self.received = (self.received + chunk).split(b"\n")
        for line in lines:
            if outcome := self._read_reply(line):
                return outcome
        if len(self.received) > MAX_LINE_BYTES:
            return Outcome("output", "flooded the channel of its verdict")
        return None

    def _read_reply(self, line: bytes) -> Outcome | None:
        word, _, detail = line.decode("utf-8", "replace").partition(": ")
        if word == "started" and not self.started:  # the program's time begins
            self.started = True
            self.deadline = time.monotonic() + self.limits.timeout_s
        elif word == "ready" and self.started and not self.ready:  # the answer has ended
            self.ready = True
            self.unsent += self.final
        elif word == "memory":
            return Outcome("memory", f"{detail}: needed more than {self.limits.memory_bytes} bytes")
        elif self.ready and hmac.compare_digest(line, self.proof.encode()):  # the tests have ended
            return Outcome("passed")
        elif word == "failed":
            return Outcome("failed", detail)
        else:
            return Outcome("failed", "something else than the driver wrote on its channel")
        return None


def _encode_line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"  # ASCII, so that a lone surrogate in an answer arrives too
