"""The methods that are compared: what peftk config each is, where it begins, and its grid of learning rates."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

import peftk

LORA_ALPHA = 16

# Learning rates from small to large, half a decade apart: those of full fine-tuning as in the papers on BERT, those of
# the others about ten times as large.
RATES = {
    "full": (3e-5, 1e-4, 3e-4),
    "top": (3e-5, 1e-4, 3e-4),
    "head": (1e-3, 3e-3, 1e-2),
    "bitfit": (1e-3, 3e-3, 1e-2),
    "series": (3e-4, 1e-3, 3e-3),
    "parallel": (3e-4, 1e-3, 3e-3),
    "lora": (3e-4, 1e-3, 3e-3),
    "prompt": (1e-3, 3e-3, 1e-2),
}
# LoRA's placements, as names that end those of a BERT's linears
PLACES = {
    "q": ["query"],
    "qv": ["query", "value"],
    "attention": ["query", "key", "value", "attention.output.dense"],
    "all": ["query", "key", "value", "output.dense", "intermediate.dense"],
}
PLACE_NAMES = {
    "q": "query",
    "qv": "query and value",
    "attention": "all four of attention",
    "all": "all six linears",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """kind: a key of RATES. size: a rank, bottleneck, number of layers or tokens. where: "qkv" or a key of PLACES."""

    kind: str
    size: int = 0
    where: str = ""

    @property
    def label(self) -> str:
        match self.kind:
            case "full":
                return "full fine-tuning"
            case "head":
                return "head only"
            case "top":
                return f"top {self.size} layer{'s' * (self.size > 1)}"
            case "bitfit":
                return "BitFit (query, key, value)" if self.where else "BitFit"
            case "lora":
                return f"LoRA, r = {self.size}, {PLACE_NAMES[self.where]}"
            case "prompt":
                return f"LLaMA-Adapter, {self.size} tokens"
        return f"{self.kind} adapters, R = {self.size}"

    @property
    def family(self) -> str:
        """The name of its curve in a figure."""
        names = {"full": "full fine-tuning", "head": "head only", "top": "top layers", "bitfit": "BitFit"}
        names |= {"lora": "LoRA", "prompt": "LLaMA-Adapter"}
        return names.get(self.kind, f"{self.kind} adapters")

    @property
    def rates(self) -> tuple[float, ...]:
        return RATES[self.kind]

    def configs(self) -> list[Any]:
        """For a Classifier. The head trains with every method."""
        match self.kind:
            case "full":
                return [peftk.FullConfig()]
            case "head":
                return [peftk.HeadConfig()]
            case "top":
                return [peftk.TopLayersConfig(self.size)]
            case "bitfit":
                biases: Any = ["query", "key", "value"] if self.where else "all"
                return [peftk.BitFitConfig(biases=biases), peftk.HeadConfig()]
            case "series":
                return [peftk.SeriesAdapterConfig(bottleneck=self.size), peftk.HeadConfig()]
            case "parallel":
                return [peftk.ParallelAdapterConfig(bottleneck=self.size), peftk.HeadConfig()]
            case "prompt":
                return [peftk.LlamaAdapterConfig(adapter_len=self.size), peftk.HeadConfig()]
        lora = peftk.LoraConfig(r=self.size, lora_alpha=LORA_ALPHA, target_modules=PLACES[self.where])
        return [lora, peftk.HeadConfig()]

    def first_layer(self, layers: int) -> int:
        """The lowest of `layers` layers that changes; all below are frozen. 0: the embeddings or the first layer."""
        return {"head": layers, "top": layers - self.size}.get(self.kind, 0)

    def inject(self, model: nn.Module) -> None:
        peftk.inject(model, self.configs())


FULL, HEAD, BITFIT = Method("full"), Method("head"), Method("bitfit")


def compared(layers: int) -> list[Method]:
    """The rows of part 1."""
    return [
        FULL,
        HEAD,
        *(Method("top", k) for k in range(1, layers + 1)),
        BITFIT,
        Method("bitfit", where="qkv"),
        Method("series", 8),
        Method("series", 64),
        Method("parallel", 16),
        Method("parallel", 64),
        Method("lora", 1, "qv"),
        Method("lora", 8, "qv"),
        Method("prompt", 10),
    ]
