"""Every method's config by its name, as checkpoints know it."""

from __future__ import annotations

from typing import Any

from peftk.methods.lora import LoraConfig

CONFIGS: dict[str, type[Any]] = {config.__name__: config for config in (LoraConfig,)}
