"""model: all-MiniLM-L6-v2 with a LoRA on every linear layer, compared with the plain model without adapters.

A third side is the model whose linear layers return zeros. Its time is what no linear layer can save.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftk.system import extras
from peftk.tools.benchmark.common import Case, Shape, Side
from peftk.tools.benchmark.roofline import Row, adapter_work, add, linear_work, probes
from peftk.tools.benchmark.targets import PLAIN_MODEL

SENTENCES = 16
REST = "rest of the model"


def row(shape: Shape) -> Row:
    """Raises extras.MissingExtraError if the model is not installed."""
    from peftk.tools import minilm
    from peftk.tools.minilm import BOUNDS
    from peftk.tools.sentences import SENTENCES as TEXTS

    extras.require("demo", "all-MiniLM-L6-v2", [module for module in minilm.MODULES if module != "matplotlib"])
    dtype, rank = shape.torch_dtype, shape.rank
    mini = minilm.MiniLM()
    batch = mini.tokenize([sentence.text for sentence in TEXTS[:: len(TEXTS) // SENTENCES][:SENTENCES]])
    plain, without_linears = mini.copy(dtype), mini.copy(dtype)
    ours = minilm.with_lora(mini.copy(dtype), rank, seed=rank)
    linears = minilm.linears(without_linears)
    for name in linears:
        without_linears.set_submodule(name, _ZeroLinear(linears[name].out_features))
    with torch.inference_mode():
        exact_plain = minilm.embed(mini.copy(dtype).double(), batch)
        exact = minilm.embed(minilm.with_lora(mini.copy(dtype).double(), rank, seed=rank), batch)

    def side(name: str, model: nn.Module, expected: Tensor) -> Side:
        def run() -> Tensor:
            return minilm.embed(model, batch)

        def error() -> float:
            return float((run() - expected).abs().max()) / BOUNDS[shape.dtype]

        return Side(name, run, error)

    rest = Side(REST, lambda: minilm.embed(without_linears, batch), lambda: 0.0)
    tokens = batch["input_ids"].numel()
    sizes = [(tokens, linear.in_features, linear.out_features) for linear in linears.values()]
    work = add(
        *(linear_work(*size, dtype) for size in sizes),
        *(adapter_work(*size, rank, 1, torch.float32) for size in sizes),
    )
    weights = torch.zeros(sum(linear.weight.numel() for linear in linears.values()), dtype=dtype)
    bound, bounds = probes(work, dtype, weights)
    effect = float((exact - exact_plain).abs().max()) / BOUNDS[shape.dtype]
    sides = (side(PLAIN_MODEL, plain, exact_plain), side("peftk", ours, exact), rest, *bounds)
    return Row(Case(shape, sides, effect), bound, rest=REST)


class _ZeroLinear(nn.Module):
    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)
