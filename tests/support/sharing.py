"""Small models in which modules share weights, and what a merge of their adapters must report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = 24


@dataclasses.dataclass(frozen=True)
class Sharing:
    """A model, its targets, and of the first layer that cannot be merged: the Parameter, and what else has it."""

    make: Callable[[], nn.Module]
    targets: list[str]
    layer: str
    name: str
    others: tuple[str, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class Plain(nn.Module):
    """Two linears, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class OneParameter(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight


class OneStorage(Plain):
    """Two Parameters with the same memory, as after `.data =`."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight.data = self.a.weight.data


class Transposed(Plain):
    """A tied autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight = nn.Parameter(self.a.weight.data.t())


class Overlapping(Plain):
    """The rows of b's weight are rows 8 to 31 of one tensor, those of a 0 to 23."""

    def __init__(self) -> None:
        super().__init__()
        rows = torch.randn(D + 8, D) / 8
        self.a.weight, self.b.weight = nn.Parameter(rows[:D]), nn.Parameter(rows[8:])


class Fused(nn.Module):
    """A linear for query, key and value; another has the rows of the query."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.query = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.query.weight = nn.Parameter(self.qkv.weight.data[:D])

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)[..., D:] + torch.cat([self.query(x)] * 2, -1)


class Buffer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", self.a.weight.data)


class Attribute(Plain):
    """The parent module reads the weight through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.view = self.a.weight.data.t()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.view


class InAList(Attribute):
    def __init__(self) -> None:
        super().__init__()
        self.view = None
        self.views = [self.a.weight.data]

    def forward(self, x: Tensor) -> Tensor:
        return Plain.forward(self, x) + F.linear(x, self.views[0])


class OneBias(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.b.bias = self.a.bias


class Parametrized(Plain):
    """b computes its weight from a's."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight
        nn.utils.parametrize.register_parametrization(self.b, "weight", _Half())


class _Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Columns(Plain):
    """Two halves of the columns of one matrix: in the same memory, but without a common element."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.randn(D, 2 * D) / 8
        self.a.weight, self.b.weight = nn.Parameter(both[:, :D]), nn.Parameter(both[:, D:])


class Twice(Plain):
    """One linear in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.b = self.a


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _made(GPT2LMHeadModel, GPT2Config(n_embd=D, n_head=4, n_layer=1, vocab_size=40, n_positions=16, **_ENDS))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": D, "d_kv": 6, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 40}
    return _made(T5ForConditionalGeneration, T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return _made(BertForMaskedLM, BertConfig(**_SIZES, max_position_embeddings=16))


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForMaskedLM

    return _made(AlbertForMaskedLM, AlbertConfig(**_SIZES, embedding_size=D, max_position_embeddings=16))


_ENDS = {"bos_token_id": 0, "eos_token_id": 0}
_SIZES = {
    "hidden_size": D, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 40, "intermediate_size": 32,
}  # fmt: skip

SHARING = {
    "one Parameter": Sharing(OneParameter, ["a"], "a", "weight", ("b.weight",)),
    "one Parameter, both adapted": Sharing(OneParameter, ["a", "b"], "a", "weight", ("b.weight",)),
    "one storage": Sharing(OneStorage, ["b"], "b", "weight", ("a.weight",)),
    "transposed": Sharing(Transposed, ["a", "b"], "a", "weight", ("b.weight",)),
    "overlapping rows": Sharing(Overlapping, ["a"], "a", "weight", ("b.weight",)),
    "a part of a fused one": Sharing(Fused, ["query"], "query", "weight", ("qkv.weight",)),
    "a fused one": Sharing(Fused, ["qkv"], "qkv", "weight", ("query.weight",)),
    "a buffer": Sharing(Buffer, ["a"], "a", "weight", ("kept",)),
    "an attribute": Sharing(Attribute, ["a"], "a", "weight", ("view",)),
    "a list": Sharing(InAList, ["a"], "a", "weight", ("views",)),
    "a parametrization": Sharing(Parametrized, ["a"], "a", "weight", ("b.parametrizations.weight.original",)),
    "a bias": Sharing(OneBias, ["a"], "a", "bias", ("b.bias",), {"lora_bias": True}),
    "one of two places": Sharing(Twice, ["a"], "a", "weight", ("b.weight",)),
    "GPT-2": Sharing(gpt2, ["lm_head"], "lm_head", "weight", ("transformer.wte.weight",)),
    "T5": Sharing(
        t5, ["lm_head", "q"], "lm_head", "weight",
        ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ),
    "BERT": Sharing(
        bert, ["decoder"], "cls.predictions.decoder", "weight", ("bert.embeddings.word_embeddings.weight",)
    ),
    "ALBERT": Sharing(
        albert, ["decoder"], "predictions.decoder", "weight", ("albert.embeddings.word_embeddings.weight",)
    ),
}  # fmt: skip

# sharing or not, these can be merged
FINE = {
    "one module in two places": (Twice, ["a", "b"]),
    "halves of the columns": (Columns, ["a", "b"]),
    "one bias, no lora_bias": (OneBias, ["a", "b"]),
    "GPT-2 but its head": (gpt2, ["c_attn", "c_fc"]),
    "layers of ALBERT": (albert, ["query", "value", "ffn"]),
}


def run(model: nn.Module) -> Tensor:
    if not hasattr(model, "config"):
        return model(torch.randn(3, D, generator=torch.Generator().manual_seed(1)))
    ids = torch.arange(1, 15).view(2, 7)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, :4]} if hasattr(model, "decoder") else {})}
    return model(**inputs).logits


def _made(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(config).eval()
