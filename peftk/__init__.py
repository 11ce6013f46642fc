"""peftk: kernels that make parameter-efficient fine-tuning free.

One fused operation, y = W₀x + b + s·(xA)B, with another adapter for every token of a batch if need be, behind drop-in
Linear replacements. See README.md for a tour, `peftk.explain` for what serves a call on this machine.
"""

from peftk import functional
from peftk.backends import BackendError
from peftk.bank import AdapterBank, PackedBank
from peftk.checkpoint import load_adapter, save_adapter
from peftk.combine import combine, combine_checkpoints
from peftk.explain import explain
from peftk.functional import MergeReceipt
from peftk.interop.peft_checkpoint import CheckpointError, LoadedAdapter
from peftk.interop.peft_model import accelerate, decelerate
from peftk.methods.lora import LoraConfig
from peftk.methods.plan import freeze
from peftk.model import count_parameters, inject
from peftk.model_merge import merge_adapter, merged, switch_adapter, unmerge_adapter
from peftk.nn import LoRALinear, MultiLoRALinear
from peftk.server import MultiAdapter
from peftk.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "BackendError",
    "CheckpointError",
    "LoRALinear",
    "LoadedAdapter",
    "LoraConfig",
    "MergeReceipt",
    "MultiAdapter",
    "MultiLoRALinear",
    "PackedBank",
    "accelerate",
    "combine",
    "combine_checkpoints",
    "count_parameters",
    "decelerate",
    "explain",
    "freeze",
    "functional",
    "inject",
    "load_adapter",
    "merge_adapter",
    "merged",
    "save_adapter",
    "switch_adapter",
    "tune",
    "unmerge_adapter",
]
