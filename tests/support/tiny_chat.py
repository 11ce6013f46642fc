"""A tiny Llama with a tokenizer, and LoRA checkpoints for it, as files: what `peftk serve` reads."""

from __future__ import annotations

import pathlib

import torch

import peftk
from peftk.methods.inject import lora_layers

TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_model(folder: pathlib.Path, *, chat: bool = True, seed: int = 0) -> None:
    """Two layers of width 32, 512 positions, random weights in fp32; a token per byte. It never ends a text itself."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if chat:
        fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def save_adapter(model_folder: pathlib.Path, folder: pathlib.Path, *, seed: int, r: int = 4) -> None:
    """A LoRA on every linear with random factors that change what the model says."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    peftk.inject(model, peftk.LoraConfig(r=r, lora_alpha=2 * r))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.3)
    peftk.save_adapter(model, folder)
