"""Every error that ultrafuser raises on purpose.

UltraFuserError            anything below; a ValueError, so that `except ValueError` keeps working
├── RecipeError            a recipe or an override that cannot be used
├── DataError              rows, files or columns that cannot be used
├── TokenizerMismatchError specialists that do not speak the same tokens
├── CheckpointError        weights or manifests that are missing, changed or half written
├── TrainingError          a run that cannot start, go on or be resumed
├── SandboxError           generated code that was to run where there is no sandbox
├── BudgetExceeded         money that would not last for the next call
├── EndpointError          an OpenAI-compatible endpoint that cannot be used
│   └── RequestError       one request that it did not serve
│       └── ContextOverflowError  longer than the model's context
└── MissingExtraError      an optional dependency that is not installed
"""

from ultrafuser.model.errors import CheckpointError, UltraFuserError

__all__ = [
    "BudgetExceeded",
    "CheckpointError",
    "ContextOverflowError",
    "DataError",
    "EndpointError",
    "MissingExtraError",
    "RecipeError",
    "RequestError",
    "SandboxError",
    "TokenizerMismatchError",
    "TrainingError",
    "UltraFuserError",
]


class RecipeError(UltraFuserError):
    """A recipe or an override that cannot be used."""


class DataError(UltraFuserError):
    """Rows, files or columns that cannot be used."""


class TokenizerMismatchError(UltraFuserError):
    """Specialists whose tokenizers differ, so that their logits do not line up."""


class TrainingError(UltraFuserError):
    """A run that cannot start, go on or be resumed."""


class SandboxError(UltraFuserError):
    """Generated code that was to run where there is no sandbox."""


class BudgetExceeded(UltraFuserError):
    """Money that would not last for the next call; what was answered is kept."""


class EndpointError(UltraFuserError):
    """An OpenAI-compatible endpoint that cannot be used, so that every request to it would fail."""


class RequestError(EndpointError):
    """One request that an endpoint did not serve; others may go well."""


class ContextOverflowError(RequestError):
    """A request to an endpoint that is longer than the model's context."""


class MissingExtraError(UltraFuserError):
    """An optional dependency that is not installed; the message holds the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs {package!r}, which is not installed; run: pip install "ultrafuser[{extra}]"')
