"""SeriesAdapter: the bottleneck adapter after a module, as one fused operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftk.adapters.adapter import adapter_of
from peftk.nn.attached import Attached, first_output, replace_first_output
from peftk.nn.bottleneck import Bottleneck
from peftk.nn.parameters import param
from peftk.ops import layer_calls
from peftk.ops.dispatch import direct_lora_linear


class SeriesAdapter(Attached, Bottleneck):
    """y = h + s · act(h Aᵀ + a) Bᵀ + β after a module with output h [..., d]; the identity when new.

    lora_A [R, d] (down), lora_B [d, R] (up), bias_A [R], bias_B [d], all trainable: 2·d·R + R + d parameters.
    `attach(module)` attaches it to a module whose output is h, or a tuple or ModelOutput that begins with h. y has h's
    dtype; for precision see `peftk.functional.adapter_block`.

    Source: Houlsby et al. 2019 (there A and B start at 1e-2 to 1e-3; here B = 0, which is the identity bit for bit).
    """

    name = "series_adapter"

    def __init__(
        self,
        width: int,
        bottleneck: int,
        *,
        activation: str = "relu",
        scaling: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """width: d; bottleneck: R; scaling: s, no unit.

        Raises ValueError or TypeError for a bad number, activation or dtype.
        """
        super().__init__(width, width, bottleneck, activation, scaling, dtype, device)

    def forward(self, h: Tensor) -> Tensor:
        """h [..., d] → y [..., d], in h's dtype."""
        A, B, a, beta = param(self, "lora_A"), param(self, "lora_B"), param(self, "bias_A"), param(self, "bias_B")
        s, activation = self.scaling, self.activation
        y = direct_lora_linear(h, None, None, A, B, s, activation=activation, bias_A=a, bias_B=beta)
        return (
            layer_calls.adapter_block(h, adapter_of(A, B, s, activation=activation, bias_A=a, bias_B=beta))
            if y is None
            else y
        )

    def _hooks(self, module: nn.Module) -> list[Callable[[], RemovableHandle]]:
        return [lambda: module.register_forward_hook(self._adapt_output)]

    def _adapt_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return replace_first_output(output, self(first_output(output)))
