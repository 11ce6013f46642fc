"""ParallelAdapter and ParallelAdapterLinear: a bottleneck adapter beside a whole block, and beside one linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftk.adapters import activations, checks
from peftk.adapters.adapter import adapter_of
from peftk.nn.attached import Attached, HookState, first_input, first_output, replace_first_output, submodule
from peftk.nn.bottleneck import PARAMETERS, Bottleneck, bottleneck_parameters, reset_bottleneck
from peftk.nn.frozen_linear import FrozenLinear, linear_shape
from peftk.nn.parameters import default_adapter_dtype, param
from peftk.nn.replace import as_linear, fan_in_fan_out, take_place
from peftk.ops import layer_calls
from peftk.ops.dispatch import direct_lora_linear


class ParallelAdapter(Attached, Bottleneck):
    """y = block(x) + s · act(x Aᵀ + a) Bᵀ + β beside a block with input x [..., K] and output [..., N].

    lora_A [R, K], lora_B [N, R], bias_A [R], bias_B [N], all trainable; a new adapter leaves the block's output as it
    was. `attach(module)` attaches it to `module`: x is the first argument of its submodule `source`, and the sum
    replaces the output of its submodule `sink`. Both default to "", the module itself; BERT's feed-forward block, for
    one, is two modules. source must run before sink, in the same thread.

    No kernel adds to a tensor that another module made, so this runs as plain torch operations: the adapter in its own
    dtype (fp32 by default), the sum in the wider of the two dtypes, rounded once to the block's dtype.

    Source: He et al. 2021 (there beside the feed-forward block, with s = 4).
    """

    name = "parallel_adapter"

    def __init__(
        self,
        in_features: int,
        bottleneck: int,
        out_features: int | None = None,
        *,
        activation: str = "relu",
        scaling: float = 4.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        source: str = "",
        sink: str = "",
    ) -> None:
        """in_features: K; out_features: N, None meaning K; bottleneck: R. scaling: s, no unit.

        Raises ValueError or TypeError for a bad number, activation or dtype.
        """
        N = in_features if out_features is None else out_features
        super().__init__(in_features, N, bottleneck, activation, scaling, dtype, device)
        self.source, self.sink, self.hook_state = source, sink, HookState()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → s · act(x Aᵀ + a) Bᵀ + β [..., N], in the adapter's dtype, or autocast's under autocast."""
        A, B, a, beta = (param(self, name) for name in PARAMETERS)
        checks.for_torch(x=x, lora_A=A, lora_B=B, bias_A=a, bias_B=beta)
        z = nn.functional.linear(x.to(A.dtype), A, a)
        return self.scaling * nn.functional.linear(activations.apply(self.activation, z), B) + beta

    def _hooks(self, module: nn.Module) -> list[Callable[[], RemovableHandle]]:
        source, sink = submodule(module, self.source), submodule(module, self.sink)
        if source is sink:
            return [lambda: source.register_forward_hook(self._adapt_output, with_kwargs=True)]
        return [
            lambda: source.register_forward_pre_hook(self._catch, with_kwargs=True),
            lambda: sink.register_forward_hook(self._add),
        ]

    def _adapt_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        return self._sum(output, first_input(args, kwargs))

    def _catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.hook_state.kept = first_input(args, kwargs)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._sum(output, self.hook_state.take(self.source or "the module"))

    def _sum(self, output: Any, x: Tensor) -> Any:
        y = first_output(output)
        return replace_first_output(output, (y + self(x)).to(y.dtype))


class ParallelAdapterLinear(FrozenLinear):
    """y = xWᵀ + bias + s · act(x Aᵀ + a) Bᵀ + β as one fused operation, in place of an nn.Linear.

    W and bias are the linear's own Parameters, frozen; lora_A [R, K], lora_B [N, R], bias_A [R] and bias_B [N] train.
    B, a and β start as zero, so a new layer computes what the linear did. Precision: `peftk.functional.lora_linear`.

    Source: He et al. 2021.
    """

    adapter_parameters = PARAMETERS

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        bottleneck: int,
        activation: str = "relu",
        scaling: float = 4.0,
        adapter_dtype: torch.dtype | None = None,
        fan_in_fan_out: bool = False,
    ) -> None:
        N, K = linear_shape(weight, bias, fan_in_fan_out)
        dtype = default_adapter_dtype(weight, adapter_dtype)
        checks.adapter_dtype(dtype, weight.dtype)
        parameters = bottleneck_parameters(K, N, bottleneck, activation, scaling, dtype, weight.device)
        # from here on nothing can fail, and the linear's own Parameters are changed
        super().__init__(weight, bias, fan_in_fan_out=fan_in_fan_out)
        self.bottleneck, self.activation, self.scaling = bottleneck, activation, float(scaling)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        bottleneck: int,
        activation: str = "relu",
        scaling: float = 4.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> ParallelAdapterLinear:
        """The layer that replaces `linear` (nn.Linear or Conv1D).

        bottleneck: R. scaling: s, no unit. adapter_dtype: None means fp32, or fp64 for an fp64 weight.

        Raises TypeError or ValueError for any other module or a bad hyper-parameter; `linear` is unchanged then.
        """
        base = as_linear(linear)
        layer = cls(
            base.weight,
            base.bias,
            bottleneck=bottleneck,
            activation=activation,
            scaling=scaling,
            adapter_dtype=adapter_dtype,
            fan_in_fan_out=fan_in_fan_out(linear),
        )
        return take_place(layer, linear)

    def reset_parameters(self) -> None:
        """Sets A to kaiming-uniform, and B, a and β to zero: the adapter adds nothing."""
        reset_bottleneck(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → y [..., N], in x's dtype."""
        A, B, a, beta = param(self, "lora_A"), param(self, "lora_B"), param(self, "bias_A"), param(self, "bias_B")
        weight, bias, s, activation = self.matrix, param(self, "bias"), self.scaling, self.activation
        y = direct_lora_linear(x, weight, bias, A, B, s, activation=activation, bias_A=a, bias_B=beta)
        if y is not None:
            return y
        return layer_calls.lora_linear(
            x, weight, bias, adapter_of(A, B, s, activation=activation, bias_A=a, bias_B=beta)
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, bottleneck={self.bottleneck}, activation={self.activation}, "
            f"scaling={self.scaling:g}"
        )
