"""Tests of count_parameters against published counts, on real architectures on the meta device, without memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import nn

import peftk
from peftk import (
    AdapterHubConfig,
    BitFitConfig,
    FullConfig,
    HeadConfig,
    LlamaAdapterConfig,
    LoraConfig,
    ParallelAdapterConfig,
    SeriesAdapterConfig,
    TopLayersConfig,
)
from peftk.models.accounting import (
    OPTIMIZER_TENSORS,
    Part,
    bitfit_parameters,
    bottleneck_parameters,
    lora_parameters,
    parallel_parameters,
    prompt_parameters,
    transformer_parameters,
)
from tests.support.tiers import FULL


def on_meta(model: Callable[..., nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return model(config)


def opt(d: int, n: int, heads: int) -> nn.Module:
    """OPT is GPT-3's architecture with separate Wq, Wk and Wv."""
    config = transformers.OPTConfig(
        hidden_size=d, num_hidden_layers=n, num_attention_heads=heads, ffn_dim=4 * d, word_embed_proj_dim=d
    )
    return on_meta(transformers.OPTForCausalLM, config)


def gpt3() -> nn.Module:
    return opt(12288, 96, 96)


def opt_6_7b() -> nn.Module:
    return opt(4096, 32, 32)


def bert(d: int = 768, n: int = 12) -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=d, num_hidden_layers=n, num_attention_heads=d // 64, intermediate_size=4 * d
    )
    return on_meta(transformers.BertModel, config)


def roberta(d: int, n: int) -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        hidden_size=d,
        num_hidden_layers=n,
        num_attention_heads=d // 64,
        intermediate_size=4 * d,
    )
    return on_meta(transformers.RobertaModel, config)


def roberta_base() -> nn.Module:
    return roberta(768, 12)


def roberta_large() -> nn.Module:
    return roberta(1024, 24)


def qwen_2_5_3b() -> nn.Module:
    config = transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return on_meta(transformers.Qwen2ForCausalLM, config)


def mt0_large() -> nn.Module:
    config = transformers.MT5Config(
        d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_decoder_layers=24, num_heads=16
    )
    return on_meta(transformers.MT5ForConditionalGeneration, config)


PUBLISHED_LORA = [
    # Hu et al. 2021, tables 2 and 4 (in units of 0.1 M)
    pytest.param(gpt3, ["q_proj", "v_proj"], 1, 4_718_592, "4.7 M", marks=FULL),
    pytest.param(gpt3, ["q_proj", "v_proj"], 8, 37_748_736, "37.7 M", marks=FULL),
    (roberta_base, ["query", "value"], 8, 294_912, "0.3 M"),
    pytest.param(roberta_large, ["query", "value"], 8, 786_432, "0.8 M", marks=FULL),
    # README and examples/int8_training of HF PEFT, to the parameter
    pytest.param(qwen_2_5_3b, ["q_proj", "v_proj"], 16, 3_686_400, "3.7 M", marks=FULL),
    pytest.param(opt_6_7b, ["q_proj", "v_proj"], 16, 8_388_608, "8.4 M", marks=FULL),
]


@pytest.mark.parametrize(("build", "targets", "r", "trainable", "published"), PUBLISHED_LORA)
def test_published_counts_of_lora(
    build: Callable[[], nn.Module], targets: Sequence[str], r: int, trainable: int, published: str
) -> None:
    model = build()
    assert model.device.type == "meta"
    before = peftk.count_parameters(model)
    peftk.inject(model, LoraConfig(r=r, target_modules=targets))
    count = peftk.count_parameters(model)
    assert count == (trainable, before.total + trainable)
    assert f"{count.trainable / 1e6:.1f} M" == published
    lora = count.by_method()["LoRA"]
    assert (lora.parameters, lora.closed_form, lora.difference) == (trainable, trainable, 0)


def test_the_total_that_adapterhub_prints_for_bert() -> None:
    assert peftk.count_parameters(bert()).total == 109_482_240


