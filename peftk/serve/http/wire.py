"""What clients send, as OpenAI's API names it; and what they get."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Fields of OpenAI's API that ask for nothing if they have one of these values. Any other value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
# Fields that are for OpenAI's own bookkeeping.
_IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[int], Field(min_length=1)]
Texts = Text | Tokens | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]


class _Body(BaseModel):
    """A body of a request: unknown fields are refused, null is as good as absent, nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {}
        for name, value in data.items():
            if value is None or (name in _IGNORED and name not in cls.model_fields):
                continue
            if name in _NEUTRAL and name not in cls.model_fields:
                if not any(value == good and type(value) is type(good) for good in _NEUTRAL[name]):
                    wanted = " or ".join(repr(good) for good in _NEUTRAL[name])
                    message = f"expected {wanted}; this server has nothing else"
                    raise PydanticCustomError("unsupported_value", "{message}", {"message": message, "param": name})
                continue
            given[name] = value
        return given


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Generation(_Body):
    """What all requests for generated text have. temperature and top_p: 1 by default, as OpenAI has it."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] = Field(default_factory=list)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    timeout: float | None = Field(None, gt=0)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(_Generation):
    """POST /v1/completions. prompt: a text, ids of tokens, or a list of either. timeout: seconds, an extension."""

    prompt: Texts
    max_tokens: int = Field(16, ge=1)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Text
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(_Generation):
    """POST /v1/chat/completions. max_tokens (or max_completion_tokens): as many as there is room for by default."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class EmbeddingBody(_Body):
    """POST /v1/embeddings. input: a text, ids of tokens, or a list of either."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    timeout: float | None = Field(None, gt=0)


class LoadBody(_Body):
    """POST /v1/load_lora_adapter, as in vLLM. load_inplace: replace an adapter that has the name."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(_Body):
    """POST /v1/unload_lora_adapter, as in vLLM. cancel: end the adapter's requests instead of waiting for them."""

    lora_name: str
    lora_int_id: int | None = None
    cancel: bool = False


def several(texts: str | list[Any]) -> list[str | list[int]]:
    """A text or ids, or a list of them, as a list of them."""
    single = isinstance(texts, str) or isinstance(texts[0], int)
    return [texts] if single else texts  # type: ignore[return-value]


class Kind:
    """How one endpoint writes its answers: `completion` or `chat`."""

    def __init__(self, prefix: str, whole: str, chunk: str, chat: bool) -> None:
        self.prefix, self.whole, self.chunk, self.chat = prefix, whole, chunk, chat

    def head(self, model: str, *, stream: bool) -> dict[str, Any]:
        """What an answer, and each chunk of it, begins with."""
        return {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.chunk if stream else self.whole,
            "created": int(time.time()),
            "model": model,
        }

    def choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def part(self, index: int, text: str | None, reason: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """A choice in a chunk. text: None at the end."""
        if not self.chat:
            return {"index": index, "text": text or "", "logprobs": None, "finish_reason": reason}
        delta = {"role": "assistant"} if first else {}
        delta |= {} if text is None else {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


COMPLETION = Kind("cmpl", "text_completion", "text_completion", chat=False)
CHAT = Kind("chatcmpl", "chat.completion", "chat.completion.chunk", chat=True)


def usage(prompt_tokens: int, generated_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated_tokens,
        "total_tokens": prompt_tokens + generated_tokens,
    }
