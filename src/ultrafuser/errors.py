"""Every error that ultrafuser raises on purpose.

UltraFuserError            base of all errors below, and a ValueError, so that `except ValueError` works
├── RecipeError            an invalid recipe or override
├── DataError              invalid rows, files or columns
│   └── DiskError          a file that could not be written
├── TokenizerMismatchError specialists with different tokenizers
├── CheckpointError        missing, changed or incomplete weights or manifests
├── TrainingError          a run that cannot start, continue or resume
├── Preempted              a run that SIGTERM has stopped, and that can be resumed
├── SandboxError           generated code, but no sandbox to run it in
├── BudgetExceeded         a budget too small for the next call
├── EndpointError          an unusable OpenAI-compatible endpoint
│   └── RequestError       one request that failed
│       └── ContextOverflowError  a request longer than the context of the model
└── MissingExtraError      a missing optional dependency
"""

from ultrafuser.model.errors import CheckpointError, UltraFuserError, hide_logins

__all__ = [
    "BudgetExceeded",
    "CheckpointError",
    "ContextOverflowError",
    "DataError",
    "DiskError",
    "EndpointError",
    "MissingExtraError",
    "Preempted",
    "RecipeError",
    "RequestError",
    "SandboxError",
    "TokenizerMismatchError",
    "TrainingError",
    "UltraFuserError",
    "hide_logins",
]


class RecipeError(UltraFuserError):
    """An invalid recipe or override."""


class DataError(UltraFuserError):
    """Invalid rows, files or columns."""


class DiskError(DataError):
    """A file or folder that could not be written.

    Attributes:
        target: its path.
        problem: the reason, such as `the disk is full`.
        next_step: what the user can do.
    """

    def __init__(self, target: object, problem: str, next_step: str) -> None:
        self.target, self.problem, self.next_step = target, problem, next_step
        super().__init__(f"{target}: could not be written: {problem}. {next_step}")


class TokenizerMismatchError(UltraFuserError):
    """Specialists with different tokenizers, whose logits cannot be mixed."""


class TrainingError(UltraFuserError):
    """A run that cannot start, continue or resume."""


class Preempted(UltraFuserError):
    """A run was stopped by SIGTERM. It can be resumed."""


class SandboxError(UltraFuserError):
    """Generated code must run, but there is no sandbox."""


class BudgetExceeded(UltraFuserError):
    """The budget is too small for the next call. All answers so far are kept."""


class EndpointError(UltraFuserError):
    """An OpenAI-compatible endpoint at which every request would fail."""


class RequestError(EndpointError):
    """One request that an endpoint did not serve. Other requests may succeed."""


class ContextOverflowError(RequestError):
    """A request to an endpoint that is a request longer than the context of the model."""


class MissingExtraError(UltraFuserError):
    """A missing optional dependency. The message holds the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs {package!r}, which is not installed. Run: pip install "ultrafuser[{extra}]"')