@pytest.mark.full
def test_totals_that_others_print() -> None:
    """HF PEFT's README (Qwen2.5-3B) and example (OPT-6.7B); Brown et al. 2020: GPT-3 is 175 B."""
    model = qwen_2_5_3b()
    peftk.inject(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    assert peftk.count_parameters(model) == (3_686_400, 3_089_625_088)
    model = opt_6_7b()
    peftk.inject(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    assert peftk.count_parameters(model) == (8_388_608, 6_666_862_592)
    assert round(peftk.count_parameters(gpt3()).total / 1e9) == 175


def llama_7b() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    return on_meta(transformers.LlamaForCausalLM, config)


def bert_large() -> nn.Module:
    return bert(1024, 24)


PUBLISHED = [
    # Houlsby et al. 2019, section 2.1: 2·m·d + d + m per adapter, two per layer; with their 64, adapters are 2.1 % of
    # BERT-large including LayerNorms and head, which they train too
    pytest.param(
        bert_large,
        SeriesAdapterConfig(bottleneck=64),
        "series adapter",
        24 * 2 * (2 * 1024 * 64 + 1024 + 64),
        1.86,
        marks=FULL,
    ),
    (bert, SeriesAdapterConfig(bottleneck=64), "series adapter", 2_379_264, 2.13),
    # Pfeiffer et al. 2020: one per layer, d/a = 16; what
    # AdapterHub's adapter_summary() prints for BERT-base (seq_bn, and double_seq_bn)
    pytest.param(
        bert, SeriesAdapterConfig(reduction_factor=16, where=["mlp"]), "series adapter", 894_528, 0.81, marks=FULL
    ),
    pytest.param(bert, SeriesAdapterConfig(reduction_factor=16), "series adapter", 1_789_056, 1.61, marks=FULL),
    (bert, AdapterHubConfig(), "series adapter", 1_789_056, 1.61),
    pytest.param(
        bert, AdapterHubConfig(mh_adapter=False, placement="before_norm"), "series adapter", 894_528, 0.81, marks=FULL
    ),
    # He et al. 2021: parallel adapters beside the MLP
    (bert, ParallelAdapterConfig(bottleneck=512), "parallel adapter", 12 * (2 * 768 * 512 + 768 + 512), 7.95),
    # Ben Zaken et al. 2021, table 1: 0.09 % of BERT-base, 0.08 % of BERT-large
    (bert, BitFitConfig(), "BitFit", bitfit_parameters(12, 768) + 2 * 768, 0.09),
    pytest.param(bert_large, BitFitConfig(), "BitFit", bitfit_parameters(24, 1024) + 2 * 1024, 0.08, marks=FULL),
    # Zhang et al. 2023: 1.2 M for LLaMA-7B, prompts of 10 in the topmost 30 layers
    (llama_7b, LlamaAdapterConfig(adapter_len=10, adapter_layers=30), "LLaMA-Adapter", 30 * (10 * 4096 + 32), 0.02),
]


@pytest.mark.parametrize(("build", "config", "method", "trainable", "percent"), PUBLISHED)
def test_published_counts_of_other_methods(
    build: Callable[[], nn.Module], config: Any, method: str, trainable: int, percent: float
) -> None:
    model = build()
    peftk.inject(model, config)
    count = peftk.count_parameters(model)
    assert count.trainable == trainable
    assert round(100 * count.ratio, 2) == percent
    found = count.by_method()
    assert found.keys() == {method}
    # BitFit's closed form leaves out the embeddings' LayerNorm and the pooler; the others leave out nothing
    assert found[method].difference == (2 * (count.width or 0) if method == "BitFit" else 0)


def test_a_layer_and_the_whole_model() -> None:
    for config, method, closed_form in (
        (TopLayersConfig(k=2), "top layers", transformer_parameters(2, 32)),
        (FullConfig(), "full", transformer_parameters(2, 32)),
        (HeadConfig(), "head", None),
    ):
        model = small()
        peftk.inject(model, config)
        count = peftk.count_parameters(model)
        found = count.by_method()[method]
        assert (found.parameters, found.closed_form) == (count.trainable, closed_form)
        assert count.base_parameters == count.total
    assert found.parameters == 32 * 2 + 2


def test_several_methods_at_once() -> None:
    model = small()
    configs = [
        LoraConfig(r=4, target_modules=["query"]),
        LoraConfig(r=4, target_modules=["value"], lora_bias=True),
        SeriesAdapterConfig(bottleneck=8),
        ParallelAdapterConfig(bottleneck=8, where=["key"]),
        LlamaAdapterConfig(adapter_len=5),
        BitFitConfig(biases=["query", "key"]),
    ]
    for config in configs:
        peftk.inject(model, config)
    counts = peftk.count_parameters(model)
    found = counts.by_method()
    assert {name: (method.modules, method.parameters, method.difference) for name, method in found.items()} == {
        "LoRA": (4, 2 * (4 * 64 + 4 * 64 + 32), 0),
        "series adapter": (4, 4 * (2 * 32 * 8 + 8 + 32), 0),
        "parallel adapter": (2, 2 * (8 * 64 + 8 + 32), 0),
        "LLaMA-Adapter": (2, 2 * (5 * 32 + 2), 0),
        "BitFit of query, key": (4, 4 * 32, None),
    }
    assert found["LoRA"].formula == "r·(K + N) + r·(K + N) + N"
    assert sum(method.parameters for method in found.values()) == counts.trainable


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's call
def test_a_peft_model_is_counted_too() -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(small(), config)
    count = peftk.count_parameters(model)
    assert count == model.get_nb_trainable_parameters()
    assert count.by_method()["LoRA of HF PEFT"].parameters == 4 * 4 * 64
    assert count.by_method()["other"].parameters == 32 * 2 + 2  # the classifier, a copy of which it trains


@pytest.mark.full
def test_encoder_and_decoder_count_together() -> None:
    """mt0-large in HF PEFT's earlier README: 2,359,296 of 1,231,940,608, with a separate output embedding, which
    transformers 5 ties."""
    model = mt0_large()
    peftk.inject(model, LoraConfig(r=8, target_modules=["q", "v"]))
    count = peftk.count_parameters(model)
    assert count == (2_359_296, 1_231_940_608 - 250_112 * 1024)
    assert len(count.by_layer()) == 48


def test_a_packed_projection_counts_as_one_linear() -> None:
    """GPT-2's c_attn is one linear d → 3·d, whose LoRA has one A for q, k and v: r·(d + 3·d), which by chance is what
    Wq and Wv take apart: 4·d·r. So GPT-2 medium at r = 4 has 0.39 M; Hu et al. 2021 say 0.35 M in table 3 (and 0.77 M
    for GPT-2 large, which 36·4·1280·4 = 0.74 M isn't), so that table isn't the closed form."""
    config = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    model = on_meta(transformers.GPT2LMHeadModel, config)
    peftk.inject(model, LoraConfig(r=4, target_modules=["c_attn"]))
    count = peftk.count_parameters(model)
    assert count.trainable == 24 * lora_parameters(1024, 3 * 1024, 4) == 393_216
    assert count.total - count.trainable == 354_823_168  # GPT-2 medium: 355 M
    assert count.by_layer() == {f"transformer.h.{i}": 4 * 4096 for i in range(24)}


def test_closed_forms() -> None:
    assert lora_parameters(768, 768, 8) == 2 * 768 * 8
    assert bottleneck_parameters(768, 64) == 2 * 768 * 64 + 64 + 768
    assert parallel_parameters(768, 768, 64) == bottleneck_parameters(768, 64)
    # LLaMA-Adapter, Zhang et al. 2023: 1.2 M for LLaMA-7B (prompts of 10 in the topmost 30 layers)
    assert f"{30 * prompt_parameters(10, 4096, gates=32) / 1e6:.1f} M" == "1.2 M"
    # Ben Zaken et al. 2021, table 1: BitFit trains 0.09 % of BERT-base and 0.08 % of BERT-large
    for d, n, published in ((768, 12, 0.09), (1024, 24, 0.08)):
        assert round(100 * bitfit_parameters(n, d) / peftk.count_parameters(bert(d, n)).total, 2) == published


@pytest.mark.parametrize(
    ("build", "share"), [(bert, 0.2), (roberta_large, 0.15), (opt_6_7b, 0.04), pytest.param(gpt3, 0.004, marks=FULL)]
)
def test_a_transformer_is_twelve_n_d_squared(build: Callable[[], nn.Module], share: float) -> None:
    """The share that 12·n·d² leaves out (mainly embeddings) falls with the model's size."""
    count = peftk.count_parameters(build())
    assert count.closed_form == transformer_parameters(count.n_layers or 0, count.width or 0)
    assert 0 < count.base_parameters - count.closed_form < 1.3 * share * count.base_parameters


def small() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return transformers.BertForSequenceClassification(config)


def test_methods_layers_and_modules_each_parameter_once() -> None:
    model = small()
    base = sum(p.numel() for p in model.parameters())
    peftk.inject(model, LoraConfig(r=4, target_modules=["query", "output.dense"], rank_pattern={"query": 2}))
    peftk.inject(model, LoraConfig(r=3, target_modules=["key"], bias="lora_only", modules_to_save=["classifier"]))
    # a layer with a second name counts once
    model.alias = model.bert.encoder.layer[0].attention.self.query
    count = peftk.count_parameters(model)
    query, attention, mlp, key = 2 * 64, 4 * 64, 4 * 96, 3 * 64
    in_place = 2 * 32 + (32 * 2 + 2)
    assert count.base_parameters == base
    assert count == (2 * (query + attention + mlp + key) + in_place, base + 2 * (query + attention + mlp + key))
    methods = count.by_method()
    assert {name: m.parameters for name, m in methods.items()} == {
        "LoRA": 2 * (query + attention + mlp + key),
        "LoRA, in place": in_place,
    }
    assert (methods["LoRA"].modules, methods["LoRA"].difference) == (8, 0)
    assert methods["LoRA, in place"].closed_form is None
    a_layer = query + attention + mlp + key + 32
    assert count.by_layer() == {"bert.encoder.layer.0": a_layer, "bert.encoder.layer.1": a_layer, "": 66}
    assert count.by_module()["bert.encoder.layer.1.attention.self.key"] == key + 32
    assert sum(count.by_module().values()) == sum(count.by_layer().values()) == count.trainable


def test_a_layer_is_the_outermost_that_has_a_number() -> None:
    def layer(module: str) -> str:
        return Part("LoRA", module, 1, 4, True).layer

    assert layer("decoder.block.11.layer.0.SelfAttention.q") == "decoder.block.11"
    assert (layer("h.3"), layer("0.linear")) == ("h.3", "0")
    assert (layer("classifier"), layer("layer3.conv2d"), layer("")) == ("", "", "")


def test_parameters_that_no_config_trains_are_counted_as_other() -> None:
    model = small()
    everything = peftk.count_parameters(model)
    assert everything.trainable == everything.total == everything.by_method()["other"].parameters
    peftk.inject(model, LoraConfig(r=4))
    model.classifier.bias.requires_grad_(True)
    for layer in model.bert.encoder.layer[0].modules():
        layer.requires_grad_(False)
    count = peftk.count_parameters(model)
    assert count.by_method()["other"].parameters == 2
    assert not any(part.module.startswith("bert.encoder.layer.0") for part in count.parts)
    assert count.total == everything.total + sum(
        p.numel() for name, p in model.named_parameters() if "lora_" in name
    )  # frozen adapters are a part of |Θ|


MAKE = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZER_TENSORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_what_torchs_optimizer_holds(optimizer: str, dtype: torch.dtype) -> None:
    def measured_bytes(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
        made = MAKE[optimizer](parameters)
        for p in parameters:
            p.grad = torch.ones_like(p)
        made.step()
        state = [value for kept in made.state.values() for value in kept.values() if torch.is_tensor(value)]
        gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        return gradients, sum(value.nbytes for value in state if value.dim() > 0)  # without the step counts

    full = measured_bytes(list(small().to(dtype).parameters()))
    model = small().to(dtype)
    peftk.inject(model, LoraConfig(r=4, modules_to_save=["classifier"]))  # A and B fp32, the head in the model's dtype
    needed = measured_bytes([p for p in model.parameters() if p.requires_grad])
    count = peftk.count_parameters(model)
    assert (count.gradients(), count.optimizer_state(optimizer)) == ((needed[0], full[0]), (needed[1], full[1]))
    assert count.optimizer_state(optimizer).saved == full[1] - needed[1]


def test_table_and_dict() -> None:
    model = small()
    peftk.inject(model, LoraConfig(r=4, target_modules=["query", "value"]))
    count = peftk.count_parameters(model)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(count.table("adamw"))
    lines = console.export_text().splitlines()
    assert lines[0].startswith(str(count))
    row = next(line for line in lines if "LoRA" in line).split()
    assert row == ["LoRA", "4", "1,024", "r·(K", "+", "N)", "1,024", "0"]
    base = next(line for line in lines if "base model" in line).split()
    assert base[-2:] == [f"{12 * 2 * 32 * 32:,}", f"{count.base_parameters - 12 * 2 * 32 * 32:+,}"]
    assert any("adamw" in line and "8.19 kB" in line for line in lines)
    said = json.loads(json.dumps(count.as_dict("sgd")))
    assert said["methods"]["LoRA"]["difference"] == 0
    assert said["optimizer_bytes"] == {"needed": 0, "full": 0, "saved": 0}
    assert said["gradient_bytes"]["needed"] == 4096
    with pytest.raises(ValueError, match=r"^optimizer: expected one of adam, .*, got 'lion'"):
        count.optimizer_state("lion")


def test_an_empty_model() -> None:
    count = peftk.count_parameters(nn.Identity())
    assert (count, count.ratio, count.parts, count.closed_form) == ((0, 0), 0.0, (), None)
