"""model, model_compiled: all-MiniLM-L6-v2 with a LoRA on every linear layer, in inference, beside the plain model.

`model` is eager: the plain model, HF PEFT with the same adapter, and the model whose linear layers return zeros, whose
time is what no linear layer can save. `model_compiled` runs torch.compile of the plain model and of the adapted one,
beside them the adapted one in eager mode and, in fp32, other engines with the plain model. Sentences have 21 tokens,
none of them padding.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftk
from peftk.system import extras
from peftk.tools import minilm
from peftk.tools.benchmark import engines, peers
from peftk.tools.benchmark.common import PEFT, Case, Shape, Side
from peftk.tools.benchmark.roofline import Bound, Row, Work, adapter_work, add, linear_work, probes
from peftk.tools.benchmark.targets import COMPILE, PEFTK, PLAIN_MODEL, TOKENS_OF_A_SENTENCE

REST = "rest of the model"


def row(shape: Shape) -> Row:
    """Raises extras.MissingExtraError if the model is not installed."""
    ids, models = token_ids(shape), _Models(shape)
    sides = [models.side(PLAIN_MODEL, models.plain, ids)]
    if peers.has_peft():
        sides.append(models.side(PEFT, with_peft(models.adapted, plain(shape)), ids))
    sides.append(models.side(PEFTK, models.adapted, ids))
    without = without_linears(plain(shape))
    rest = Side(REST, lambda: hidden(without, ids), lambda: 0.0)
    return models.row(shape, (*sides, rest), rest=REST)


def compiled_row(shape: Shape) -> Row:
    """Raises extras.MissingExtraError, and peers.UnavailableError if torch.compile cannot run."""
    torch._dynamo.reset()  # Dynamo compiles a function for eight shapes, and runs it uncompiled for a ninth
    ids, models = token_ids(shape), _Models(shape)
    sides = [
        models.side(COMPILE, peers.compiled_model(models.plain, lambda model: hidden(model, ids)), ids),
        models.side(f"{PEFTK} compiled", peers.compiled_model(models.adapted, lambda model: hidden(model, ids)), ids),
        models.side(PEFTK, models.adapted, ids),
    ]
    if shape.dtype == "fp32":
        others = engines.installed(_LastHidden(models.plain), ids)
        sides += [models.side_of(name, run, adapted=False) for name, run in others.items()]
    return models.row(shape, tuple(sides))


class _Models:
    """The plain and the adapted model, and their exact embeddings."""

    def __init__(self, shape: Shape) -> None:
        self.plain, self.adapted = plain(shape), minilm.with_lora(plain(shape), shape.rank, seed=shape.rank)
        self.bound = minilm.BOUNDS[shape.dtype]
        with torch.inference_mode():
            exact = minilm.with_lora(plain(shape).double(), shape.rank, seed=shape.rank)
            self.exact = {
                False: embedding(hidden(plain(shape).double(), token_ids(shape))),
                True: embedding(hidden(exact, token_ids(shape))),
            }

    def side(self, name: str, model: nn.Module | Callable[..., Any], ids: Tensor) -> Side:
        return self.side_of(name, lambda: hidden(model, ids), adapted=name.startswith(PEFTK) or name == PEFT)

    def side_of(self, name: str, run: Callable[[], Tensor], *, adapted: bool) -> Side:
        expected = self.exact[adapted]
        return Side(name, run, lambda: _difference(embedding(run()), expected) / self.bound)

    def row(self, shape: Shape, sides: tuple[Side, ...], rest: str | None = None) -> Row:
        linears = minilm.linears(self.plain)
        base, adapter = linears_work(linears, shape)
        bound, probing = probes_of(linears, add(base, adapter), shape)
        effect = _difference(self.exact[True], self.exact[False]) / self.bound
        return Row(Case(shape, (*sides, *probing), effect), bound, rest=rest, adapter=adapter)


def linears_work(
    linears: dict[str, nn.Linear], shape: Shape, adapter_dtype: torch.dtype = torch.float32
) -> tuple[Work, Work]:
    """The work of all linear layers, and that of the shape's adapters on them."""
    sizes = [(shape.M, linear.in_features, linear.out_features) for linear in linears.values()]
    return (
        add(*(linear_work(*size, shape.torch_dtype) for size in sizes)),
        add(*(adapter_work(*size, shape.rank, shape.adapters, adapter_dtype) for size in sizes)),
    )


def probes_of(linears: dict[str, nn.Linear], work: Work, shape: Shape) -> tuple[Bound, list[Side]]:
    """The bound of this work, and its probes; the one that reads has as many bytes as all weights."""
    return probes(work, shape.torch_dtype, torch.zeros(_count(linears), dtype=shape.torch_dtype))


def _count(linears: dict[str, nn.Linear]) -> int:
    return sum(linear.weight.numel() for linear in linears.values())


@functools.cache
def _minilm() -> minilm.MiniLM:
    return minilm.MiniLM()


def plain(shape: Shape) -> nn.Module:
    """A plain model of its own. Raises extras.MissingExtraError if it is not installed."""
    extras.require("demo", "all-MiniLM-L6-v2", [module for module in minilm.MODULES if module != "matplotlib"])
    return _minilm().copy(shape.torch_dtype)


def token_ids(shape: Shape) -> Tensor:
    """[sentences, tokens of a sentence], drawn with a seed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, 30000, (shape.M // TOKENS_OF_A_SENTENCE, TOKENS_OF_A_SENTENCE), generator=generator)


def hidden(model: nn.Module | Callable[..., Any], ids: Tensor, **kwargs: Any) -> Tensor:
    """[sentences, tokens, 384]"""
    found: Tensor = model(input_ids=ids, **kwargs).last_hidden_state
    return found


def embedding(states: Tensor) -> Tensor:
    """Unit vectors [sentences, 384], which the bounds of `minilm` are for."""
    return F.normalize(states.float().mean(1), dim=-1)


def with_peft(adapted: nn.Module, base: nn.Module) -> nn.Module:
    """HF PEFT's model over `base`, with the adapter of peftk's."""
    with tempfile.TemporaryDirectory() as folder:
        peftk.save_adapter(adapted, folder)
        return minilm.load_hf_peft(base, {"default": folder})


def without_linears(model: nn.Module) -> nn.Module:
    """The model, changed in place: its linear layers return zeros."""
    for name, linear in minilm.linears(model).items():
        model.set_submodule(name, _ZeroLinear(linear.out_features))
    return model


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


class _LastHidden(nn.Module):
    """What the engines export: ids in, hidden states out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return hidden(self.model, ids)


class _ZeroLinear(nn.Module):
    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)
