"""The errors of the model package, which imports nothing else of ultrafuser."""

import re

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
