"""vLLM with the plug-in, for real: tiny random Llamas, adapters of HF PEFT of several ranks in one batch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import vllm_generate
from tests.support.paths import ROOT

pytestmark = pytest.mark.engines
if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (docs/vllm.md)", allow_module_level=True)

RANKS = [2, 16, 5, 9]
TARGETS = [
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ["q_proj", "v_proj", "down_proj"],  # some slices of the packed layers have no adapter
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    ["up_proj", "o_proj"],
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and adapters that change what it says."""
    import peft
    import transformers

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "model")
    for number, (rank, targets) in enumerate(zip(RANKS, TARGETS, strict=True)):
        base = transformers.LlamaForCausalLM.from_pretrained(folder / "model")
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        adapted.save_pretrained(folder / f"lora{number}")
    return folder


def by_peft(folder: Path, prompt: int, adapter: int | None) -> list[int]:
    import peft
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder / "model").eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, folder / f"lora{adapter}").eval()
    ids = torch.tensor([vllm_generate.PROMPTS[prompt]])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def found(request: pytest.FixtureRequest, models: Path) -> dict[str, list[list[int]]]:
    command = [sys.executable, "-m", vllm_generate.__name__, str(models), request.param]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"dtype": request.param}


def test_each_request_of_a_mix_gets_what_its_adapter_gives_alone(found) -> None:
    assert found["mix"] == found["alone"]


def test_a_slot_that_is_used_again_serves_the_new_adapter(found, models: Path) -> None:
    assert found["again"] == found["mix"]
    if found["dtype"] == "float32":
        assert found["other"] == [by_peft(models, *one) for one in [(0, 3), (1, None), (2, 1)]]


def test_peft_gives_the_same(found, models: Path) -> None:
    if found["dtype"] != "float32":
        pytest.skip("the order of a bfloat16 sum decides between tokens")
    assert found["mix"] == [by_peft(models, *one) for one in enumerate(vllm_generate.IN_THE_MIX)]
    assert found["mix"][0] != by_peft(models, 0, None)  # the adapters matter
