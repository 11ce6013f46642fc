"""`peftk.quantize`: packs the weights of a model's linears, and says what each loses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from peftk.methods.fields import Names
from peftk.methods.plan import replace_module
from peftk.methods.reads import weight_of
from peftk.methods.targets import ALL_LINEAR, target_linears
from peftk.nn.quantized_linear import QuantizedLinear
from peftk.nn.replace import as_linear, fan_in_fan_out
from peftk.quantized.weight import QuantizedWeight


class QuantizedLayer(NamedTuple):
    """What became of one linear. error: ‖W − Ŵ‖ / ‖W‖ (Frobenius norms), Ŵ the dequantized weight."""

    name: str
    format: str
    error: float
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return f"{self.name}: {self.format}, error {self.error:.2%}, {self.bytes_before} → {self.bytes_after} bytes"


def quantize(
    model: nn.Module,
    format: str,
    *,
    group: int | None = None,
    target_modules: Names = ALL_LINEAR,
    exclude_modules: Names | None = None,
) -> list[QuantizedLayer]:
    """Replaces linears of a model by `QuantizedLinear`, in place; adapters can then be put on them as on the others.

    Args:
        format, group: int8, int4, nf4, fp4, q8_0 or q4_0, as in `peftk.quantized.quantize`.
        target_modules, exclude_modules: as in `peftk.LoraConfig`; "all-linear" leaves the output layer alone.

    Returns:
        list[QuantizedLayer]: for each linear its relative error and its size.

    Raises:
        TypeError, ValueError: nothing matches, a match is not a plain linear, shares its weight with another module, or
            has a shape that the format does not take. The model is unchanged then.
    """
    targets = target_linears(model, target_modules, exclude_modules=exclude_modules)
    found = targets.linears
    _check_not_shared(model, found)
    layers: list[tuple[str, QuantizedLinear]] = []
    report: list[QuantizedLayer] = []
    for name, linear in found.items():
        try:
            layer = QuantizedLinear.from_linear(linear, format, group=group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        layers.append((name, layer))
        report.append(_report(name, linear, layer))
    for name, layer in layers:
        replace_module(model, name, layer)
    return report


def _report(name: str, linear: nn.Module, layer: QuantizedLinear) -> QuantizedLayer:
    plain, packed = as_linear(linear).weight.detach(), layer.weight
    before = (plain.t() if fan_in_fan_out(linear) else plain).float()
    assert isinstance(packed, QuantizedWeight)
    norm = float(torch.linalg.vector_norm(before))
    lost = float(torch.linalg.vector_norm(before - packed.dequantize()))
    return QuantizedLayer(
        name, packed.format, lost / norm if norm else lost, plain.numel() * plain.element_size(), packed.stored_bytes
    )


def _check_not_shared(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Raises ValueError for a weight that another module holds too: it would be kept twice, and no longer tied."""
    own = {id(module) for module in found.values()}
    others = {
        id(parameter): name
        for name, module in model.named_modules()
        if id(module) not in own
        for parameter in module._parameters.values()
        if parameter is not None
    }
    seen: dict[int, str] = {}
    for name, linear in found.items():
        weight = weight_of(linear)
        other = others.get(id(weight)) or seen.get(id(weight))
        if other is not None:
            raise ValueError(f"{name}: expected a weight of its own, got one shared with {other}; exclude one of them")
        seen[id(weight)] = name
