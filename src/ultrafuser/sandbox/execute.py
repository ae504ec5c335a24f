"""Run a program in an isolation that works on this machine, and turn its end into an outcome."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import signal
import subprocess
import sys
from typing import Any

from ultrafuser.errors import SandboxError
from ultrafuser.sandbox.conversation import Conversation
from ultrafuser.sandbox.isolation import Isolation, resource_limits, spare_user, started_driver
from ultrafuser.sandbox.program import DEFAULT_LIMITS, Limits, Outcome, Program
from ultrafuser.sandbox.syscalls import ARCHITECTURES

QUOTED_BYTES = 2000  # of the printed output, in an error
# What a working sandbox must prevent: the network, the host of a virtual machine (AF_VSOCK, 40), files in the scratch
# folder, unlimited processes.
TRIAL = """
import os, socket, time
try:
    socket.socket(40)
    raise AssertionError("system calls are not filtered")
except PermissionError:
    pass
interfaces = [name for _, name in socket.if_nameindex() if name != "lo"]
assert not interfaces, f"the network is visible: {interfaces}"
assert os.listdir(".") == [], "the scratch folder is not empty"
started = 0
try:
    while started < 16:
        if os.fork() == 0:
            time.sleep(60)
        started += 1
except BlockingIOError:
    pass
assert started < 16, "the number of processes cannot be limited"
"""


def run(program: str, *, limits: Limits = DEFAULT_LIMITS, unsafe: bool = False) -> Outcome:
    """Run a program as `__main__`. It passes when it reaches its end without an exception or an exit.

    Args:
        unsafe: run it without a sandbox.

    Raises:
        SandboxError: there is no sandbox on this machine, and `unsafe` is not set.
    """
    return _run_safely(Program(program, module="__main__"), limits, unsafe)


def check(
    answer: str, tests: str, *, setup: str = "", limits: Limits = DEFAULT_LIMITS, unsafe: bool = False
) -> Outcome:
    """Run `setup`, `answer` and `tests` in one namespace. The answer passes only if the tests end without an exception.

    The module is not `__main__`, so that a block under `if __name__ == "__main__"` does not run, as in HumanEval's own
    harness. `unsafe` and errors are as in `run`.
    """
    return _run_safely(Program(answer, tests, setup), limits, unsafe)


def decide(answer: str, tests: str, subject: str = "", **options: Any) -> Outcome:
    """As `check`, but never with the status "error", which says nothing about the answer: a sandbox that fails runs again.

    Args:
        subject: names the answer in the error.
        options: those of `check`.

    Raises:
        SandboxError: there is no sandbox on this machine, and `unsafe` is not set. Or it failed twice.
    """
    for _ in range(2):
        outcome = check(answer, tests, **options)
        if outcome.status != "error":
            return outcome
    prefix = f"{subject}: " if subject else ""
    raise SandboxError(f"{prefix}the sandbox failed twice, so the answer has no score: {outcome.detail}")


def available() -> str | None:
    """Why there is no sandbox on this machine, or None if there is one. The result of the first call is cached."""
    return find_isolation()[1]


@functools.cache
def find_isolation() -> tuple[Isolation, str | None]:
    """The first isolation that passes a trial, or "none" and the reason."""
    if not sys.platform.startswith("linux"):
        return "none", f"namespaces exist on Linux only, and this is {sys.platform}"
    if shutil.which("bwrap") is None:
        return "none", "bubblewrap (the command bwrap) is not installed"
    if platform.machine() not in ARCHITECTURES:
        return "none", f"system calls are filtered on {', '.join(ARCHITECTURES)}, and this is {platform.machine()}"
    if not hasattr(os, "pidfd_open"):
        return "none", "this Python was built without os.pidfd_open"
    reasons = []
    candidates: tuple[Isolation, ...] = ("user", "namespace") if spare_user() is not None else ("namespace",)
    for isolation in candidates:
        outcome = _run(isolation, Program(TRIAL, module="__main__"), Limits(processes=4))
        if outcome.passed:
            return isolation, None
        reasons.append(outcome.detail)
    return "none", f"bubblewrap is installed but makes no sandbox here: {'; '.join(reasons)}"


def _run_safely(program: Program, limits: Limits, unsafe: bool) -> Outcome:
    if unsafe:
        return _run("none", program, limits)
    if (reason := available()) is not None:
        raise SandboxError(
            f"generated code runs only in a sandbox, and there is none: {reason}. Install bubblewrap 0.8 or newer "
            "(Debian, Ubuntu: apt-get install bubblewrap), or pass --unsafe-code to run the code without one"
        )
    return _run(find_isolation()[0], program, limits)


def _run(isolation: Isolation, program: Program, limits: Limits) -> Outcome:
    """One program from its start until all its processes have ended."""
    uid = spare_user() if isolation == "user" else None
    with started_driver(isolation, limits) as driver:
        conversation = Conversation(driver, program, limits, uid, resource_limits(isolation, limits))
        if (outcome := conversation.run()) is not None:
            return outcome
        # The driver hung up without a verdict. bubblewrap reports a signal as 128 + its number.
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.process.wait(1)
        code = driver.process.poll()
    output = bytes(conversation.printed[-QUOTED_BYTES:]).decode("utf-8", "replace").strip()
    if not conversation.started:
        return Outcome("error", output or f"the sandbox ended with code {code} before the program started")
    if code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return Outcome("timeout", f"used more than {limits.timeout_s:g} s of processor time")
    ending = "hung up" if code is None else f"ended with code {code}"
    return Outcome("failed", f"the program {ending} before its tests did" + (f": {output}" if output else ""))
