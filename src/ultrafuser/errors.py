"""Every error that ultrafuser raises on purpose.

UltraFuserError            anything below; a ValueError, so that `except ValueError` keeps working
├── RecipeError            a recipe or an override that cannot be used
├── DataError              rows, files or columns that cannot be used
├── TokenizerMismatchError specialists that do not speak the same tokens
├── CheckpointError        weights or manifests that are missing, changed or half written
├── TrainingError          a run that cannot start, go on or be resumed
└── MissingExtraError      an optional dependency that is not installed
"""

from ultrafuser.model.errors import CheckpointError, UltraFuserError

__all__ = [
    "CheckpointError",
    "DataError",
    "MissingExtraError",
    "RecipeError",
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


class MissingExtraError(UltraFuserError):
    """An optional dependency that is not installed; the message holds the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs {package!r}, which is not installed; run: pip install "ultrafuser[{extra}]"')
