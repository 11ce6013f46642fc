"""Bottleneck adapters in the places where AdapterHub puts some: around a skip and its LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftk.nn.attached import first_output, with_first
from peftk.nn.parallel_adapter import ParallelAdapter


class NormAdapter(ParallelAdapter):
    """y = LN(z + s · act(LN(z) Aᵀ + a) Bᵀ + β): hangs on the LayerNorm behind a skip and changes its input z [..., d].

    The adapter of Pfeiffer et al. 2020 in models that normalise behind the skip (BERT): it sees what the layer would
    have returned, and adds to what is normalised. The LayerNorm runs twice. Precision as in `ParallelAdapter`.
    """

    def _hooks(self, module: nn.Module) -> list[Callable[[], RemovableHandle]]:
        return [lambda: module.register_forward_pre_hook(self._before)]

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z: Tensor = args[0]
        return (self._sum(z, type(module).forward(module, z)), *args[1:])


class StreamAdapter(ParallelAdapter):
    """y = h + s · act((x + h) Aᵀ + a) Bᵀ + β, where h is what a block adds to the skip x: z = x + h becomes z + f(z).

    The series adapter behind a skip that no module ends. `source` gets x, before the block's LayerNorm; `sink` returns
    h. Precision as in `ParallelAdapter`.
    """

    def _sum(self, output: Any, x: Tensor) -> Any:
        h = first_output(output)
        return with_first(output, (h + self(x + h)).to(h.dtype))
