"""The key that requests must send, checked the same by both servers."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from ultrafuser.serve.api_errors import APIError


def hash_key(key: bytes) -> bytes:
    """Hashes of one length, since a comparison tells the length of a text."""
    return hashlib.sha256(key).digest()


def key_refusal(scheme: str, key: bytes, key_hashes: Sequence[bytes]) -> APIError | None:
    """Why a request may not pass, by the two words of its header Authorization. None: it may."""
    hashed = hash_key(key)
    matches = [hmac.compare_digest(hashed, known) for known in key_hashes]
    if scheme.lower() == "bearer" and any(matches):
        return None
    message = "the API key is missing or wrong. Send the header Authorization: Bearer KEY"
    return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
