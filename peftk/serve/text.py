"""From tokens to text as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Decodes the tokens of one request.

    tokenizer: transformers' tokenizer, or None, with which all text is "". Text that may be the beginning of a stop
    string is held back until that is known.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._stop, self._held, self.stopped = tuple(stop), "", False
        self._decoder = None
        self._incomplete: list[int] = []  # the last tokens, which end within a character
        if tokenizer is not None:
            from tokenizers.decoders import DecodeStream

            self._tokenizer = tokenizer.backend_tokenizer
            self._decoder = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that is certain after this token. After a stop string, `stopped` is True and nothing more comes."""
        if self._decoder is None or self.stopped:
            return ""
        complete = self._decoder.step(self._tokenizer, token)
        self._incomplete = [*self._incomplete, token] if complete is None else []
        self._held += complete or ""
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            text, self._held = self._held[: min(ends)], ""
            return text
        certain = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def finish(self) -> str:
        """The text that was held back, when no token comes any more; U+FFFD for a character that has not ended."""
        text, self._held = self._held, ""
        if self._incomplete and not self.stopped:
            text += self._tokenizer.decode(self._incomplete, skip_special_tokens=True)
        self._incomplete = []
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that the stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
