"""merge_model, merged_context: all-MiniLM-L6-v2 with a LoRA on every linear layer, compared with a copy of their W.

All are merged by `peftk.merge_adapter`, or merged and unmerged by `with peftk.merged(model)`; the search for shared
weights, which both do first, is part of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import peftk
from peftk.methods.inject import lora_layers
from peftk.reference import bounds
from peftk.reference.receipt import same_bits
from peftk.system import extras
from peftk.tools.benchmark.common import COPY, Case, Shape, Side
from peftk.tools.benchmark.roofline import Row, Work, probes

CONTEXT = "merged_context"


def row(shape: Shape) -> Row:
    """Raises extras.MissingExtraError if the model is not installed."""
    from peftk.tools import minilm

    extras.require("demo", "all-MiniLM-L6-v2", [module for module in minilm.MODULES if module != "matplotlib"])
    dtype, rank = shape.torch_dtype, shape.rank
    model = minilm.with_lora(minilm.MiniLM().copy(dtype), rank, seed=rank)
    layers = [layer for _, layer in lora_layers(model)]
    weights = [layer.matrix.detach() for layer in layers]
    expected = [bounds.merged(layer.weight, layer.lora_A, layer.lora_B, layer.scaling) for layer in layers]
    copies = [weight.clone() for weight in weights]

    def copy() -> None:
        for to, weight in zip(copies, weights, strict=True):
            to.copy_(weight)

    times = 2 if shape.op == CONTEXT else 1
    nbytes, count = sum(weight.nbytes for weight in weights), sum(weight.numel() for weight in weights)
    work = Work(times * rank * count, times * 2 * nbytes)
    bound, bounding = probes(work, torch.float32, torch.zeros(count, dtype=dtype))
    ours = (_context if shape.op == CONTEXT else _merge)(model, weights, expected)
    sensitivity = min(bounds.sensitivity(of_layer, dtype) for of_layer in expected)
    return Row(Case(shape, (Side(COPY, copy, lambda: 0.0), ours, *bounding), sensitivity, inference=False), bound)


def _merge(model: nn.Module, weights: list[Tensor], expected: list[bounds.Expected]) -> Side:
    def error() -> float:
        peftk.merge_adapter(model)
        return _largest_error(weights, expected)

    return Side("peftk", lambda: peftk.merge_adapter(model), error, lambda: peftk.unmerge_adapter(model))


def _context(model: nn.Module, weights: list[Tensor], expected: list[bounds.Expected]) -> Side:
    def run() -> None:
        with peftk.merged(model):
            pass

    def error() -> float:
        """Of the merged weights; inf if a bit is not restored."""
        before = [weight.clone() for weight in weights]
        with peftk.merged(model):
            largest = _largest_error(weights, expected)
        return largest if all(map(same_bits, before, weights)) else float("inf")

    return Side("peftk", run, error)


def _largest_error(weights: list[Tensor], expected: list[bounds.Expected]) -> float:
    return max(bounds.error(weight, of_it, fused=True) for weight, of_it in zip(weights, expected, strict=True))
