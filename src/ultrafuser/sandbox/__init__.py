"""Runs Python that nobody has read: in bubblewrap's namespaces, with limits, and with a verdict that printing or exiting cannot give.

`driver.py` is the program inside. docs/sandbox.md says what is kept out, and what is not.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import json
import math
import os
import secrets
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ultrafuser.errors import SandboxError

Status = Literal["passed", "failed", "timeout", "memory", "output", "error"]
# How the program gets an identity of its own. "user": root starts it and it becomes a user id that owns nothing. "namespace": a user
# namespace, for everybody else. "none": no sandbox.
Way = Literal["user", "namespace", "none"]

DRIVER = Path(__file__).with_name("driver.py")
SCRATCH = "/scratch"
CACHE = "/etc/ld.so.cache"  # where the dynamic linker finds libraries
START_TIMEOUT_S = 60.0  # for bubblewrap and the interpreter to start on a busy machine; not counted against the program
MAX_LINE = 64 * 1024  # bytes of one reply
OPEN_FILES = 64
KEPT_OUTPUT = 2000  # bytes of what was printed that an error quotes
FORBIDDEN = """
import os, socket, time
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


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    `timeout_s` is wall-clock time from the first line of the answer to the last of its tests. `memory_bytes` is address space and counts for
    each process. `processes` counts threads too. `file_bytes` bounds each file and, in the sandbox, the scratch folder as a whole.
    `output_bytes` is what may be printed, to stdout and stderr together.
    """

    timeout_s: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 8
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `error` means that the sandbox failed, not the program: such a run says nothing about the answer."""

    status: Status
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run(program: str, *, limits: Limits = Limits(), unsafe: bool = False) -> Outcome:
    """Runs a program as `__main__`; it passes when it reaches its end without an exception or an exit.

    Raises: SandboxError without a sandbox, unless `unsafe`.
    """
    return _judge({"module": "__main__", "setup": "", "answer": program}, "", limits, unsafe)


def check(answer: str, tests: str, *, setup: str = "", limits: Limits = Limits(), unsafe: bool = False) -> Outcome:
    """Runs `setup`, then `answer`, then `tests` in one namespace; it passes only when the tests ran to their end without an exception.

    The module is not `__main__`, so a block under `if __name__ == "__main__"` stays out, as in HumanEval's own harness.

    Raises: SandboxError without a sandbox, unless `unsafe`.
    """
    return _judge({"module": "answer", "setup": setup, "answer": answer}, tests, limits, unsafe)


def available() -> str | None:
    """Why there is no sandbox here, or None where there is one. The first call tries it out, later ones remember."""
    return _find_way()[1]


@functools.cache
def _find_way() -> tuple[Way, str | None]:
    """The first way that passes a trial: no network, an empty scratch folder, and a limit on processes that holds."""
    if not sys.platform.startswith("linux"):
        return "none", f"namespaces exist on Linux only, and this is {sys.platform}"
    if shutil.which("bwrap") is None:
        return "none", "bubblewrap (the command bwrap) is not installed"
    if not hasattr(os, "pidfd_open"):
        return "none", "this Python was built without os.pidfd_open"
    reasons = []
    ways: tuple[Way, ...] = ("user", "namespace") if _spare_user() is not None else ("namespace",)
    for way in ways:
        outcome = _run(way, {"module": "__main__", "setup": "", "answer": FORBIDDEN}, "", Limits(processes=4))
        if outcome.passed:
            return way, None
        reasons.append(outcome.detail)
    return "none", f"bubblewrap is installed but makes no sandbox here: {'; '.join(reasons)}"


def _judge(request: dict[str, Any], tests: str, limits: Limits, unsafe: bool) -> Outcome:
    if unsafe:
        return _run("none", request, tests, limits)
    if (reason := available()) is not None:
        raise SandboxError(
            f"generated code runs only in a sandbox, and there is none: {reason}; "
            "install bubblewrap 0.8 or newer (Debian, Ubuntu: apt-get install bubblewrap), or pass --unsafe-code to run the code without one"
        )
    return _run(_find_way()[0], request, tests, limits)


def _run(way: Way, request: dict[str, Any], tests: str, limits: Limits) -> Outcome:
    """One program from its start until nothing of it is left."""
    uid = _spare_user() if way == "user" else None
    request = {**request, "uid": uid, "limits": _resource_limits(way, limits)}
    with _started(way, limits) as (process, channel, output):
        conversation = _Conversation(channel, output, request, tests, limits)
        outcome = conversation.hold()
        if outcome is None:  # it hung up without a verdict
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            outcome = _ended(process.poll(), conversation, limits)
    return outcome


