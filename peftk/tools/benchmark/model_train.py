"""model_train, model_memory: one training step of all-MiniLM-L6-v2, beside HF PEFT.

A step is forward, backward and optimizer (AdamW). With one adapter, both sides are a model with a LoRA on every linear
layer. With several, every adapter has the same number of sentences: HF PEFT, which refuses a mixed batch in training,
makes a step for each adapter, and peftk (`accelerate`) one for all. Dropout is off, so that both compute the same;
`model_memory` has rows with the adapter's own besides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import peftk
from peftk.methods.inject import lora_layers
from peftk.system import extras
from peftk.tools import minilm
from peftk.tools.benchmark.common import PEFT, Case, Shape, Side
from peftk.tools.benchmark.model import hidden, linears_work, plain, probes_of, token_ids, with_peft
from peftk.tools.benchmark.roofline import Row, add
from peftk.tools.benchmark.targets import DROPOUT, ONE_BY_ONE, PEFTK, WITH_DROPOUT

# Of the gradients of all adapters, in the norm, relative to fp64. A gradient has passed 72 products in a row, forward
# and backward, whose roundings add up like √72: 8·2⁻²⁴ = 5e-7 in fp32, with room for sums in another order; 8·2⁻⁹ =
# 1.6e-2 in bf16, where what is between the products rounds as well.
BOUNDS = {"fp32": 3e-6, "bf16": 2e-2}

Gradients = Mapping[str, Tensor]


def row(shape: Shape) -> Row:
    """Raises extras.MissingExtraError if the model or HF PEFT is not installed."""
    extras.require("bench", PEFT, ["peft"])
    sides = _one(shape) if shape.adapters == 1 else _many(shape)
    linears = minilm.linears(plain(shape))
    base, adapter = linears_work(linears, shape)
    # forward and dX; the adapter has two more products
    bound, probing = probes_of(linears, add(base, base, adapter, adapter, adapter), shape)
    return Row(_case(shape, (*sides, *probing)), bound)


def memory_row(shape: Shape) -> Row:
    """One adapter, without its dropout and with it. Raises as `row`."""
    extras.require("bench", PEFT, ["peft"])
    return Row(_case(shape, (*_one(shape), *_with_dropout(shape))))


def _case(shape: Shape, sides: tuple[Side, ...]) -> Case:
    # compared are the adapters' gradients, so a wrong adapter cannot be too small to be seen
    return Case(shape, sides, float("inf"), inference=False)


def _one(shape: Shape) -> tuple[Side, ...]:
    adapted, peft, exact, ids = *_pair(shape), _gradients_of_one(shape), token_ids(shape)
    return (_side(PEFT, _Step(peft, ids), exact, shape), _side(PEFTK, _Step(adapted, ids), exact, shape))


def _with_dropout(shape: Shape) -> tuple[Side, ...]:
    """The same with the adapter's dropout. A side is checked without it, as every side draws a mask of its own."""
    adapted, peft, exact, ids = *_pair(shape), _gradients_of_one(shape), token_ids(shape)

    def side(name: str, model: nn.Module, switch_on: Callable[[], None]) -> Side:
        plainly = _side(f"{name}{WITH_DROPOUT}", _Step(model, ids), exact, shape)

        def error() -> float:
            found = plainly.error()
            switch_on()
            return found

        return dataclasses.replace(plainly, error=error)

    def in_peftk() -> None:
        for _, layer in lora_layers(adapted):
            layer.lora_dropout = DROPOUT
            layer.train()

    def in_peft() -> None:
        for module in list(peft.modules()):
            found = getattr(module, "lora_dropout", None)
            if isinstance(found, nn.ModuleDict):
                found["default"] = nn.Dropout(DROPOUT)  # it is in training mode

    return side(PEFT, peft, in_peft), side(PEFTK, adapted, in_peftk)


def _pair(shape: Shape) -> tuple[nn.Module, nn.Module]:
    """peftk's model and HF PEFT's, with the same adapter, which both train."""
    adapted = minilm.with_lora(plain(shape), shape.rank, seed=shape.rank)
    peft = with_peft(adapted, plain(shape))
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return adapted, peft


def _gradients_of_one(shape: Shape) -> Gradients:
    exact = minilm.with_lora(plain(shape).double(), shape.rank, seed=shape.rank)
    return _Step(exact, token_ids(shape)).gradients()


def _many(shape: Shape) -> tuple[Side, ...]:
    names = [f"user{number}" for number in range(shape.adapters)]
    ids = token_ids(shape)
    owners = [name for name in names for _ in range(len(ids) // len(names))]

    def model(dtype: torch.dtype) -> Any:
        return _peft_with_adapters(plain(shape).to(dtype), names, shape.rank)

    exact = _OneByOne(model(torch.float64), ids, names).gradients()
    fast = peftk.accelerate(model(shape.torch_dtype))
    fast.set_requires_grad(names)
    theirs, ours = _OneByOne(model(shape.torch_dtype), ids, names), _Step(fast, ids, adapter_names=owners)
    return _side(ONE_BY_ONE, theirs, exact, shape), _side(PEFTK, ours, exact, shape)


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

    def forget(self) -> None:
        """The gradients."""
        self.optimizer.zero_grad()

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

    def forget(self) -> None:
        for step in self.steps.values():
            step.forget()

    def gradients(self) -> Gradients:
        found: dict[str, Tensor] = {}
        for name, step in self.steps.items():
            self.model.set_adapter(name)
            found |= step.gradients()
        return found


def _place(name: str) -> str:
    """One name for a parameter of peftk's model and of HF PEFT's."""
    return name.removeprefix("base_model.model.").replace(".default.weight", "")


def _peft_with_adapters(model: nn.Module, names: list[str], rank: int) -> Any:
    """HF PEFT's model with random adapters that are the same in every call, exact in bf16."""
    import peft

    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    }
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
    return Side(name, step, lambda: _error(step.gradients(), expected) / BOUNDS[shape.dtype], step.forget)


def _error(found: Gradients, expected: Gradients) -> float:
    """The norm of the difference over that of the expected gradients. inf if one is missing."""
    if found.keys() != expected.keys():
        return float("inf")
    difference = sum(float((found[name].double() - exact).square().sum()) for name, exact in expected.items())
    return (difference / sum(float(exact.square().sum()) for exact in expected.values())) ** 0.5
