"""Small random transformers of every family that peftk's methods know, and a batch to run them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 60


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**_SIZES, intermediate_size=48, max_position_embeddings=32, num_labels=3)
    return _made(BertForSequenceClassification, config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _made(
        GPT2LMHeadModel,
        GPT2Config(n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, vocab_size=VOCABULARY, n_positions=32, n_inner=48),
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_SIZES, intermediate_size=48, max_position_embeddings=32, num_key_value_heads=2)
    return _made(LlamaForCausalLM, config)


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**_SIZES, intermediate_size=48, max_position_embeddings=32, num_key_value_heads=2, head_dim=16)
    return _made(Qwen3ForCausalLM, config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=WIDTH, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=HEADS, vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )  # fmt: skip
    return _made(T5ForConditionalGeneration, config)


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder with a head, over embeddings of ids."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.classifier = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.classifier(self.encoder(self.embedding(input_ids), src_key_padding_mask=padding))


def torch_encoder() -> nn.Module:
    torch.manual_seed(0)
    return TorchEncoder().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    made.__name__: made for made in (bert, gpt2, llama, qwen3, t5, torch_encoder)
}
_SIZES = {
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
}  # fmt: skip


def run(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """The model's output for a small batch."""
    if ids is None:
        ids = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    inputs: dict[str, Any] = {"input_ids": ids}
    if hasattr(model, "decoder"):
        inputs["decoder_input_ids"] = ids[:, :5]
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def _made(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers initializes them with zeros, which would hide errors
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """Draws all adapter Parameters of a module at random, so that none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name in getattr(part, "adapter_parameters", ()):
                parameter = part._parameters.get(name)
                if parameter is not None:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return module
