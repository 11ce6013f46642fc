"""What a client may ask for, and how long it may take."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Times in seconds.

    Args:
        body_bytes: of a request. prompts: prompts (or texts to embed) in one request. new_tokens: `max_tokens`.
        prompt_tokens: of one prompt; None for what the model's context has room for.
        request_seconds: from a request's arrival to its end; one that takes longer ends with an error.
        head_seconds, body_seconds: in which a client has to have sent its request's head and body.
        idle_seconds: after which a connection without a request is closed.
        send_seconds: for which a client may leave its answer unread before the connection is cut.
        drain_seconds: which running requests have to end after SIGTERM.
        connections: at a time; more get status 503.

    Raises ValueError for numbers that are not positive.
    """

    body_bytes: int = 4 << 20
    prompts: int = 128
    new_tokens: int = 4096
    prompt_tokens: int | None = None
    request_seconds: float = 600.0
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 30.0
    send_seconds: float = 30.0
    drain_seconds: float = 60.0
    connections: int = 1024

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"{field.name}: expected a positive number, got {value!r}")
