"""Checkpoints in both directions with the real HF PEFT, on a small BERT and on real MiniLM weights where they are."""

from __future__ import annotations

import pathlib

import pytest
import torch
from torch import nn

import peftk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIGS = {
    "few": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
    "patterns": {
        "r": 20,
        "lora_alpha": 5,
        "target_modules": ["query", "dense"],
        "use_rslora": True,
        "rank_pattern": {"query": 3},
        "alpha_pattern": {"output.dense": 11},
    },
    "all": {"r": 1, "target_modules": "all-linear"},
}


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    return transformers.BertModel(config).eval()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(4, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(0, 100, (4, 7)), "attention_mask": mask}


def hidden(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch()).last_hidden_state


def test_checkpoints_of_peft_are_served(tmp_path: pathlib.Path) -> None:
    outputs = {None: hidden(bert())}
    for name, config in CONFIGS.items():
        model = peft.get_peft_model(bert(), peft.LoraConfig(**config)).eval()
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / name)
        outputs[name] = hidden(model)
    base = bert()
    server = peftk.MultiAdapter(base, max_adapters=4)
    for name in CONFIGS:
        server.load(name, tmp_path / name)
    route = ["few", "patterns", None, "all"]
    with server.route(route):
        mixed = hidden(base)
    for row, name in enumerate(route):
        torch.testing.assert_close(mixed[row], outputs[name][row], atol=1e-5, rtol=1e-5)
        assert name is None or not torch.allclose(mixed[row], outputs[None][row], atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_our_checkpoints_are_read_by_peft(tmp_path: pathlib.Path, name: str) -> None:
    model = bert()
    peftk.inject(model, peftk.LoraConfig(**CONFIGS[name]))
    for module in model.modules():
        if isinstance(module, peftk.LoRALinear):
            nn.init.normal_(module.lora_B, std=0.1)
    peftk.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(hidden(theirs), hidden(model), atol=1e-5, rtol=1e-5)
    again = bert()
    peftk.inject(again, peftk.LoraConfig(**CONFIGS[name]))
    peftk.load_adapter(again, tmp_path)
    assert torch.equal(hidden(again), hidden(model))


def test_inject_takes_the_linears_that_peft_takes() -> None:
    for config in CONFIGS.values():
        ours = peftk.inject(bert(), peftk.LoraConfig(**config))
        theirs = peft.get_peft_model(bert(), peft.LoraConfig(**config))
        found = [n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
        assert ours == found
