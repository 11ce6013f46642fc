"""A tiny random Llama, LoRA checkpoints for it on disk, and what each of them generates alone."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import peftk
from peftk.methods.inject import lora_layers

VOCABULARY = 100
RANKS = (4, 8, 16, 20, 33)
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=VOCABULARY,
        intermediate_size=96, max_position_embeddings=256,
    )  # fmt: skip
    made = LlamaForCausalLM(config).to(dtype).eval()
    made.generation_config.pad_token_id = 0
    return made


def write_adapter(path: pathlib.Path, rank: int, seed: int, targets: Sequence[str] = EVERY_LINEAR) -> pathlib.Path:
    """Writes a checkpoint that changes the model's output clearly."""
    changed = model()
    peftk.inject(changed, peftk.LoraConfig(r=rank, target_modules=list(targets)))
    randomise(changed, seed)
    peftk.save_adapter(changed, path)
    return path


def randomise(injected: nn.Module, seed: int) -> None:
    """Fills the adapters of an injected model, strongly enough to change what it generates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(injected):
            for factor in (layer.lora_A, layer.lora_B):
                factor.copy_(torch.randn(factor.shape, generator=generator) / 4)


def write_adapters(folder: pathlib.Path) -> list[str]:
    """Checkpoints of five ranks; every other one adapts the output layer too."""
    for number, rank in enumerate(RANKS):
        targets = [*EVERY_LINEAR, "lm_head"] if number % 2 else EVERY_LINEAR[number:]
        write_adapter(folder / f"a{number}", rank, number, targets)
    return [f"a{number}" for number in range(len(RANKS))]


@functools.cache
def _alone(path: pathlib.Path | None) -> nn.Module:
    plain = model()
    if path is not None:
        peftk.load_adapter(plain, path)
    return plain


def alone(path: pathlib.Path | None, prompt: Sequence[int], new: int) -> tuple[int, ...]:
    """The tokens that one adapter generates alone, greedily, by transformers' `generate`; no end token stops it."""
    out = _alone(path).generate(torch.tensor([list(prompt)]), max_new_tokens=new, do_sample=False, eos_token_id=None)
    return tuple(out[0, len(prompt) :].tolist())


def prompts(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def tokenizer() -> Any:
    """Token i is the text " w<i>"; 2 is the end token, 1 begins a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"▁w{i}": i for i in range(3, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
