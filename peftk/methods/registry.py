"""All methods' configs by class name, which is the name in checkpoints."""

from __future__ import annotations

from typing import Any

from peftk.methods.adapterhub import AdapterHubConfig
from peftk.methods.bitfit import BitFitConfig
from peftk.methods.layers import FullConfig, HeadConfig, TopLayersConfig
from peftk.methods.llama_adapter import LlamaAdapterConfig
from peftk.methods.lora import LoraConfig
from peftk.methods.parallel import ParallelAdapterConfig
from peftk.methods.series import SeriesAdapterConfig

CONFIGS: dict[str, type[Any]] = {
    config.__name__: config
    for config in (
        AdapterHubConfig,
        BitFitConfig,
        FullConfig,
        HeadConfig,
        LlamaAdapterConfig,
        LoraConfig,
        ParallelAdapterConfig,
        SeriesAdapterConfig,
        TopLayersConfig,
    )
}
