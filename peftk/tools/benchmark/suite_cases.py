"""Builds the rows of the suite: the sides from the op's benchmark where it has them, and the probes that bound them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from peftk.nn import MultiLoRALinear
from peftk.reference import bounds
from peftk.system import extras
from peftk.tools.benchmark import batch_invariant, lora_linear, merge, multi_lora_linear, peers, train
from peftk.tools.benchmark.common import LINEAR, PEFT, Case, Shape, Side, layer, rounds_once
from peftk.tools.benchmark.roofline import Row, Work, adapter_work, add, linear_work, probes
from peftk.tools.benchmark.targets import BASE, COMPILE, ONE_ADAPTER

DEVICE = "cpu"
_MIN_WEIGHTS = 1 << 16  # with fewer elements of W, a row measures the overhead of a call: no bound


def build(shape: Shape) -> Row:
    """The row of a shape. Raises peers.UnavailableError or extras.MissingExtraError if a part of it cannot run here."""
    return _BUILDERS[shape.op](shape)


def _forward(shape: Shape) -> Row:
    case = lora_linear.case(shape, DEVICE, ())
    if shape.K * shape.N < _MIN_WEIGHTS:
        return Row(case)
    base = layer(shape.M, shape.K, shape.N, shape.torch_dtype, DEVICE)
    row = _with_bounds(_select_sides(case, LINEAR), _lora_work(shape), base.linear.weight)
    return dataclasses.replace(row, adapter=_lora_adapter_work(shape))


def _compile(shape: Shape) -> Row:
    """torch.compile packs its own W. The probe reads a copy too: else it would bring W into the cache for peftk."""
    dtype = shape.torch_dtype
    x, linear, base, base_magnitude = layer(shape.M, shape.K, shape.N, dtype, DEVICE)
    base_only = bounds.Expected(base, base_magnitude, shape.K, base, torch.zeros_like(base))
    compiled = peers.compiled_layer(linear, x)
    side = Side(COMPILE, lambda: compiled(x), lambda: bounds.error(compiled(x), base_only, fused=False))
    case = _select_sides(lora_linear.case(shape._replace(op="lora_linear"), DEVICE, ()))
    case = dataclasses.replace(case, shape=shape, sides=(side, *case.sides))
    return _with_bounds(case, _lora_work(shape), linear.weight.clone())


def _multi(shape: Shape) -> Row:
    return Row(multi_lora_linear.case(shape, DEVICE, (), (shape.rank,)))


def _train(shape: Shape) -> Row:
    extras.require("bench", PEFT, ["peft"])
    dtype = shape.torch_dtype
    base = linear_work(shape.M, shape.K, shape.N, dtype)
    work = add(base, base, adapter_work(*shape[2:], torch.float32, trained=True))
    weight = layer(shape.M, shape.K, shape.N, dtype, DEVICE).linear.weight
    return _with_bounds(_select_sides(train.case(shape, DEVICE, ()), PEFT), work, weight)


def _adapter_cost(shape: Shape) -> Row:
    """One adapter compared with none, or many with one. Both sides are peftk's layers."""
    dtype = shape.torch_dtype
    base = layer(shape.M, shape.K, shape.N, dtype, DEVICE)
    base_work = linear_work(shape.M, shape.K, shape.N, dtype)
    if shape.adapters == 1:
        plain = MultiLoRALinear.from_linear(
            base.linear, max_adapters=1
        ).eval()  # without ids it runs the base layer alone
        base_only = bounds.Expected(base.base, base.base_magnitude, shape.K, base.base, torch.zeros_like(base.base))
        fused = rounds_once(shape._replace(op="lora_linear"), DEVICE, "cpu")
        peer = Side(BASE, lambda: plain(base.x), lambda: bounds.error(plain(base.x), base_only, fused=fused))
        case = _select_sides(lora_linear.case(shape._replace(op="lora_linear"), DEVICE, ()))
        extra = adapter_work(*shape[2:], torch.float32)
    else:
        many = shape._replace(op="multi_lora_linear")
        (one,) = _select_sides(multi_lora_linear.case(many._replace(adapters=1), DEVICE, (), (shape.rank,))).sides
        peer = dataclasses.replace(one, name=ONE_ADAPTER)
        case = _select_sides(multi_lora_linear.case(many, DEVICE, (), (shape.rank,)))
        base_work = add(base_work, adapter_work(*shape[2:6], 1, dtype))
        extra = Work(0, adapter_work(*shape[2:6], shape.adapters - 1, dtype).bytes)
    case = dataclasses.replace(case, shape=shape, sides=(peer, *case.sides))
    return dataclasses.replace(_with_bounds(case, add(base_work, extra), base.linear.weight), extra=extra)


def _merge(shape: Shape) -> Row:
    case = merge.case(shape, DEVICE, ())
    dtype = shape.torch_dtype
    weight = torch.zeros(shape.N, shape.K, dtype=dtype)
    work = Work(shape.rank * shape.K * shape.N, 2 * weight.nbytes)
    # exact merges multiply in fp32 for every dtype of W
    bound, sides = probes(work, torch.float32, weight)
    return Row(dataclasses.replace(case, sides=(*case.sides, *sides)), bound)


def _whole_model(module: str, function: str) -> Callable[[Shape], Row]:
    """Of a module that imports transformers."""

    def build_row(shape: Shape) -> Row:
        row: Row = getattr(importlib.import_module(f"peftk.tools.benchmark.{module}"), function)(shape)
        return row

    return build_row


def _contended(shape: Shape) -> Row:
    case = _select_sides(lora_linear.case(shape._replace(op="lora_linear"), DEVICE, ()), LINEAR)
    return Row(dataclasses.replace(case, shape=shape))


def _batch_invariant(shape: Shape) -> Row:
    return Row(batch_invariant.case(shape, DEVICE))


def _lora_work(shape: Shape) -> Work:
    """The work of LoRALinear."""
    return add(linear_work(shape.M, shape.K, shape.N, shape.torch_dtype), _lora_adapter_work(shape))


def _lora_adapter_work(shape: Shape) -> Work:
    """Its adapter is fp32."""
    return adapter_work(*shape[2:], torch.float32)


def _with_bounds(case: Case, work: Work, weight: Tensor) -> Row:
    bound, sides = probes(work, case.shape.torch_dtype, weight)
    return Row(dataclasses.replace(case, sides=(*case.sides, *sides)), bound)


def _select_sides(case: Case, *peers: str) -> Case:
    """The case with only peftk's sides and these peers."""
    kept = tuple(side for side in case.sides if side.name in peers or side.name.startswith("peftk"))
    return dataclasses.replace(case, sides=kept)


_BUILDERS: dict[str, Callable[[Shape], Row]] = {
    "lora_linear": _forward,
    "compile": _compile,
    "multi_lora_linear": _multi,
    "train": _train,
    "adapter_cost": _adapter_cost,
    "merge": _merge,
    "unmerge": _merge,
    "merge_model": _whole_model("merge_model", "row"),
    "merged_context": _whole_model("merge_model", "row"),
    "model": _whole_model("model", "row"),
    "model_compiled": _whole_model("model", "compiled_row"),
    "model_train": _whole_model("model_train", "row"),
    "model_memory": _whole_model("model_train", "memory_row"),
    "decode": _whole_model("decode", "row"),
    "contended": _contended,
    batch_invariant.OP: _batch_invariant,
}
OPS = tuple(_BUILDERS)
