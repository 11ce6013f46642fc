"""Makes inputs for a model of transformers from its config and its forward's signature.

They are for runs on fake tensors, so only shapes and dtypes matter.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, SAMPLES = 2, 8, 4_000  # sequences, tokens in each, samples of sound (a quarter of a second)
_PARTS = ("vision_config", "audio_config", "text_config", "encoder", "decoder")


def is_transformers(module: nn.Module) -> bool:
    """Whether it is a model of transformers. Does not import transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def sample_inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Named arguments to try, the most likely first: all known ones, then only those that the model needs."""
    takes = inspect.signature(model.forward).parameters
    known = {name: make(model.config) for name, make in _MAKERS.items() if name in takes}
    main = model.main_input_name
    needed = {name for name in known if name == main or name.startswith("decoder_") or name == "bbox"}
    for names in (known.keys(), needed):
        for number in range(max((len(known[name]) for name in names), default=0)):
            yield {name: _tensor(name, known[name][min(number, len(known[name]) - 1)]) for name in names}
    dummy = model.dummy_inputs
    if dummy.keys() <= takes.keys():
        yield dummy


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape, dtype=torch.int64 if name.endswith(("ids", "bbox")) else torch.float32, device="cpu")


def _number(config: Any, *names: str, default: int) -> int:
    """A number from the config or a part of it, under one of these names."""
    for part in (config, *(getattr(config, part, None) for part in _PARTS)):
        for name in names:
            found = getattr(part, name, None)
            if isinstance(found, (list, tuple)) and found:
                found = found[0]
            if isinstance(found, int):
                return found
    return default


def _ids(config: Any) -> list[tuple[int, ...]]:
    return [(BATCH, LENGTH)]


def _images(config: Any) -> list[tuple[int, ...]]:
    channels = _number(config, "num_channels", "in_channels", "in_chans", default=3)
    size = _number(config, "image_size", "img_size", default=224)
    frames = _number(config, "num_frames", "frames_per_clip", default=BATCH)
    return [(BATCH, channels, size, size), (BATCH, frames, channels, size, size)]


def _sound(config: Any) -> list[tuple[int, ...]]:
    length, bins = _number(config, "max_length", default=256), _number(config, "num_mel_bins", default=80)
    return [(BATCH, SAMPLES), (BATCH, length, bins)]


def _features(config: Any) -> list[tuple[int, ...]]:
    bins = _number(config, "num_mel_bins", "feature_size", default=80)
    width = _number(config, "feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins", default=80)
    frames = 2 * _number(config, "max_source_positions", default=128)
    return [(BATCH, bins, frames), (BATCH, 64, width), (BATCH, 1, 1024, bins)]


def _series(config: Any) -> list[tuple[int, ...]]:
    length, channels = _number(config, "context_length", default=32), _number(config, "num_input_channels", default=1)
    return [(BATCH, length, channels)]


_MAKERS: dict[str, Callable[[Any], list[tuple[int, ...]]]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "bbox": lambda config: [(BATCH, LENGTH, 4)],
    "pixel_values": _images,
    "pixel_values_videos": _images,
    "input_values": _sound,
    "input_features": _features,
    "past_values": _series,
}
