"""Single tokens as text and bytes, for lists of likely tokens."""

from __future__ import annotations

import copy
import re
from functools import cache

from ultrafuser.data.templates import Renderer

_CONTEXT = "A"  # some tokenizers take a blank from the first token of a text
_REPLACEMENT = "\ufffd"  # what tokenizers write for a part of a character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of SentencePiece


class TokenTexts:
    """The texts of tokens, each decoded once."""

    def __init__(self, renderer: Renderer) -> None:
        self._tokenizer = copy.deepcopy(renderer.tokenizer)  # the renderer's may be in use by another thread
        self._context = self._tokenizer.encode(_CONTEXT, add_special_tokens=False)
        self._context_size = len(self._decode(self._context))
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        """The text of a token. Special tokens have theirs too."""
        if token_id not in self._texts:
            self._texts[token_id] = self._decode([*self._context, token_id])[self._context_size :]
        return self._texts[token_id]

    def utf8(self, token_id: int) -> list[int]:
        """The bytes of a token, which may be a part of a character."""
        text = self.text(token_id)
        if _REPLACEMENT in text:
            name = self._tokenizer.convert_ids_to_tokens(token_id)
            if match := _BYTE_TOKEN.fullmatch(name):
                return [int(match[1], 16)]
            if all(character in byte_of_character() for character in name):
                return [byte_of_character()[character] for character in name]
        return list(text.encode())

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@cache
def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves, the other bytes for the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
