"""peftk: kernels that make parameter-efficient fine-tuning free.

One fused operation, y = W₀x + b + s·(xA)B, with a different adapter for every token of a batch if need be, behind
drop-in replacements of nn.Linear. README.md gives a tour; `peftk.explain` says which kernel runs a call on this
machine.
"""

from peftk import functional
from peftk.adapters.bank import AdapterBank, PackedBank
from peftk.adapters.carry import carry_route
from peftk.backends.call import BackendError
from peftk.backends.determinism import deterministic, is_batch_invariant
from peftk.checkpoints.files import CheckpointError
from peftk.checkpoints.peft import LoadedAdapter
from peftk.checkpoints.store import load_adapter, save_adapter
from peftk.explanation import explain
from peftk.functional import MergeReceipt
from peftk.interop.peft_model import accelerate, decelerate
from peftk.methods.adapterhub import AdapterHubConfig
from peftk.methods.bitfit import BitFitConfig
from peftk.methods.inject import inject
from peftk.methods.layers import FullConfig, HeadConfig, TopLayersConfig
from peftk.methods.llama_adapter import LlamaAdapterConfig
from peftk.methods.lora import LoraConfig
from peftk.methods.parallel import ParallelAdapterConfig
from peftk.methods.plan import freeze
from peftk.methods.series import SeriesAdapterConfig
from peftk.models.accounting import ParameterCount, count_parameters
from peftk.models.combine import combine, combine_checkpoints
from peftk.models.merging import merge_adapter, merged, switch_adapter, unmerge_adapter
from peftk.models.quantizing import quantize
from peftk.models.server import MultiAdapter
from peftk.nn import LoRALinear, MultiLoRALinear
from peftk.quantized.weight import QuantizedWeight
from peftk.system.precision import precision
from peftk.system.version import __version__
from peftk.tuning.tune import tune

__all__ = [
    "AdapterBank",
    "AdapterHubConfig",
    "BackendError",
    "BitFitConfig",
    "CheckpointError",
    "FullConfig",
    "HeadConfig",
    "LlamaAdapterConfig",
    "LoRALinear",
    "LoadedAdapter",
    "LoraConfig",
    "MergeReceipt",
    "MultiAdapter",
    "MultiLoRALinear",
    "PackedBank",
    "ParallelAdapterConfig",
    "ParameterCount",
    "QuantizedWeight",
    "SeriesAdapterConfig",
    "TopLayersConfig",
    "__version__",
    "accelerate",
    "carry_route",
    "combine",
    "combine_checkpoints",
    "count_parameters",
    "decelerate",
    "deterministic",
    "explain",
    "freeze",
    "functional",
    "inject",
    "is_batch_invariant",
    "load_adapter",
    "merge_adapter",
    "merged",
    "precision",
    "quantize",
    "save_adapter",
    "switch_adapter",
    "tune",
    "unmerge_adapter",
]