def _ended(code: int | None, conversation: _Conversation, limits: Limits) -> Outcome:
    """The outcome of a program that ended without a verdict. bwrap reports a signal as 128 + its number."""
    printed = bytes(conversation.printed[-KEPT_OUTPUT:]).decode("utf-8", "replace").strip()
    if not conversation.started:
        return Outcome("error", printed or f"the sandbox ended with code {code} before the program started")
    if code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return Outcome("timeout", f"used more than {limits.timeout_s:g} s of processor time")
    ending = "hung up" if code is None else f"ended with code {code}"
    return Outcome("failed", f"the program {ending} before its tests did" + (f": {printed}" if printed else ""))


class _Conversation:
    """What is said to the driver and heard from it, until a verdict or the first limit."""

    def __init__(
        self, channel: socket.socket, output: int, request: dict[str, Any], tests: str, limits: Limits
    ) -> None:
        self.channel, self.output, self.limits = channel, output, limits
        self.proof = secrets.token_hex(32)
        self.final = _line({"tests": tests, "proof": self.proof})  # sent only after the answer's own code has run
        self.unsent = _line(request)
        self.heard = b""
        self.printed = bytearray()
        self.started = self.ready = self.hung_up = False
        self.deadline = time.monotonic() + START_TIMEOUT_S

    def hold(self) -> Outcome | None:
        """The outcome, or None when the other side hung up without one."""
        outcome: Outcome | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self.channel, selectors.EVENT_READ | selectors.EVENT_WRITE)
            selector.register(self.output, selectors.EVENT_READ)
            while outcome is None and not self.hung_up:
                selector.modify(self.channel, selectors.EVENT_READ | (selectors.EVENT_WRITE if self.unsent else 0))
                events = selector.select(max(0.0, self.deadline - time.monotonic()))
                for key, mask in events:
                    if key.fd == self.output:
                        if not self._read_output():
                            selector.unregister(self.output)
                    else:
                        outcome = self._exchange(mask) or outcome
                if self.printed_too_much() or time.monotonic() >= self.deadline:
                    break
        while (
            not self.printed_too_much() and self._read_output()
        ):  # what was printed before the last word on the channel
            pass
        if self.printed_too_much():
            return Outcome("output", f"printed more than {self.limits.output_bytes} bytes")
        return outcome or (None if self.hung_up else self._too_late())

    def printed_too_much(self) -> bool:
        return len(self.printed) > self.limits.output_bytes

    def _too_late(self) -> Outcome:
        if self.started:
            return Outcome("timeout", f"still running after {self.limits.timeout_s:g} s")
        return Outcome("error", f"the sandbox did not start within {START_TIMEOUT_S:g} s")

    def _read_output(self) -> bool:
        """Whether anything was there to read."""
        with contextlib.suppress(BlockingIOError):
            chunk = os.read(self.output, 64 * 1024)
            self.printed += chunk
            return bool(chunk)
        return False

    def _exchange(self, mask: int) -> Outcome | None:
        try:
            if mask & selectors.EVENT_WRITE:
                self.unsent = self.unsent[self.channel.send(self.unsent[: 1 << 20]) :]
            if mask & selectors.EVENT_READ:
                return self._hear(self.channel.recv(64 * 1024))
        except BlockingIOError:
            return None
        except OSError:  # reset or closed by the other side
            self.hung_up = True
        return None

    def _hear(self, chunk: bytes) -> Outcome | None:
        self.hung_up = not chunk
        *lines, self.heard = (self.heard + chunk).split(b"\n")
        for line in lines:
            if outcome := self._understand(line):
                return outcome
        return Outcome("output", "flooded the channel of its verdict") if len(self.heard) > MAX_LINE else None

    def _understand(self, line: bytes) -> Outcome | None:
        word, _, detail = line.decode("utf-8", "replace").partition(": ")
        if word == "started" and not self.started:
            self.started = True
            self.deadline = time.monotonic() + self.limits.timeout_s
        elif word == "ready" and self.started and not self.ready:
            self.ready = True
            self.unsent += self.final
        elif word == "memory":
            return Outcome("memory", f"{detail}: needed more than {self.limits.memory_bytes} bytes")
        elif self.ready and hmac.compare_digest(line, self.proof.encode()):
            return Outcome("passed")
        else:
            return Outcome(
                "failed", detail if word == "failed" else "something else than the driver wrote on its channel"
            )
        return None


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"  # ASCII, so that a lone surrogate in an answer travels too


def _resource_limits(way: Way, limits: Limits) -> dict[str, int]:
    """Names and values for resource.setrlimit."""
    values = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": math.ceil(limits.timeout_s) + 1,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_NPROC": limits.processes
        + (way == "namespace"),  # there bubblewrap's own first process has the same user
        "RLIMIT_AS": limits.memory_bytes,
    }
    if sys.platform == "darwin":  # refuses every value
        del values["RLIMIT_AS"]
    return values


