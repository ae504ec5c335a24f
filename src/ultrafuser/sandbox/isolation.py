"""The processes of the sandbox: bubblewrap's command line, the driver's start, and the end of all its processes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from ultrafuser.sandbox.program import Limits
from ultrafuser.sandbox.syscalls import filter_program

# How the program gets an identity that owns nothing. "user": root starts it, and it becomes a user id that nobody has.
# "namespace": a user namespace, for everybody else. "none": no sandbox.
Isolation = Literal["user", "namespace", "none"]

DRIVER = Path(__file__).with_name("driver.py")
SCRATCH = "/scratch"
LINKER_CACHE = "/etc/ld.so.cache"  # where the dynamic linker finds libraries
KEY_LISTS = ("/proc/keys", "/proc/key-users")  # the key rings of whoever runs the evaluation
OPEN_FILES = 64


class Driver(NamedTuple):
    """A driver that was started.

    Attributes:
        channel: our end of the socket to the driver.
        output: file descriptor of what the program prints.
    """

    process: subprocess.Popen[bytes]
    channel: socket.socket
    output: int


def resource_limits(isolation: Isolation, limits: Limits) -> dict[str, int]:
    """Names and values for resource.setrlimit."""
    values = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": math.ceil(limits.timeout_s) + 1,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": OPEN_FILES,
        # In a user namespace, bubblewrap's own first process has the same user.
        "RLIMIT_NPROC": limits.processes + (isolation == "namespace"),
        "RLIMIT_AS": limits.memory_bytes,
    }
    if sys.platform == "darwin":  # which refuses every value
        del values["RLIMIT_AS"]
    return values


def spare_user() -> int | None:
    """A random user id that nobody has, or None if we may not become it. RLIMIT_NPROC counts by user, and never for root."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return None
    uid_map = Path("/proc/self/uid_map").read_text(encoding="ascii")
    ranges = [tuple(map(int, line.split())) for line in uid_map.splitlines()]
    first, _, length = max(ranges, key=lambda extent: extent[2])
    length = min(length, 1 << 31)
    return first + length // 2 + secrets.randbelow(length // 4) if length >= 4096 else None


@contextlib.contextmanager
def started_driver(isolation: Isolation, limits: Limits) -> Iterator[Driver]:
    """Start the driver. On leaving, kill it with all that it started, and wait until they have ended."""
    with contextlib.ExitStack() as stack:
        # 1. The ends that stay here, and those that the driver inherits.
        channel, driver_channel = socket.socketpair()
        stack.enter_context(channel)
        channel.setblocking(False)
        output, driver_output = os.pipe()
        stack.callback(os.close, output)
        os.set_blocking(output, False)
        info, bubblewrap_info = os.pipe()
        stack.callback(os.close, info)
        # 2. Start the process, and close its ends here.
        folder = None
        if isolation == "none":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ultrafuser-", ignore_cleanup_errors=True))
        seccomp = _open_filter() if isolation != "none" else -1
        inherited = [driver_channel.fileno(), *([bubblewrap_info, seccomp] if isolation != "none" else [])]
        try:
            process = subprocess.Popen(
                _command(isolation, limits, driver_channel.fileno(), bubblewrap_info, seccomp),
                stdin=subprocess.DEVNULL,
                stdout=driver_output,
                stderr=driver_output,
                pass_fds=inherited,
                cwd=folder or "/",
                env=_environment(folder or SCRATCH),
                start_new_session=True,
            )
        finally:
            driver_channel.close()
            os.close(driver_output)
            os.close(bubblewrap_info)
            if seccomp != -1:
                os.close(seccomp)
        # 3. On leaving, first the namespace ends, then the process group.
        stack.callback(_stop_group, process)
        if isolation != "none" and (first := _first_process(info)) is not None:
            stack.callback(_stop_namespace, first)
        yield Driver(process, channel, output)


def _open_filter() -> int:
    """A file descriptor of the filter of system calls, which is shorter than the buffer of a pipe."""
    seccomp, writer = os.pipe()
    with open(writer, "wb") as file:
        file.write(filter_program())
    return seccomp


def _environment(folder: str) -> dict[str, str]:
    return {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}


def _command(isolation: Isolation, limits: Limits, channel: int, info: int, seccomp: int) -> list[str]:
    """The command line of the driver, inside bubblewrap's, which applies its arguments in this order."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    interpreter = [python, "-I", "-S", "-B", "-X", "utf8"]
    if isolation == "none":
        return [*interpreter, str(DRIVER), str(channel)]
    command = f"{shutil.which('bwrap')} --info-fd {info} --die-with-parent --new-session --clearenv".split(" ")
    # 1. System calls, namespaces and capabilities. As root, the filter alone disables further user namespaces.
    command += ["--seccomp", str(seccomp)]
    command += "--unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try --cap-drop ALL".split()
    if isolation == "user":  # the driver gives these up when it becomes the other user
        command += "--cap-add CAP_SETUID --cap-add CAP_SETGID".split()
    else:
        command += "--unshare-user --disable-userns --uid 65534 --gid 65534".split()
    for name, value in _environment(SCRATCH).items():
        command += ["--setenv", name, value]
    # 2. Files that can be read.
    command += _readable_files(python)
    command += ["--ro-bind", str(DRIVER), "/driver.py", "--proc", "/proc", "--dev", "/dev"]
    for file in filter(os.path.exists, KEY_LISTS):
        command += ["--ro-bind", "/dev/null", file]
    # 3. The scratch folder. bubblewrap leaves / and /dev writable, without a limit on size, and /proc/sys to its owner,
    # who may be root.
    command += "--size 4096 --tmpfs /proc/sys --perms 1777".split()
    command += ["--size", str(limits.file_bytes), "--tmpfs", SCRATCH]
    command += "--remount-ro /proc/sys --remount-ro /dev --remount-ro /".split()
    return [*command, "--chdir", SCRATCH, "--", *interpreter, "/driver.py", str(channel)]


def _readable_files(python: str) -> list[str]:
    """Arguments for what an interpreter needs, read-only: itself, its libraries, and the system's."""
    prefix = os.path.realpath(sys.base_prefix)
    folders = ["/usr/lib", "/usr/lib32", "/usr/lib64", f"{prefix}/lib", f"{prefix}/lib64", "/lib", "/lib32", "/lib64"]
    folders = [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
    files = [*folders, python, LINKER_CACHE]
    arguments = []
    # bubblewrap would make missing parents for its own user alone.
    for parent in dict.fromkeys(str(parent) for file in files for parent in reversed(Path(file).parents[:-1])):
        arguments += ["--perms", "0755", "--dir", parent]
    for folder in folders:
        is_link = os.path.islink(folder)
        arguments += ["--symlink", os.readlink(folder), folder] if is_link else ["--ro-bind", folder, folder]
    return [*arguments, "--ro-bind", python, python, "--ro-bind-try", LINKER_CACHE, LINKER_CACHE]


def _first_process(info: int) -> int | None:
    """A pidfd of the first process in the namespace, or None if bubblewrap made none."""
    report = b""
    while b"}" not in report and (chunk := os.read(info, 4096)):
        report += chunk
    with contextlib.suppress(json.JSONDecodeError, ProcessLookupError):
        return os.pidfd_open(json.loads(report)["child-pid"])
    return None


def _stop_namespace(first: int) -> None:
    """Kill the first process of a PID namespace and with it all others. The kernel reports its end only after theirs."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(first, signal.SIGKILL)
    poll = select.poll()
    poll.register(first, select.POLLIN)
    poll.poll()
    os.close(first)


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
