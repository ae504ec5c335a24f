"""Tokens of an answer -> text that is certain: no half characters, and nothing that may become a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from ultrafuser.data.templates import Renderer

_INCOMPLETE = "\ufffd"  # what tokenizers write for bytes that are no whole character
_MAX_WINDOW = 24  # tokens that are decoded again for each new one
_CONTEXT_TOKENS = 4  # tokens before the window, since tokenizers treat the first token of a text differently


class Detokenizer:
    """The text of one answer, token by token.

    The joined texts are `renderer.answer_text` of all tokens, up to a stop text.

    Attributes:
        is_stopped: a stop text was found. No more tokens are expected.
    """

    def __init__(self, renderer: Renderer, stop: Sequence[str] = (), keep_blanks: bool = False) -> None:
        self._tokenizer = renderer.tokenizer
        self._stop = [text for text in stop if text]
        self._before, self._behind = ("", "") if keep_blanks else renderer.answer_blanks
        self._cleans_up = bool(getattr(self._tokenizer, "clean_up_tokenization_spaces", False))
        self._start = list(renderer.answer_context)
        self._context = self._start  # decoded before the window
        self._window: list[int] = []
        self._context_size = len(self._decode(self._context))
        self._size = 0  # characters of the window that are in `_held` or were returned
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that becomes certain with a token."""
        self._window.append(token)
        text = self._window_text()
        certain = self._certain_size(text)
        if certain > self._size:
            self._held += text[self._size : certain]
            self._size = certain
        if len(self._window) >= _MAX_WINDOW and self._size == len(text):
            self._move_window()
        return self._release()

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if self.is_stopped:
            return ""
        self._held += self._window_text()[self._size :]
        text = self._release()
        rest, self._held = self._held.removesuffix(self._behind), ""
        if self._before:  # the answer is not longer than the blanks before it
            rest, self._before = rest.removeprefix(self._before), ""
        return text + rest

    # ---------------------------------------------------------------- decoding

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _window_text(self) -> str:
        return self._decode([*self._context, *self._window])[self._context_size :]

    def _certain_size(self, text: str) -> int:
        """How many characters of the window's text later tokens cannot change."""
        certain = text.rstrip(_INCOMPLETE)
        if self._cleans_up:  # later tokens may join a blank and what follows it with their text: `do n't`, `it .`
            certain = certain[: certain.rfind(" ") + 1].rstrip(" ")
        return len(certain)

    def _move_window(self) -> None:
        """Start a new window behind the present one, the last tokens of which become its context.

        Context that begins inside a character would spoil the first characters of the window, so it is then longer.
        """
        for count in range(_CONTEXT_TOKENS, len(self._window)):
            context = [*self._start, *self._window[-count:]]
            text = self._decode(context)
            if _INCOMPLETE not in text:
                self._context, self._context_size = context, len(text)
                self._window, self._size = [], 0
                return

    # ---------------------------------------------------------------- blanks and stop texts

    def _release(self) -> str:
        """Take the text out of `_held` that nothing holds back."""
        if self._before:
            if len(self._held) < len(self._before) and self._before.startswith(self._held):
                return ""
            self._held, self._before = self._held.removeprefix(self._before), ""
        starts = [start for text in self._stop if (start := self._held.find(text)) >= 0]
        if starts:
            self.is_stopped = True
            text, self._held = self._held[: min(starts)], ""
            return text
        open_end = max((_overlap(self._held, text) for text in (*self._stop, self._behind)), default=0)
        split = len(self._held) - open_end
        text, self._held = self._held[:split], self._held[split:]
        return text


def _overlap(text: str, wanted: str) -> int:
    """How many characters at the end of a text are the beginning of the wanted one."""
    for size in range(min(len(text), len(wanted)), 0, -1):
        if text.endswith(wanted[:size]):
            return size
    return 0