def _spare_user() -> int | None:
    """A user id that nobody has, at random, when we may become it: RLIMIT_NPROC counts by user, and never for root."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return None
    ranges = [
        tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    ]
    first, _, length = max(ranges, key=lambda extent: extent[2])
    length = min(length, 1 << 31)
    return first + length // 2 + secrets.randbelow(length // 4) if length >= 4096 else None


@contextlib.contextmanager
def _started(way: Way, limits: Limits) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket, int]]:
    """The process, our end of its channel, and the end of its output to read from; on leaving, all of it is killed and gone."""
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        ours.setblocking(False)
        output, printed = os.pipe()
        stack.callback(os.close, output)
        os.set_blocking(output, False)
        info, told = os.pipe()
        stack.callback(os.close, info)
        folder = None
        if way == "none":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ultrafuser-", ignore_cleanup_errors=True))
        try:
            process = subprocess.Popen(
                _command(way, limits, theirs.fileno(), told),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=(theirs.fileno(), told) if way != "none" else (theirs.fileno(),),
                cwd=folder or "/",
                env=_environment(folder or SCRATCH),
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(printed)
            os.close(told)
        stack.callback(_stop_group, process)
        if way != "none" and (first := _first_process(info)) is not None:
            stack.callback(_stop_namespace, first)
        yield process, ours, output


def _environment(home: str) -> dict[str, str]:
    return {"HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}


def _command(way: Way, limits: Limits, channel: int, info: int) -> list[str]:
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    driver = str(DRIVER) if way == "none" else "/driver.py"
    inside = [python, "-I", "-S", "-B", "-X", "utf8", driver, str(channel)]
    return inside if way == "none" else [*_bubblewrap(way, limits, python, info), "--", *inside]


def _bubblewrap(way: Way, limits: Limits, python: str, info: int) -> list[str]:
    bwrap = [str(shutil.which("bwrap")), "--info-fd", str(info), "--die-with-parent", "--new-session", "--clearenv"]
    bwrap += [
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--cap-drop",
        "ALL",
    ]
    if way == "user":
        bwrap += [
            "--cap-add",
            "CAP_SETUID",
            "--cap-add",
            "CAP_SETGID",
        ]  # gone once the driver has become the other user
    else:
        bwrap += ["--unshare-user", "--disable-userns"]
    for name, value in _environment(SCRATCH).items():
        bwrap += ["--setenv", name, value]
    bwrap += [*_readable(python), "--ro-bind", str(DRIVER), "/driver.py", "--proc", "/proc", "--dev", "/dev"]
    # bubblewrap leaves / and /dev writable, without a limit on size; and /proc/sys to its owner, who may be root.
    bwrap += [
        "--size",
        "4096",
        "--tmpfs",
        "/proc/sys",
        "--perms",
        "1777",
        "--size",
        str(limits.file_bytes),
        "--tmpfs",
        SCRATCH,
    ]
    return [*bwrap, "--remount-ro", "/proc/sys", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", SCRATCH]


def _readable(python: str) -> list[str]:
    """Arguments that show the sandbox what an interpreter needs, read-only: itself, its libraries, and the system's."""
    prefix = os.path.realpath(sys.base_prefix)
    folders = ["/usr/lib", "/usr/lib32", "/usr/lib64", f"{prefix}/lib", f"{prefix}/lib64", "/lib", "/lib32", "/lib64"]
    shown = [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
    parents = {str(parent): None for path in [*shown, python, CACHE] for parent in reversed(Path(path).parents[:-1])}
    arguments = []
    for parent in parents:  # bubblewrap would make those for its own user alone
        arguments += ["--perms", "0755", "--dir", parent]
    for folder in shown:
        link = os.path.islink(folder)
        arguments += ["--symlink", os.readlink(folder), folder] if link else ["--ro-bind", folder, folder]
    return [*arguments, "--ro-bind", python, python, "--ro-bind-try", CACHE, CACHE]


def _first_process(info: int) -> int | None:
    """A pidfd of the first process inside; None when bubblewrap made none."""
    said = b""
    while b"}" not in said and (chunk := os.read(info, 4096)):
        said += chunk
    with contextlib.suppress(json.JSONDecodeError, ProcessLookupError):
        return os.pidfd_open(json.loads(said)["child-pid"])
    return None


def _stop_namespace(first: int) -> None:
    """Kills the first process of a PID namespace and with it all others; the kernel reports its end only after theirs."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(first, signal.SIGKILL)
    gone = select.poll()
    gone.register(first, select.POLLIN)
    gone.poll()
    os.close(first)


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
