"""The errors of the model package, which imports nothing else of ultrafuser."""

import re
import struct

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# The login of an address: all up to the last @ of its host, or, where a password holds a slash, up to the last @ at all.
_LOGIN = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]{1,500}@|[^\s/?#:@'\"<>]{1,500}:(?!\d{1,5}/)[^\s'\"<>]{1,500}@)")


def hide_logins(text: str) -> str:
    """The text with `***` for each user and password in an address."""
    return _LOGIN.sub("***@", text)


class UltraFuserError(ValueError):
    """Root of every error that ultrafuser raises on purpose. Its text never holds the password of an address."""

    def __str__(self) -> str:
        return hide_logins(super().__str__())


class CheckpointError(UltraFuserError):
    """Weights or manifests that are missing, changed since they were recorded, or half written."""


# What transformers, PEFT, and the readers of GGUF files and quantised weights raise for a checkpoint that they cannot read.
LOAD_ERRORS = (
    *(OSError, ImportError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError),
    *(SafetensorError, StrictDataclassError, struct.error, re.error),
)


def reason(error: Exception) -> str:
    """An error of another library as a part of a sentence. Its kind is named where the text does not explain itself."""
    text = str(error).strip().rstrip(".")
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the Python package {error.name.partition('.')[0]!r} is not installed ({text})"
    return text if isinstance(error, (OSError, ImportError, ValueError)) and text else f"{type(error).__name__}: {text}"
