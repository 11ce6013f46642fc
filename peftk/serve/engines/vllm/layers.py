"""What of vLLM the plug-in replaces: classes, by vLLM's out-of-tree registry where there is one, never files.

Base layers (`PluggableLayer.register_oot`): on a CPU vLLM hands each weight to oneDNN and drops it. With LoRA, where
our kernel multiplies base layer and adapters at once, the weight stays as it is. LoRA layers (two names of
`vllm.lora.utils`, for which there is no registry): they tell the wrapper the rank of what is loaded, and call it once
instead of twice. tests/serve/engines/vllm checks all names against the vLLM that is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.lora import utils
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers import linear, vocab_parallel_embedding
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from peftk.ops import layer_calls

BASE_LAYERS = (
    linear.ReplicatedLinear,
    linear.ColumnParallelLinear,
    linear.MergedColumnParallelLinear,
    linear.QKVParallelLinear,
    linear.RowParallelLinear,
    vocab_parallel_embedding.ParallelLMHead,
)


def use_punica(platform: type, name: str) -> None:
    """Makes a platform class name this class as its punica wrapper."""
    platform.get_punica_wrapper = classmethod(lambda cls: name)  # type: ignore[attr-defined]


def replace() -> None:
    """Replaces vLLM's base and LoRA layers, once. Layers for which another plug-in has its own are left alone."""
    if current_platform.is_cpu():
        for cls in BASE_LAYERS:
            if cls.__name__ not in op_registry_oot:
                PluggableLayer.register_oot(_with(KeepsItsWeight, cls), name=cls.__name__)
    utils._all_lora_classes = tuple(map(_on_peftk, utils._all_lora_classes))
    utils.LogitsProcessorWithLoRA = _on_peftk(utils.LogitsProcessorWithLoRA)


def _on_peftk(cls: type[BaseLayerWithLoRA]) -> type[BaseLayerWithLoRA]:
    """The LoRA layer on our mixin, if it is a linear one or the head."""
    if issubclass(cls, BaseLinearLayerWithLoRA) and not issubclass(cls, FusedLoRA):
        return _with(FusedLoRA, cls)
    if cls.__name__ == "LogitsProcessorWithLoRA" and not issubclass(cls, KnowsItsRanks):
        return _with(KnowsItsRanks, cls)
    return cls


def _with(mixin: type, cls: type) -> Any:
    return type(cls.__name__, (mixin, cls), {"__module__": __name__})


class KeepsItsWeight:
    """For a base layer of a model with LoRA: weight stays [N, K], and our kernels multiply with it."""

    quant_method: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config_or_none()
        if config is not None and config.lora_config is not None:
            ours = {UnquantizedLinearMethod: Kept, UnquantizedEmbeddingMethod: KeptHead}.get(type(self.quant_method))
            self.quant_method = self.quant_method if ours is None else ours()


class Keeping:
    """For vLLM's unquantized methods. They call `cpu_linear` of the layer."""

    def process_weights_after_loading(self, layer: Any) -> None:
        # a plain Parameter: vLLM's has a __torch_function__ of its own, for loading
        layer.weight = nn.Parameter(layer.weight.data.as_subclass(torch.Tensor), requires_grad=False)
        layer.cpu_linear = layer_calls.base_linear


class Kept(Keeping, UnquantizedLinearMethod):
    pass


class KeptHead(Keeping, UnquantizedEmbeddingMethod):
    pass


class KnowsItsRanks:
    """For a LoRA layer: tells the punica wrapper what is loaded into a slot, or cleared."""

    punica_wrapper: Any
    lora_a_stacked: Any
    lora_b_stacked: Any

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        super().set_lora(index, lora_a, lora_b)  # type: ignore[misc]
        self.punica_wrapper.stacks.learn(*self._stacks(), index)

    def reset_lora(self, index: int) -> None:
        super().reset_lora(index)  # type: ignore[misc]
        self.punica_wrapper.stacks.forget(*self._stacks(), index)

    def _stacks(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if isinstance(self.lora_a_stacked, tuple):
            return self.lora_a_stacked, self.lora_b_stacked
        return (self.lora_a_stacked,), (self.lora_b_stacked,)


class FusedLoRA(KnowsItsRanks):
    """A LoRA layer whose base layer and adapters are one call, where the weight was kept."""

    base_layer: Any

    def _apply_sync(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(self.base_layer.quant_method, Kept):
            return self.punica_wrapper.linear(x, self.base_layer.weight, bias, self.lora_a_stacked, self.lora_b_stacked)
        return super()._apply_sync(x, bias)  # type: ignore[misc]
