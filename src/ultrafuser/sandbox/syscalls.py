"""A seccomp filter, as bubblewrap reads it: system calls that namespaces and limits do not cover fail inside the sandbox.

A filter is a program for the kernel's classic BPF machine (linux/filter.h, linux/seccomp.h). This one allows everything but:

- other namespaces: a new user namespace gives all capabilities in it, and with them file systems of any size;
- sockets of other families than the network namespace covers: AF_VSOCK reaches the host of a virtual machine;
- key rings: the session key ring is inherited from whoever runs the evaluation;
- memory that belongs to no process and no folder, which the limits do not count;
- io_uring, which makes system calls past any filter, and interfaces for debugging the kernel.
"""

from __future__ import annotations

import errno
import platform
import socket
import struct
from typing import NamedTuple

DENIED = (
    "unshare", "setns",
    "add_key", "request_key", "keyctl",
    "memfd_create", "shmget", "msgget", "semget",
    "io_uring_setup", "io_uring_enter", "io_uring_register", "bpf", "perf_event_open", "userfaultfd", "syslog",
)  # fmt: skip
# AF_NETLINK lists the interfaces of the network namespace.
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16)
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
NAMESPACE_FLAGS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

# Numbers of system calls on x86-64, and on architectures that use the kernel's general table.
_X86_64 = {
    "unshare": 272, "setns": 308, "add_key": 248, "request_key": 249, "keyctl": 250, "memfd_create": 319,
    "shmget": 29, "msgget": 68, "semget": 64, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "syslog": 103,
    "clone": 56, "clone3": 435, "socket": 41, "socketpair": 53,
}  # fmt: skip
_GENERAL = {
    "unshare": 97, "setns": 268, "add_key": 217, "request_key": 218, "keyctl": 219, "memfd_create": 279,
    "shmget": 194, "msgget": 186, "semget": 190, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "syslog": 116,
    "clone": 220, "clone3": 435, "socket": 198, "socketpair": 199,
}  # fmt: skip
_X32_BIT = 0x40000000  # of the calls of x86-64's second interface, whose numbers are others


class _Architecture(NamedTuple):
    audit: int  # AUDIT_ARCH_ in linux/audit.h
    numbers: dict[str, int]


ARCHITECTURES = {
    "x86_64": _Architecture(0xC000003E, _X86_64),
    "aarch64": _Architecture(0xC00000B7, _GENERAL),
    "riscv64": _Architecture(0xC00000F3, _GENERAL),
}

# Instructions: load a word of struct seccomp_data, compare, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets. The lower half of an argument comes first
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NOT_PERMITTED, _UNKNOWN = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


def filter_program(machine: str | None = None) -> bytes:
    """The filter for a machine, as `platform.machine()` names it. None: this one."""
    architecture = ARCHITECTURES[machine or platform.machine()]
    numbers = architecture.numbers
    # 1. Another instruction set has other numbers.
    code = _instruction(_LOAD, _ARCHITECTURE)
    code += _instruction(_EQUAL, architecture.audit, skip_if_true=1) + _instruction(_RETURN, _KILL)
    code += _instruction(_LOAD, _NUMBER)
    if architecture.numbers is _X86_64:
        code += _when(_AT_LEAST, _X32_BIT, _instruction(_RETURN, _UNKNOWN))
    # 2. Calls that always fail.
    for name in DENIED:
        code += _when(_EQUAL, numbers[name], _instruction(_RETURN, _NOT_PERMITTED))
    # 3. clone3 has its flags in memory, which a filter cannot read. The C library then uses clone.
    code += _when(_EQUAL, numbers["clone3"], _instruction(_RETURN, _UNKNOWN))
    refuse_namespaces = _instruction(_LOAD, _FIRST_ARGUMENT)
    refuse_namespaces += _when(_ANY_BIT, NAMESPACE_FLAGS, _instruction(_RETURN, _NOT_PERMITTED))
    code += _when(_EQUAL, numbers["clone"], refuse_namespaces + _instruction(_RETURN, _ALLOW))
    # 4. Sockets of a few families.
    allow_families = _instruction(_LOAD, _FIRST_ARGUMENT)
    for family in FAMILIES:
        allow_families += _when(_EQUAL, family, _instruction(_RETURN, _ALLOW))
    for name in ("socket", "socketpair"):
        code += _when(_EQUAL, numbers[name], allow_families + _instruction(_RETURN, _NOT_PERMITTED))
    return code + _instruction(_RETURN, _ALLOW)


def _instruction(operation: int, value: int, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, skip_if_true, skip_if_false, value)


def _when(comparison: int, value: int, then: bytes) -> bytes:
    """Do `then` if the comparison holds for the word that was loaded last."""
    return _instruction(comparison, value, skip_if_false=len(then) // 8) + then
