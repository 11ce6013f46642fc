"""The layers: drop-in replacements for nn.Linear, and adapters that are attached to an existing module."""

from peftk.nn.attached import Attached
from peftk.nn.bitfit import BitFitLinear
from peftk.nn.llama_adapter import LlamaAdapter, Projections
from peftk.nn.lora_linear import LoRALinear
from peftk.nn.multi_lora_linear import MultiLoRALinear
from peftk.nn.parallel_adapter import ParallelAdapter, ParallelAdapterLinear
from peftk.nn.series_adapter import SeriesAdapter

__all__ = [
    "Attached",
    "BitFitLinear",
    "LlamaAdapter",
    "LoRALinear",
    "MultiLoRALinear",
    "ParallelAdapter",
    "ParallelAdapterLinear",
    "Projections",
    "SeriesAdapter",
]
