"""What goes into an engine and what comes out: Request, Token, Completion."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

_MOST_STOPS = 16


class QueueFullError(RuntimeError):
    """Raised by an engine that has as many waiting requests as it may have. Nothing has changed; try again later."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue, and how.

    Args:
        prompt: text, or ids of tokens.
        adapter: a name of the store; None for the base model.
        max_new_tokens: the most tokens to generate.
        temperature: divides the logits; 0 takes the likeliest token. top_p: only the likeliest tokens whose
            probabilities add up to it; 1 for all. top_k: only that many likeliest tokens; 0 for all.
        seed: the same seed gives the same tokens, whatever else is in the batch; None for a random one.
        stop: strings at which to end; they are not part of the text. They need a tokenizer.
        ignore_eos: go on after the model's end token.
        tenant: for whom it is: waiting requests are served in fair order over tenants. None for the adapter's name.
        timeout: seconds from its submission after which it ends with what it has; None for no limit.

    Raises TypeError or ValueError for a bad argument.
    """

    prompt: str | Sequence[int]
    adapter: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    tenant: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            if not isinstance(self.prompt, Sequence) or not all(is_int(token) for token in self.prompt):
                raise TypeError(f"prompt: expected a string or a sequence of ints, got {type(self.prompt).__name__}")
            object.__setattr__(self, "prompt", tuple(self.prompt))
        if not self.prompt:
            raise ValueError("prompt: expected a token or more, got an empty one")
        for name in ("adapter", "tenant"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise TypeError(f"{name}: expected a non-empty string or None, got {value!r}")
        for name, least in (("max_new_tokens", 1), ("top_k", 0)):
            value = getattr(self, name)
            if not is_int(value):
                raise TypeError(f"{name}: expected an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected {least} or more, got {value}")
        for name, low, high in (("temperature", 0.0, 1e4), ("top_p", 0.0, 1.0)):
            value = getattr(self, name)
            if not is_number(value):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            if not low <= value <= high or (name == "top_p" and value == 0):
                raise ValueError(f"{name}: expected {'above ' * (name == 'top_p')}{low} to {high}, got {value}")
        if self.seed is not None and not is_int(self.seed):
            raise TypeError(f"seed: expected an int or None, got {self.seed!r}")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not isinstance(self.stop, Sequence) or not all(isinstance(text, str) and text for text in self.stop):
            raise TypeError(f"stop: expected non-empty strings, got {self.stop!r}")
        if len(self.stop) > _MOST_STOPS:
            raise ValueError(f"stop: expected at most {_MOST_STOPS} strings, got {len(self.stop)}")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos: expected a bool, got {self.ignore_eos!r}")
        if self.timeout is not None and not is_number(self.timeout):
            raise TypeError(f"timeout: expected seconds or None, got {self.timeout!r}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout: expected more than 0 seconds, got {self.timeout}")


class Token(NamedTuple):
    """A generated token. text: what it adds to the text; "" while a character or a stop string is incomplete.

    The text of the last tokens may come with the one after them, and text that is left at the end with id None.
    """

    id: int | None
    text: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for a request.

    text: without stop strings and special tokens; "" without a tokenizer. tokens: all of them, end token included.
    finish_reason: "stop" (end token or stop string), "length" (max_new_tokens), "timeout", or "cancelled". digest: of
    the adapter's checkpoint; None for the base model. Times in seconds: queued until the model began with it (or until
    the end), to_first_token and total from its submission; to_first_token is None if there was no token.
    """

    request: Request
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    digest: str | None
    queued: float
    to_first_token: float | None
    total: float


def is_int(value: Any) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can be."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
