"""Every architecture of transformers that can be built small, on the meta device: names and shapes, no numbers."""

from __future__ import annotations

import functools
import warnings

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto

# for each architecture, the first of these that it has: names are most difficult in the heads
_TASKS = (
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_MAPPING_NAMES,
)
_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
    *("num_encoder_layers", "num_decoder_layers", "encoder_num_layers"),
)

NAMES = sorted(name for name in transformers.CONFIG_MAPPING if any(name in task for task in _TASKS))


@functools.lru_cache(maxsize=8)
def build(name: str) -> nn.Module | None:
    """A model of the architecture, with two layers if its config has a number of layers.

    None if its default config is not enough (it needs another package, or a backbone).
    """
    kind = next(task[name] for task in _TASKS if name in task)
    made = getattr(transformers, kind if isinstance(kind, str) else kind[0])
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        for shrink in (_shrink, lambda config: config):
            try:
                return made(shrink(transformers.CONFIG_MAPPING[name]()))
            except Exception:  # any error of the model's code; the next config may work
                continue
    return None


def _shrink(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            _shrink(part)
    for field in _DEPTHS:
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, 2)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:2]
    return config
