"""Bottleneck adapters at AdapterHub's positions around a skip connection and its LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftk.nn.attached import first_output, replace_first_output
from peftk.nn.parallel_adapter import ParallelAdapter


class NormAdapter(ParallelAdapter):
    """y = LN(z + s · act(LN(z) Aᵀ + a) Bᵀ + β): attached to the LayerNorm after a skip, with input z [..., d].

    This is the adapter of Pfeiffer et al. 2020 in models that normalise after the skip (BERT). Its input is what the
    layer would have returned, and its output is added before the LayerNorm, which therefore runs twice. Precision as in
    `ParallelAdapter`.
    """

    def _hooks(self, module: nn.Module) -> list[Callable[[], RemovableHandle]]:
        return [lambda: module.register_forward_pre_hook(self._adapt_input)]

    def _adapt_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z: Tensor = args[0]
        return (self._sum(z, type(module).forward(module, z)), *args[1:])


class StreamAdapter(ParallelAdapter):
    """y = h + s · act((x + h) Aᵀ + a) Bᵀ + β, where h is what a block adds to the skip x: z = x + h becomes z + f(z).

    This is the series adapter after a skip whose sum is not the output of any module. `source` is the submodule whose
    input is x, before the block's LayerNorm; `sink` returns h. Precision as in `ParallelAdapter`.
    """

    def _sum(self, output: Any, x: Tensor) -> Any:
        h = first_output(output)
        return replace_first_output(output, (h + self(x + h)).to(h.dtype))
