"""SeriesAdapter: the bottleneck adapter behind a module, as one fused operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftk.adapters.adapter import adapter_of
from peftk.nn.attached import Attached, first_output, with_first
from peftk.nn.bottleneck import Bottleneck
from peftk.nn.parameters import own
from peftk.ops.dispatch import direct_lora_linear
from peftk.ops.layer_calls import adapter_block_unchecked


class SeriesAdapter(Attached, Bottleneck):
    """y = h + s · act(h Aᵀ + a) Bᵀ + β behind a module's output h [..., d]; the identity when new.

    lora_A [R, d] (down), lora_B [d, R] (up), bias_A [R], bias_B [d], all trainable: 2·d·R + R + d parameters.
    `attach(module)` hangs it on a module whose output is h, or a tuple or ModelOutput of which h is the first. For
    precision see `peftk.functional.adapter_block`; y has h's dtype.

    Source: Houlsby et al. 2019 (there A and B start at 1e-2 to 1e-3; here B = 0, which is the identity to the bit).
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
        """width: d; bottleneck: R. Raises ValueError or TypeError for a bad number, activation or dtype."""
        super().__init__(width, width, bottleneck, activation, scaling, dtype, device)

    def forward(self, h: Tensor) -> Tensor:
        """h [..., d] → y [..., d], in h's dtype."""
        A, B, a, beta = own(self, "lora_A"), own(self, "lora_B"), own(self, "bias_A"), own(self, "bias_B")
        s, activation = self.scaling, self.activation
        y = direct_lora_linear(h, None, None, A, B, s, activation=activation, bias_A=a, bias_B=beta)
        return adapter_block_unchecked(h, adapter_of(A, B, s, activation, a, beta)) if y is None else y

    def _hooks(self, module: nn.Module) -> list[Callable[[], RemovableHandle]]:
        return [lambda: module.register_forward_hook(self._behind)]

    def _behind(self, module: nn.Module, args: Any, output: Any) -> Any:
        return with_first(output, self(first_output(output)))
