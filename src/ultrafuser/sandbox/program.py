"""A program for the sandbox, what it may use, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "timeout", "memory", "output", "error"]


@dataclass(frozen=True)
class Program:
    """Python that runs part by part in one namespace.

    Attributes:
        module: its `__name__`.
        tests: run last. The driver gets them only after the answer has ended.
    """

    answer: str
    tests: str = ""
    setup: str = ""
    module: str = "answer"


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        timeout_s: wall-clock time from the first line of the answer to the last line of its tests.
        memory_bytes: address space of each process.
        processes: processes and threads together.
        file_bytes: size of each file and, in the sandbox, of the scratch folder as a whole.
        output_bytes: stdout and stderr together.
    """

    timeout_s: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 8
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: `error` means that the sandbox failed. Such a run says nothing about the answer.
    """

    status: Status
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"
