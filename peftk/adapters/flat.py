"""Converts adapters to flat lists and back, since torch.autograd and custom ops take no objects."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftk.adapters import activations
from peftk.adapters.adapter import NOTHING, Adapter, AdapterGrads, Wanted


def flat_tensors(adapters: Sequence[Adapter | None]) -> list[Tensor]:
    """All adapters' tensors in one list: for each adapter its pages of A, pages of B, and bias_A and bias_B if any."""
    return [tensor for adapter in adapters if adapter is not None for tensor in adapter.tensors()]


def flat_wanted(adapters: Sequence[Adapter | None], needs: Sequence[bool]) -> list[Wanted]:
    """Which gradients each adapter needs. needs: whether each tensor of `flat_tensors` needs one."""
    if not any(needs):
        return [NOTHING] * len(adapters)
    remaining, wanted = list(needs), []

    def take(count: int) -> bool:
        taken, remaining[:count] = any(remaining[:count]), []
        return taken

    for a in adapters:
        pages = 0 if a is None else len(a.pages_A)
        has_A, has_B = a is not None and a.bias_A is not None, a is not None and a.bias_B is not None
        wanted.append(Wanted(take(pages), take(pages), take(has_A), take(has_B)))
    return wanted


def flat_grads(adapters: Sequence[Adapter | None], grads: list[AdapterGrads | None]) -> list[Tensor | None]:
    """The gradients in the order of `flat_tensors`, those of A and B split into the adapter's pages."""
    flat: list[Tensor | None] = []
    for adapter, grad in zip(adapters, grads, strict=True):
        if adapter is None or grad is None:
            continue
        sizes = [page.shape[0] for page in adapter.pages_A]
        for whole, dim in ((grad.lora_A, 0), (grad.lora_B, 1)):
            flat += [None] * len(sizes) if whole is None else whole.split(sizes, dim=dim)
        flat += [grad.bias_A] if adapter.bias_A is not None else []
        flat += [grad.bias_B] if adapter.bias_B is not None else []
    return flat


_ACTIVATIONS = {code: name for name, code in activations.CODES.items()}
_FIELDS = 4


def pack(adapters: Sequence[Adapter | None]) -> tuple[list[Tensor], list[int], list[float]]:
    """A table's adapters as lists that a custom op can take: tensors, layout (4 integers per adapter) and scalings."""
    layout: list[int] = []
    scalings: list[float] = []
    for adapter in adapters:
        if adapter is None:
            layout += [-1, 0, 0, 0]
            scalings.append(0.0)
        else:
            has_A, has_B = int(adapter.bias_A is not None), int(adapter.bias_B is not None)
            layout += [len(adapter.pages_A), activations.CODES[adapter.activation], has_A, has_B]
            scalings.append(adapter.scaling)
    return flat_tensors(adapters), layout, scalings


def unpack(tensors: Sequence[Tensor], layout: Sequence[int], scalings: Sequence[float]) -> tuple[Adapter | None, ...]:
    """The adapters from what `pack` returned."""
    remaining = list(tensors)

    def take(count: int) -> tuple[Tensor, ...]:
        taken = tuple(remaining[:count])
        del remaining[:count]
        return taken

    adapters: list[Adapter | None] = []
    for index, scaling in enumerate(scalings):
        pages, activation, has_A, has_B = layout[index * _FIELDS : (index + 1) * _FIELDS]
        if pages < 0:
            adapters.append(None)
            continue
        pages_A, pages_B = take(pages), take(pages)
        bias_A, bias_B = take(has_A), take(has_B)
        adapters.append(
            Adapter(
                pages_A, pages_B, scaling, _ACTIVATIONS[activation], *(b[0] if b else None for b in (bias_A, bias_B))
            )
        )
    return tuple(adapters)
