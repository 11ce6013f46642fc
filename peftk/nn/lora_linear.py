"""LoRALinear: a drop-in nn.Linear with one trainable low-rank adapter, as one fused operation."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from peftk import functional
from peftk.adapters import checks
from peftk.adapters.adapter import adapter_of
from peftk.adapters.dropout import dropout_of
from peftk.functional import MergeReceipt
from peftk.nn import merging, shared
from peftk.nn.frozen_linear import FrozenLinear, linear_shape
from peftk.nn.parameters import default_adapter_dtype, param
from peftk.nn.replace import as_linear, fan_in_fan_out, take_place
from peftk.nn.shared import Tie
from peftk.ops import layer_calls
from peftk.ops.dispatch import direct_lora_linear
from peftk.reference.receipt import BiasReceipt
from peftk.system import interrupts
from peftk.system.lasting import lasting


class LoRALinear(FrozenLinear):
    """y = xWᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ, with W and bias frozen, A [r, K] and B [N, r] trainable.

    s = lora_alpha / r, or lora_alpha / √r with use_rslora; it has no unit. A starts as kaiming-uniform, B as zero, so a
    new layer computes what the linear did. `weight` and `bias` are the linear's own Parameters, not copies.
    lora_bias=True adds s · b, with b [N] trainable and zero at first.

    It behaves as nn.Linear does in training, in eval mode, and under no_grad, torch.compile and autocast. For precision
    see `peftk.functional.lora_linear`. While merged, `weight` holds W + s·BA and `bias` holds bias + s·b. A state_dict
    taken then holds them too, and a plain linear can load it.

    Source: Hu et al. 2021; Kalajdzievski 2023 (rsLoRA).
    """

    adapter_parameters = ("lora_A", "lora_B", "lora_bias")
    lora_bias: nn.Parameter | None

    @lasting()
    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        fan_in_fan_out: bool = False,
        lora_bias: bool = False,
    ) -> None:
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"r: expected an integer of 1 or more, got {r!r}")
        if not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha: expected a finite number, got {lora_alpha!r}")
        N, K = linear_shape(weight, bias, fan_in_fan_out)
        checks.dropout(lora_dropout, None, weight.device)
        adapter_dtype = default_adapter_dtype(weight, adapter_dtype)
        checks.adapter_dtype(adapter_dtype, weight.dtype)
        lora_A = torch.empty(r, K, dtype=adapter_dtype, device=weight.device)
        lora_B = torch.empty(N, r, dtype=adapter_dtype, device=weight.device)
        # from here on nothing can fail, and the linear's own Parameters are changed
        super().__init__(weight, bias, fan_in_fan_out=fan_in_fan_out)
        self.r, self.lora_alpha, self.use_rslora, self.lora_dropout = r, float(lora_alpha), use_rslora, lora_dropout
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.register_parameter("lora_bias", nn.Parameter(lora_B.new_empty(N)) if lora_bias else None)
        self.receipt: MergeReceipt | None = None
        self.bias_receipt: BiasReceipt | None = None
        self.ties: tuple[Tie, ...] = ()
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        lora_bias: bool = False,
    ) -> LoRALinear:
        """The layer that replaces `linear` (nn.Linear or Conv1D).

        lora_alpha: None means r (s = 1). adapter_dtype: of A, B and b; None means fp32, or fp64 for an fp64 weight.

        Raises TypeError or ValueError for any other module or a bad hyper-parameter; `linear` is unchanged then.
        """
        base = as_linear(linear)
        layer = cls(
            base.weight,
            base.bias,
            r=r,
            lora_alpha=r if lora_alpha is None else lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            adapter_dtype=adapter_dtype,
            fan_in_fan_out=fan_in_fan_out(linear),
            lora_bias=lora_bias,
        )
        return take_place(layer, linear)

    def reset_parameters(self) -> None:
        """Sets A to kaiming-uniform (as nn.Linear's weight), and B and b to zero: the adapter adds nothing."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → y [..., N], in x's dtype."""
        weight, bias = self.matrix, param(self, "bias")
        if self.receipt is not None:
            return layer_calls.base_linear(x, weight, bias)
        lora_A, lora_B, lora_bias = param(self, "lora_A"), param(self, "lora_B"), param(self, "lora_bias")
        beta = None
        if lora_bias is not None:
            checks.floating("lora_bias", lora_bias)
            beta = self.scaling * lora_bias
        scaling, p = self.scaling, self.lora_dropout if self.training else 0.0
        if p == 0.0:
            y = direct_lora_linear(x, weight, bias, lora_A, lora_B, scaling, bias_B=beta)
            if y is not None:
                return y
        adapter, dropout = adapter_of(lora_A, lora_B, scaling, bias_B=beta), dropout_of(p, None, weight.device)
        return layer_calls.lora_linear(x, weight, bias, adapter, dropout=dropout)

    @property
    def scaling(self) -> float:
        """s: lora_alpha / r, or lora_alpha / √r for rsLoRA."""
        return self.lora_alpha / math.sqrt(self.r) if self.use_rslora else self.lora_alpha / self.r

    @property
    def merged(self) -> bool:
        return self.receipt is not None

    def base(self, name: str) -> Tensor:
        """The unmerged `weight` or `bias`: the tensor itself, or while merged a copy.

        Raises ValueError if its bits have changed since the merge.
        """
        checks.dense(name, getattr(self, name))
        value: Tensor = getattr(self, name).detach()
        if name == "bias" and self.bias_receipt is not None:
            receipt = self.bias_receipt.to(value.device)
            receipt.check(value)
            return receipt.before
        if name == "weight" and self.receipt is not None:
            value = value.clone()
            functional.unmerge_(value.t() if self.fan_in_fan_out else value, self.receipt.to(value.device))
        return value

    def merge(self, *, untie: bool = False) -> None:
        """W ← W + s·BA and bias ← bias + s·b, in place. The layer then costs what its base layer costs.

        Does nothing if the layer is merged already. untie: merges into copies of W and bias, so that other modules that
        hold the same weight (tied embeddings) keep theirs; `unmerge` goes back to the shared ones.

        Raises:
            ValueError: W + s·BA or the bias would not be finite; there is a lora_bias but no bias to add it to; or,
                without untie, `inject` found another module of the model that holds the same weight.
            TypeError: the weight has no memory of its own (on meta, a tensor subclass).

        Nothing has changed then.
        """
        if self.merged:
            return
        parts = merging.parts(self)
        with interrupts.deferred(), contextlib.ExitStack() as undo:
            if untie:
                for name in parts:
                    merging.untie(self, name, undo)
            else:
                shared.check_not_shared(self, parts)
            merging.merge([("", self)])
            undo.pop_all()

    def unmerge(self) -> None:
        """Restores W and bias bit for bit as they were before `merge`, even if A, B and b have changed since.

        Raises ValueError if the bits of W or the bias have changed since the merge; nothing is changed then.
        """
        if self.merged:
            merging.unmerge([("", self)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            # W would be replaced, and the receipt could no longer unmerge it
            error_msgs: list[str] = args[-1]
            error_msgs.append(
                f"{prefix.removesuffix('.') or 'LoRALinear'}: expected an unmerged layer, got a merged one"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        rest = f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}, merged={self.merged}"
        return f"{super().extra_repr()}, {rest}"
