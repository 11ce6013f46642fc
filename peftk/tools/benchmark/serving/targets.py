"""The targets of serving, which `peftk bench --suite serving` measures."""

from __future__ import annotations

from typing import NamedTuple

ENGINE = "peftk, an adapter for each"
NO_ADAPTERS = "the same engine, no adapters"
UNMODIFIED = "transformers, no adapters"
PADDED = "peftk, generate() on a padded batch"
PEFT = "HF PEFT, generate(adapter_names=…)"
VLLM = "vLLM with LoRA"
VLLM_PLUGIN = "vLLM with LoRA and peftk's plug-in"
VLLM_PLUGIN_BASE = "vLLM and the plug-in, no adapters"
VLLM_PLAIN = "vLLM without LoRA, no adapters"
LLAMA_CPP = "llama.cpp, different adapters"
LLAMA_CPP_SAME = "llama.cpp, one adapter for all"
FASTEST_WITHOUT = "no adapters"  # the faster of the two
LOAD = "adapter load, p99 in ms"


class Target(NamedTuple):
    """In a batch of so many adapters the engine must be `value` times faster than the peer; a load take at most value.

    noise: by which medians of equal sides differ.
    """

    adapters: int
    peer: str
    value: float
    at_most: bool = False
    noise: float = 0.0

    def met(self, found: float) -> bool:
        return found <= self.value if self.at_most else found >= self.value * (1 - self.noise)

    def __str__(self) -> str:
        noise = f" (−{self.noise:.0%})" if self.noise else ""
        return f"{'≤' if self.at_most else '≥'} {self.value:g}{noise}"


TARGETS = (
    Target(8, FASTEST_WITHOUT, 0.95),
    Target(64, FASTEST_WITHOUT, 0.90),
    Target(8, PEFT, 3.0),
    Target(8, VLLM, 4.0),
    Target(8, LLAMA_CPP, 1.5),
    Target(8, PADDED, 1.0, noise=0.03),
    Target(32, LOAD, 5.0, at_most=True),
)
