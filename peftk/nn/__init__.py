"""Drop-in layers over the fused operation."""

from peftk.nn.lora_linear import LoRALinear
from peftk.nn.multi_lora_linear import MultiLoRALinear

__all__ = ["LoRALinear", "MultiLoRALinear"]
