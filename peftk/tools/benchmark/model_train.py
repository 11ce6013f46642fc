"""model_train, model_memory: one training step of all-MiniLM-L6-v2, beside HF PEFT.

A step is forward, backward and optimizer (AdamW). With one adapter, both sides are a model with a LoRA on every linear
layer. With several, every adapter has the same number of sentences: HF PEFT, which refuses a mixed batch in training,
makes a step for each adapter, and peftk (`accelerate`) one for all. Dropout is off, so that both compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import peftk
from peftk.system import extras
from peftk.tools import minilm
from peftk.tools.benchmark.common import PEFT, Case, Shape, Side
from peftk.tools.benchmark.model import hidden, linears_work, plain, token_ids, with_peft
from peftk.tools.benchmark.roofline import Row, add, probes
from peftk.tools.benchmark.targets import ONE_BY_ONE, PEFTK

# Of the gradients of all adapters, in the norm, relative to fp64. A gradient has passed 72 products in a row, forward and
# backward, whose roundings add up like √72: 8·2⁻²⁴ = 5e-7 in fp32, with room for sums in another order; 8·2⁻⁹ = 1.6e-2 in
# bf16, whose activations and products round as well.
BOUNDS = {"fp32": 1e-5, "bf16": 5e-2}

Gradients = Mapping[str, Tensor]


def row(shape: Shape) -> Row:
    """Raises extras.MissingExtraError if the model or HF PEFT is not installed."""
    extras.require("bench", PEFT, ["peft"])
    return _one(shape) if shape.adapters == 1 else _many(shape)


def _one(shape: Shape) -> Row:
    adapted = minilm.with_lora(plain(shape), shape.rank, seed=shape.rank)
    peft = with_peft(adapted, plain(shape))
    _train(peft, ("lora_A", "lora_B"))
    exact = minilm.with_lora(plain(shape).double(), shape.rank, seed=shape.rank)
    ids = token_ids(shape)
    expected = _Step(exact, ids).gradients()
    sides = (_side(PEFT, _Step(peft, ids), expected, shape), _side(PEFTK, _Step(adapted, ids), expected, shape))
    return _row(shape, sides)


def _many(shape: Shape) -> Row:
    names = [f"user{number}" for number in range(shape.adapters)]
    ids = token_ids(shape)
    owners = [name for name in names for _ in range(len(ids) // len(names))]

    def model(dtype: torch.dtype) -> Any:
        return _peft_with_adapters(plain(shape).to(dtype), names, shape.rank)

    exact = _OneByOne(model(torch.float64), ids, names).gradients()
    fast = peftk.accelerate(model(shape.torch_dtype))
    fast.set_requires_grad(names)
    theirs, ours = _OneByOne(model(shape.torch_dtype), ids, names), _Step(fast, ids, adapter_names=owners)
    return _row(shape, (_side(ONE_BY_ONE, theirs, exact, shape), _side(PEFTK, ours, exact, shape)))


class _Step:
    """One training step of what requires a gradient. loss: the sum of the squares of the hidden states, over 1000."""

    def __init__(self, model: nn.Module, ids: Tensor, **kwargs: Any) -> None:
        self.model, self.ids, self.kwargs = model.eval(), ids, kwargs
        self.trained = {_place(name): p for name, p in model.named_parameters() if p.requires_grad}
        # so small a rate that the step costs what it costs and later steps compute what the first one did
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-12, weight_decay=0.0)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        (hidden(self.model, self.ids, **self.kwargs).float().square().sum() / 1000).backward()
        self.optimizer.step()

    def gradients(self) -> Gradients:
        self()
        return {name: p.grad.clone() for name, p in self.trained.items() if p.grad is not None}


class _OneByOne:
    """One step for each adapter, with its sentences."""

    def __init__(self, model: Any, ids: Tensor, names: list[str]) -> None:
        self.model, self.steps = model, {}
        for name, part in zip(names, ids.chunk(len(names)), strict=True):
            model.set_adapter(name)
            self.steps[name] = _Step(model, part)

    def __call__(self) -> None:
        for name, step in self.steps.items():
            self.model.set_adapter(name)
            step()

    def gradients(self) -> Gradients:
        self()
        return {place: p.grad for step in self.steps.values() for place, p in step.trained.items()}  # type: ignore[misc]


def _place(name: str) -> str:
    """One name for a parameter of peftk's model and of HF PEFT's."""
    return name.removeprefix("base_model.model.").replace(".default.weight", "")


def _train(model: nn.Module, words: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in words))


def _peft_with_adapters(model: nn.Module, names: list[str], rank: int) -> Any:
    """HF PEFT's model with random adapters that are the same in every call, exact in bf16."""
    import peft

    config = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "init_lora_weights": False}
    with minilm.quiet_peft():
        found: Any = peft.get_peft_model(model, peft.LoraConfig(**config), adapter_name=names[0])
        for name in names[1:]:
            found.add_adapter(name, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for name, parameter in sorted(found.named_parameters()):
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.1 / rank**0.5
                parameter.copy_(drawn.bfloat16())
    return found.eval()


def _side(name: str, step: _Step | _OneByOne, expected: Gradients, shape: Shape) -> Side:
    return Side(name, step, lambda: _error(step.gradients(), expected) / BOUNDS[shape.dtype])


def _error(found: Gradients, expected: Gradients) -> float:
    """The norm of the difference over that of the expected gradients. inf if one is missing."""
    if found.keys() != expected.keys():
        return float("inf")
    difference = sum(float((found[name].double() - exact).square().sum()) for name, exact in expected.items())
    return (difference / sum(float(exact.square().sum()) for exact in expected.values())) ** 0.5


def _row(shape: Shape, sides: tuple[Side, ...]) -> Row:
    base, adapter = linears_work(minilm.linears(plain(shape)), shape)
    work = add(base, base, adapter, adapter, adapter)  # forward and dX; the adapter's two more products
    weights = torch.zeros(work.bytes // shape.torch_dtype.itemsize // 8, dtype=shape.torch_dtype)
    bound, probing = probes(work, shape.torch_dtype, weights)
    # a step's gradients are those of the adapters, so a wrong adapter cannot be too small to be seen
    return Row(Case(shape, (*sides, *probing), float("inf"), inference=False), bound)
