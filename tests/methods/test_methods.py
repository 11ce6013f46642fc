"""Tests every method, by its config, on every family of models: identity, what trains, gradients, copies, errors."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftk
from peftk.checkpoints.native import fields_of
from peftk.methods import architectures
from peftk.methods.plan import injections
from peftk.nn import Attached, BitFitLinear, LlamaAdapter, LoRALinear, ParallelAdapterLinear, Projections
from tests.support.small_models import HEADS, LAYERS, MODELS, WIDTH, randomised, run
from tests.support.tiers import spread

pytestmark = pytest.mark.usefixtures("one_thread")
D, R, L = WIDTH, 4, 3
METHODS: dict[str, Any] = {
    "lora": peftk.LoraConfig(r=2),
    "series": peftk.SeriesAdapterConfig(bottleneck=R, activation="gelu"),
    "parallel": peftk.ParallelAdapterConfig(reduction_factor=8, where=["mlp", "attention"], activation="silu"),
    "parallel linear": peftk.ParallelAdapterConfig(bottleneck=R, where=r".*(linear1|query|q_proj|c_fc|Attention\.q)"),
    "bitfit": peftk.BitFitConfig(),
    "llama": peftk.LlamaAdapterConfig(adapter_len=L),
    "head": peftk.HeadConfig(modules=["classifier", "lm_head"]),
    "top": peftk.TopLayersConfig(1, head=False),
    "full": peftk.FullConfig(),
}
# no biases; a head tied to the embedding; attention that calls none of its parts
NOT_FOR = {
    *itertools.product(["llama", "qwen3", "t5"], ["bitfit"]),
    *itertools.product(["gpt2", "t5"], ["head"]),
    ("torch_encoder", "llama"),
}
# Qwen 3 differs from Llama in what its attention does to queries and keys
CASES = [
    pytest.param(*case, marks=[pytest.mark.full] if case[0] == "qwen3" and case[1] != "llama" else [])
    for case in itertools.product(MODELS, METHODS)
    if case not in NOT_FOR
]
REPLACING = ("lora", "parallel linear", "bitfit")


@pytest.mark.parametrize(("family", "method"), CASES)
def test_identity_at_initialisation_and_what_trains(family: str, method: str) -> None:
    model = MODELS[family]()
    with torch.no_grad():
        before = run(model)
    original = {name: p.clone() for name, p in model.named_parameters()}
    names = peftk.inject(model, METHODS[method])
    with torch.no_grad():
        after = run(model)
    if method in REPLACING or family == "torch_encoder":
        # one rounding per layer may differ: that of the fused base layer, or of torch's inference path
        torch.testing.assert_close(after, before)
    else:
        assert torch.equal(after, before)
    [record] = injections(model)
    assert names == [*record.layers, *record.attached]

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    added = {name for name, _ in model.named_parameters() if name not in original}
    assert trained == added | set(record.trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    start = {name: p.clone() for name, p in model.named_parameters()}
    pulled = set()
    for _ in range(3):
        # a factor whose partner is zero has a gradient only from the second step on
        optimizer.zero_grad()
        (run(model) * torch.linspace(-1, 1, after.numel()).view_as(after)).sum().backward()
        pulled |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved <= trained
    assert pulled <= trained
    assert not {name for name in trained - pulled if not _may_rest(name)}


def _may_rest(name: str) -> bool:
    """Parameters without a gradient in these models: keys' biases shift all scores equally; the pooler is not used."""
    return name.endswith(("key.bias", "k_proj.bias")) or "token_type" in name


@pytest.mark.parametrize("family", MODELS)
def test_counts(family: str) -> None:
    stacks = 2 if family == "t5" else 1
    layers = stacks * LAYERS
    for config, count in [
        (METHODS["series"], layers * 2 * (2 * D * R + R + D)),
        (METHODS["parallel"], layers * 2 * (2 * D * R + R + D)),
        (peftk.SeriesAdapterConfig(reduction_factor=16, where="mlp"), layers * (2 * D * 2 + 2 + D)),
        (peftk.SeriesAdapterConfig(bottleneck=R, leave_out=[0]), (layers - 1) * 2 * (2 * D * R + R + D)),
        (METHODS["llama"], layers * (L * D + HEADS)),
        (peftk.LlamaAdapterConfig(adapter_len=5, adapter_layers=1), stacks * (5 * D + HEADS)),
    ]:
        if (family, "llama") in NOT_FOR and isinstance(config, peftk.LlamaAdapterConfig):
            continue
        model = MODELS[family]()
        base = peftk.count_parameters(model).total
        peftk.inject(model, config)
        assert peftk.count_parameters(model) == (count, base + count), config


def test_where_bert_gets_its_adapters() -> None:
    """After dropout, before the skip is added, as in the paper; here written out."""
    from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput

    model = MODELS["bert"]().double()
    plain = copy.deepcopy(model)
    names = peftk.inject(model, peftk.SeriesAdapterConfig(bottleneck=R))
    assert names == [f"bert.encoder.layer.{i}.{b}.dropout" for b in ("attention.output", "output") for i in (0, 1)]
    randomised(model)
    adapters = {name: model.get_submodule(name).series_adapter for name in names}

    def adapted(module: Any, adapter: Any) -> Any:
        def forward(hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            h = module.dropout(module.dense(hidden_states))
            h = h + adapter.scaling * (torch.relu(h @ adapter.lora_A.T + adapter.bias_A) @ adapter.lora_B.T)
            return module.LayerNorm(h + adapter.bias_B + input_tensor)

        return forward

    for name, module in plain.named_modules():
        if isinstance(module, (BertOutput, BertSelfOutput)):
            module.forward = adapted(module, adapters[f"{name}.dropout"])
    agree(model, plain, [p for adapter in adapters.values() for p in adapter.parameters()])


def test_where_bert_gets_parallel_adapters() -> None:
    """Input: x of the feed-forward block. Added to: its result, before the skip is added."""
    from transformers.models.bert.modeling_bert import BertLayer

    model = MODELS["bert"]().double()
    plain = copy.deepcopy(model)
    names = peftk.inject(model, peftk.ParallelAdapterConfig(bottleneck=R, activation="gelu"))
    assert names == [f"bert.encoder.layer.{i}" for i in (0, 1)]
    randomised(model)

    def adapted(layer: Any, adapter: Any) -> Any:
        def chunk(x: Tensor) -> Tensor:
            y = layer.output.dropout(layer.output.dense(layer.intermediate(x)))
            y = y + 4.0 * (F.gelu(x @ adapter.lora_A.T + adapter.bias_A) @ adapter.lora_B.T) + adapter.bias_B
            return layer.output.LayerNorm(y + x)

        return chunk

    adapters = {name: model.get_submodule(name).parallel_adapter for name in names}
    for name, module in plain.named_modules():
        if isinstance(module, BertLayer):
            module.feed_forward_chunk = adapted(module, adapters[name])
    agree(model, plain, [p for adapter in adapters.values() for p in adapter.parameters()])


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_where_decoders_get_their_adapters(family: str) -> None:
    """After and beside the feed-forward blocks; their classes are patched to compute the same."""
    block = {"gpt2": "GPT2MLP", "llama": "LlamaMLP", "t5": "T5DenseActDense"}[family]
    model = MODELS[family]().double()
    plain = copy.deepcopy(model)
    series = peftk.SeriesAdapterConfig(bottleneck=R, where="mlp")
    peftk.inject(model, [peftk.ParallelAdapterConfig(bottleneck=R), series])
    randomised(model)
    adapters = [module for module in model.modules() if isinstance(module, Attached)]
    # by layer: the parallel adapter, and the series adapter after it
    pairs = [
        [next(m for m in model.get_submodule(layer.name).modules() if isinstance(m, Attached) and m.name == name)
         for name in ("parallel_adapter", "series_adapter")]
        for layer in architectures.layers(model)
    ]  # fmt: skip
    assert {id(a) for a in adapters} == {id(a) for pair in pairs for a in pair}

    def bottleneck(adapter: Any, x: Tensor) -> Tensor:
        return adapter.scaling * (torch.relu(x @ adapter.lora_A.T + adapter.bias_A) @ adapter.lora_B.T) + adapter.bias_B

    def adapted(inner: Any, parallel: Any, behind: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            h = inner(x) + bottleneck(parallel, x)
            return h + bottleneck(behind, h)

        return forward

    blocks = [module for module in plain.modules() if type(module).__name__ == block]
    for module, pair in zip(blocks, pairs, strict=True):
        module.forward = adapted(module.forward, *pair)
    agree(model, plain, [p for adapter in adapters for p in adapter.parameters()])


def agree(model: nn.Module, plain: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Compares outputs and the parameters' gradients, in fp64."""
    results = [run(model), run(plain)]
    torch.testing.assert_close(*results)
    direction = torch.linspace(-1, 1, results[0].numel(), dtype=torch.float64).view_as(results[0])
    grads = [torch.autograd.grad((y * direction).sum(), parameters) for y in results]
    torch.testing.assert_close(*grads)
    assert all(grad.abs().max() > 0 for grad in grads[0])


# LLaMA-Adapter compared with HF PEFT's


@pytest.mark.parametrize("layers", [1, 2])
def test_llama_adapter_computes_what_pefts_adaption_prompt_does(layers: int) -> None:
    peft = pytest.importorskip("peft")
    model = MODELS["llama"]()
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.AdaptionPromptConfig(adapter_len=L, adapter_layers=layers, task_type="CAUSAL_LM")
    )
    names = peftk.inject(model, peftk.LlamaAdapterConfig(adapter_len=L, adapter_layers=layers))
    assert names == [f"model.layers.{i}.self_attn" for i in range(LAYERS - layers, LAYERS)]
    before = run(model)
    with torch.no_grad():
        for name in names:
            ours, other = model.get_submodule(name).llama_adapter, theirs.base_model.model.get_submodule(name)
            other.adaption_gate.fill_(0.7)
            ours.prompt.copy_(other.adaption_prompt[0])
            ours.gate.copy_(torch.atanh(other.adaption_gate).expand(HEADS))
    assert not torch.allclose(run(model), before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(run(model), run(theirs))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen3", "t5"])
def test_llama_adapter_asks_with_the_layers_own_queries(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries are those that the model's attention function gets: rotated, normalised, scaled."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = MODELS[family]().double()
    plain = copy.deepcopy(model)
    names = peftk.inject(model, peftk.LlamaAdapterConfig(adapter_len=L))
    randomised(model)
    adapters = [model.get_submodule(name).llama_adapter for name in names]
    below = {"bert": "self"}.get(family, "")
    asked = {id(plain.get_submodule(f"{n}.{below}".rstrip("."))): a for n, a in zip(names, adapters, strict=True)}

    def projected(module: Any, P: Tensor, head: int) -> list[Tensor]:
        if family == "gpt2":
            made = module.c_attn(P)[:, D:].chunk(2, dim=-1)
        elif family == "t5":
            made = module.k(P), module.v(P)
        elif family == "bert":
            made = module.key(P), module.value(P)
        else:
            made = module.k_proj(P), module.v_proj(P)
        k, v = (t.view(L, -1, head).transpose(0, 1) for t in made)
        k = module.k_norm(k) if family == "qwen3" else k
        return [t.repeat_interleave(HEADS // t.shape[0], dim=0) for t in (k, v)]

    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: Any, query: Tensor, *args: Any, scaling: float, **kwargs: Any) -> tuple[Tensor, None]:
        heads = own(module, query, *args, scaling=scaling, **kwargs)[0]
        adapter = asked.get(id(module))
        if adapter is None:
            return heads, None
        k, v = projected(module, adapter.prompt, query.shape[-1])
        found = torch.softmax(scaling * query @ k.mT, dim=-1) @ v
        return heads + (torch.tanh(adapter.gate)[:, None, None] * found).transpose(1, 2), None

    found = run(model)
    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)
        wanted = run(plain)
    torch.testing.assert_close(found, wanted)
    parameters = [p for adapter in adapters for p in adapter.parameters()]
    grads = [torch.autograd.grad(y.square().sum(), parameters) for y in (found, wanted)]
    torch.testing.assert_close(*grads)
    assert all(grad.abs().max() > 0 for grad in grads[0])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "t5"])
def test_generate_with_a_cache(family: str) -> None:
    model = MODELS[family]()
    peftk.inject(model, [METHODS["llama"], METHODS["parallel"], METHODS["series"]])
    randomised(model)
    ids = torch.randint(1, 60, (2, 6), generator=torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    cached, anew = (model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(anew.scores), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_gradient_checkpointing(family: str) -> None:
    model = MODELS[family]().double()
    peftk.inject(model, [METHODS["llama"], METHODS["parallel"], METHODS["series"]])
    randomised(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = model.config.attention_dropout = 0.0
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    grads = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        grads.append(torch.autograd.grad(run(model).square().sum(), parameters))
    torch.testing.assert_close(*grads)
    assert all(grad.abs().max() > 0 for grad in grads[0])


# Several at once, copies


EVERY = ["series", "lora", "bitfit", "parallel", "llama"]


@pytest.mark.parametrize("order", [EVERY, EVERY[::-1], ["bitfit", "parallel linear", "series"]])
def test_several_methods_at_once(order: list[str]) -> None:
    model = MODELS["bert"]()
    with torch.no_grad():
        before = run(model)
    configs = [METHODS[name] if name != "lora" else peftk.LoraConfig(r=2, target_modules=["query"]) for name in order]
    peftk.inject(model, configs)
    with torch.no_grad():
        torch.testing.assert_close(run(model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    added = {name for name, m in model.named_modules() for _ in getattr(m, "adapter_parameters", ())}
    assert {name.rpartition(".")[0] for name in trained if "adapter" in name or "lora_" in name} == added
    assert {name for name in trained if name.endswith(".bias")} == {
        name for name, _ in model.named_parameters() if name.endswith(".bias")
    }
    assert not any(name.endswith("weight") for name in trained)
    kinds = {type(module) for module in model.modules()}
    assert BitFitLinear in kinds
    assert (LoRALinear in kinds) == ("lora" in order)
    assert (ParallelAdapterLinear in kinds) == ("parallel linear" in order)
    randomised(model)
    loss = run(model).square().sum()
    grads = dict(zip(trained, torch.autograd.grad(loss, [model.get_parameter(n) for n in trained]), strict=True))
    # a key's bias adds the same to all scores, so softmax cancels it; the prompt has a softmax of its own
    assert all(g.abs().max() > 0 for n, g in grads.items() if not n.endswith("key.bias"))


@pytest.mark.parametrize("order", [1, -1])
def test_a_head_trains_in_full_beside_bitfit(order: int) -> None:
    model = MODELS["bert"]()
    before = run(model)
    peftk.inject(model, [peftk.BitFitConfig(), peftk.HeadConfig()][::order])
    torch.testing.assert_close(run(model), before)
    run(model).square().sum().backward()
    assert model.classifier.weight.grad.abs().max() > 0
    assert {n for n, p in model.named_parameters() if p.requires_grad and not n.endswith("bias")} == {
        "classifier.weight"
    }


@pytest.mark.parametrize("family", [family for family in MODELS if family != "qwen3"])
def test_copies(family: str) -> None:
    methods = [m for m in ("series", "lora", "parallel", "llama", "bitfit") if (family, m) not in NOT_FOR]
    model = MODELS[family]()
    peftk.inject(model, [METHODS[m] for m in methods])
    randomised(model)
    with torch.no_grad():
        y = run(model)
        fresh = MODELS[family]()
        peftk.inject(fresh, [METHODS[m] for m in methods])
        assert not torch.allclose(run(fresh), y, rtol=1e-2)
        fresh.load_state_dict(model.state_dict())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
            assert torch.equal(run(other), y)
            assert [record.config for record in injections(other)] == [METHODS[m] for m in methods]
            own = {id(module) for module in other.modules()}
            hooks = [h for m in other.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
            ours = [h.__self__ for h in hooks if isinstance(getattr(h, "__self__", None), Attached)]
            assert ours
            assert all(id(adapter) in own for adapter in ours)


def test_adapters_of_a_16_bit_model_train_in_fp32() -> None:
    model = MODELS["bert"]().bfloat16()
    with torch.no_grad():
        before = run(model)
        peftk.inject(model, [METHODS["series"], METHODS["parallel"], METHODS["llama"]])
        after = run(model)
    assert torch.equal(before, after)
    assert after.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    run(model).float().square().sum().backward()
    model = MODELS["bert"]().bfloat16()
    peftk.inject(model, peftk.SeriesAdapterConfig(bottleneck=R, adapter_dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_padded_batches_through_torchs_encoder() -> None:
    """In inference, torch's encoder would skip hooks, and modules that replace its linears."""
    model = MODELS["torch_encoder"]()
    peftk.inject(model, [METHODS["series"], METHODS["parallel"]])
    randomised(model)
    ids = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    wanted = model(ids, padding)  # parameters require gradients
    with torch.no_grad():
        found = model(ids, padding)
    torch.testing.assert_close(found[~padding], wanted[~padding])


# Places and names


def test_modules_by_name_and_layers_left_out() -> None:
    model = MODELS["bert"]()
    names = peftk.inject(model, peftk.SeriesAdapterConfig(bottleneck=R, where=["intermediate.dense"], leave_out=[1]))
    assert names == ["bert.encoder.layer.0.intermediate.dense"]
    adapter = model.get_submodule(names[0]).series_adapter
    assert adapter.lora_A.shape == (R, 48)
    assert peftk.inject(model, peftk.SeriesAdapterConfig(bottleneck=R, where=r".*pooler|.*LayerNorm")) == [
        "bert.embeddings.LayerNorm",
        *(f"bert.encoder.layer.{i}.{n}LayerNorm" for i in (0, 1) for n in ("attention.output.", "output.")),
        "bert.pooler",
    ]
    # the encoder's layers count before the decoder's
    model = MODELS["t5"]()
    names = peftk.inject(model, peftk.SeriesAdapterConfig(bottleneck=R, where="mlp", leave_out=[0, 1, 2]))
    assert names == ["decoder.block.1.layer.2.dropout"]


def test_a_model_of_no_known_family() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qs, self.ks, self.vs, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.qs, self.ks, self.vs))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(Attention(), nn.Linear(8, 8)) for _ in range(2)), nn.Linear(8, 3))
    x = torch.randn(2, 5, 8)
    before = model(x)
    projections = Projections("qs", "ks", "vs", "out")
    assert peftk.inject(
        model,
        [
            peftk.LlamaAdapterConfig(attention=["0.0", "1.0"], projections=projections, num_heads=2),
            peftk.SeriesAdapterConfig(bottleneck=2, where=r"\d\.0"),
            peftk.ParallelAdapterConfig(bottleneck=2, where=r"\d\.1"),
            peftk.HeadConfig(modules=["2"]),
        ],
    ) == ["0.0", "1.0", "0.0", "1.0", "0.1", "1.1"]
    torch.testing.assert_close(model(x), before)
    other = nn.ModuleDict({"stack": nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])})
    peftk.inject(other, peftk.TopLayersConfig(2, layers="stack"))
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        f"stack.{i}.{n}" for i in (1, 2) for n in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    ("family", "biases", "names"),
    [
        ("bert", ["query", "key", "value"], [f"attention.self.{n}" for n in ("query", "key", "value")]),
        ("bert", ["query", "intermediate.dense"], ["attention.self.query", "intermediate.dense"]),
        ("bert", r".*layer\.\d\.output\.\w+", ["output.dense", "output.LayerNorm"]),
        ("gpt2", ["query", "key", "value"], ["attn.c_attn"]),
        ("torch_encoder", ["self_attn"], ["self_attn.in_proj"]),
    ],
)
def test_which_biases_train(family: str, biases: Any, names: list[str]) -> None:
    model = MODELS[family]()
    peftk.inject(model, peftk.BitFitConfig(biases=biases))
    joined = {"torch_encoder": "_"}.get(family, ".")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"{layer.name}.{name}{joined}bias" for layer in architectures.layers(model) for name in names
    ]


def test_heads_and_top_layers() -> None:
    def trained(family: str, config: Any) -> set[str]:
        model = MODELS[family]()
        peftk.inject(model, config)
        return {n for n, p in model.named_parameters() if p.requires_grad}

    assert trained("bert", peftk.HeadConfig()) == {"classifier.weight", "classifier.bias"}
    assert trained("llama", peftk.HeadConfig()) == {"lm_head.weight"}
    assert trained("torch_encoder", peftk.HeadConfig()) == {"classifier.weight", "classifier.bias"}
    top = trained("bert", peftk.TopLayersConfig(1))
    assert {n.rpartition(".layer.1.")[0] for n in top} == {"bert.encoder", ""}
    assert {n for n in top if "layer" not in n} == {"classifier.weight", "classifier.bias"}
    stacks = {n.split(".layer.")[0] for n in trained("t5", peftk.TopLayersConfig(1, head=False))}
    assert stacks == {"encoder.block.1", "decoder.block.1"}
    assert trained("gpt2", peftk.FullConfig()) == {n for n, _ in MODELS["gpt2"]().named_parameters()}


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: peftk.SeriesAdapterConfig(), "bottleneck: expected exactly one of bottleneck and reduction_factor"),
        (lambda: peftk.SeriesAdapterConfig(4, 16), "bottleneck: expected exactly one .* got 4 and 16"),
        (lambda: peftk.SeriesAdapterConfig(bottleneck=0), "bottleneck: expected an integer of 1 or more, got 0"),
        (lambda: peftk.SeriesAdapterConfig(reduction_factor=0), "reduction_factor: expected a number above 0, got 0"),
        (lambda: peftk.SeriesAdapterConfig(4, where=[]), r"where: expected names, a regular expression, got \[\]"),
        (lambda: peftk.SeriesAdapterConfig(4, where="("), "where: expected a regular expression"),
        (lambda: peftk.SeriesAdapterConfig(4, activation="tanh"), "activation: expected one of identity"),
        (lambda: peftk.ParallelAdapterConfig(4, scaling=float("nan")), "scaling: expected a finite number"),
        (lambda: peftk.ParallelAdapterConfig(4, leave_out=[-1]), r"leave_out: expected layer numbers of 0 or more"),
        (lambda: peftk.BitFitConfig(biases=[]), "biases: expected names, a regular expression or 'all'"),
        (lambda: peftk.LlamaAdapterConfig(adapter_len=0), "adapter_len: expected an integer of 1 or more, got 0"),
        (lambda: peftk.LlamaAdapterConfig(adapter_layers=0), "adapter_layers: expected an integer of 1 or more"),
        (lambda: peftk.LlamaAdapterConfig(attention=["a"]), "expected attention and projections together"),
        (lambda: peftk.HeadConfig(modules=[]), "modules: expected names"),
        (lambda: peftk.TopLayersConfig(0), "k: expected an integer of 1 or more"),
    ],
)
def test_bad_fields(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


FORMS = [tuple, set, frozenset, lambda some: dict.fromkeys(some).keys(), np.array]
WITH_LISTS = [
    (
        "bert",
        lambda form: peftk.LoraConfig(
            r=2,
            target_modules=form(["key", "query"]),
            exclude_modules=form(["0.attention.self.key", "1.attention.self.query"]),
            modules_to_save=form(["classifier", "pooler"]),
            layers_to_transform=form([0, 1]),
            layers_pattern=form(["h", "layer"]),
        ),
    ),
    ("gpt2", lambda form: peftk.SeriesAdapterConfig(4, where=form(["ln_2", "mlp"]), leave_out=form([1]))),
    ("t5", lambda form: peftk.ParallelAdapterConfig(4, where=form(["attention", "wi"]), leave_out=form([0, 3]))),
    ("bert", lambda form: peftk.BitFitConfig(form(["query", "value"]))),
    ("bert", lambda form: peftk.HeadConfig(form(["classifier", "pooler"]))),
    ("bert", lambda form: peftk.AdapterHubConfig(leave_out=form([0]))),
    (
        "bert",
        lambda form: peftk.LlamaAdapterConfig(
            attention=form(["0.attention.self", "1.attention.self"]),
            projections=Projections("query", "key", "value", "query"),
        ),
    ),
]


@pytest.mark.parametrize(
    ("form", "family", "make"),
    spread([(form, *rest) for form, rest in itertools.product(FORMS, WITH_LISTS)], default=14),
)
def test_lists_of_any_form_are_equivalent(family: str, make: Any, form: Any) -> None:
    configs = [make(list), make(form)]
    assert configs[0] == configs[1]
    assert json.loads(json.dumps(fields_of(configs[1]))) == fields_of(configs[0])
    models = [MODELS[family]() for _ in configs]
    names = [peftk.inject(model, config) for model, config in zip(models, configs, strict=True)]
    assert names[0] == names[1]
    trained = [[n for n, p in model.named_parameters() if p.requires_grad] for model in models]
    assert trained[0] == trained[1] != []


@pytest.mark.parametrize(
    ("numpys", "pythons"),
    [
        (
            peftk.LoraConfig(
                r=np.int64(3), lora_alpha=np.float32(4), lora_dropout=np.float64(0.5), use_rslora=np.True_,
                rank_pattern={"q": np.int32(2)}, alpha_pattern={"q": np.float16(2)}, layers_to_transform=np.int64(1),
            ),
            peftk.LoraConfig(
                r=3, lora_alpha=4.0, lora_dropout=0.5, use_rslora=True,
                rank_pattern={"q": 2}, alpha_pattern={"q": 2.0}, layers_to_transform=[1],
            ),
        ),
        (peftk.SeriesAdapterConfig(np.int8(4), scaling=np.float32(2)), peftk.SeriesAdapterConfig(4, scaling=2.0)),
        (peftk.ParallelAdapterConfig(reduction_factor=np.int64(4)), peftk.ParallelAdapterConfig(reduction_factor=4)),
        (peftk.LlamaAdapterConfig(np.int64(4), np.int64(1)), peftk.LlamaAdapterConfig(4, 1)),
        (
            peftk.AdapterHubConfig(reduction_factor={"0": np.float32(2)}),
            peftk.AdapterHubConfig(reduction_factor={"0": 2}),
        ),
        (peftk.TopLayersConfig(np.int64(1)), peftk.TopLayersConfig(1)),
        (peftk.SeriesAdapterConfig(4, leave_out=1), peftk.SeriesAdapterConfig(4, leave_out=range(1, 2))),
    ],
)  # fmt: skip
def test_numbers_of_numpy_and_python_are_equivalent(numpys: Any, pythons: Any) -> None:
    assert numpys == pythons
    assert json.loads(json.dumps(fields_of(numpys))) == fields_of(pythons)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("bert", peftk.SeriesAdapterConfig(4, where=["pooler", "mpl"]), "where: 'mpl' matches no module of the model"),
        ("bert", peftk.HeadConfig(["classifier", "lm_head"]), "modules: 'lm_head' matches no module of the model"),
        ("bert", peftk.AdapterHubConfig(leave_out=[0, 5]), "leave_out: the model has no layer 5"),
    ],
)
def test_names_and_numbers_that_match_nothing_give_a_warning(family: str, config: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        peftk.inject(MODELS[family](), config)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("bert", peftk.SeriesAdapterConfig(4, where=["nonesuch"]), "where: expected to match some module of the model"),
        ("bert", peftk.SeriesAdapterConfig(4, leave_out=[2]), "leave_out: expected numbers of the model's layers"),
        ("bert", peftk.SeriesAdapterConfig(4, leave_out=[0, 1]), "leave_out: expected some layer to remain"),
        ("bert", peftk.SeriesAdapterConfig(4, where=["encoder.layer"]), "module: expected one that isn't a container"),
        ("bert", peftk.SeriesAdapterConfig(4, where=["word_embeddings", "bert"]), "expected a module with linears"),
        ("torch_encoder", peftk.ParallelAdapterConfig(4, where=["out_proj"]), "expected linears that are called"),
        ("llama", peftk.BitFitConfig(), "biases: expected to match some module with a bias, got 'all'"),
        ("llama", peftk.BitFitConfig(["query"]), "biases: expected to match some module with a bias, got 'query'"),
        ("gpt2", peftk.BitFitConfig(["query"]), "biases: expected key, query, value together, as one linear"),
        ("torch_encoder", peftk.LlamaAdapterConfig(), "attention: expected one that calls its projections"),
        ("bert", peftk.LlamaAdapterConfig(adapter_layers=3), "adapter_layers: expected at most the 2 layers of bert"),
        ("llama", peftk.LlamaAdapterConfig(num_heads=5), "to compute the 32 numbers of 5 queries"),
        ("gpt2", peftk.HeadConfig(), "got lm_head.weight, which is also transformer.wte.weight"),
        ("bert", peftk.HeadConfig(modules=["nonesuch"]), "modules: expected to match some module of the model"),
        ("bert", peftk.HeadConfig(modules=["dropout"]), "modules: expected modules that have parameters"),
        ("bert", peftk.TopLayersConfig(3), "k: expected at most the 2 layers of bert.encoder.layer, got 3"),
        ("bert", peftk.TopLayersConfig(1, layers="bert"), "layers: expected the name of an nn.ModuleList, got 'bert'"),
        ("bert", [METHODS["series"], METHODS["series"]], "expected a Dropout without 'series_adapter'"),
        ("bert", [METHODS["lora"], peftk.TopLayersConfig(1)], "to be frozen, as LoRALinear needs it"),
    ],
)  # fmt: skip
def test_an_error_leaves_the_model_as_it_was(family: str, config: Any, message: str) -> None:
    model = MODELS[family]()
    model.requires_grad_(True)
    names = [name for name, _ in model.named_modules()]
    good = peftk.ParallelAdapterConfig(bottleneck=2)
    configs = [good, *config] if isinstance(config, list) else [good, config]
    with pytest.raises((ValueError, TypeError), match=message):
        peftk.inject(model, configs)
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not injections(model)


def test_a_rotary_attention_without_positions_is_an_error() -> None:
    model = MODELS["llama"]()
    peftk.inject(model, METHODS["llama"])
    with pytest.raises(TypeError, match=r"position_embeddings: expected \(cos, sin\) among the attention's arguments"):
        model.model.layers[0].self_attn(torch.randn(1, 2, WIDTH))


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_torch_compile(family: str) -> None:
    model = MODELS[family]()
    peftk.inject(model, [METHODS["llama"], METHODS["parallel"], METHODS["series"]])
    randomised(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = [(run(f), torch.autograd.grad(run(f).square().sum(), parameters)) for f in (model, compiled)]
    torch.testing.assert_close(*results)


def test_the_table_knows_every_attention() -> None:
    for family, made in MODELS.items():
        found = architectures.layers(made())
        assert [layer.number for layer in found] == list(range(LAYERS * (2 if family == "t5" else 1)))
    assert not architectures.layers(nn.Sequential(nn.Linear(2, 2)))
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 8), 1)
    assert not architectures.layers(decoder)
    with pytest.raises(ValueError, match=r"where: expected a model with layers of a known family \(bert, gpt2"):
        peftk.inject(decoder, METHODS["series"])
    assert LlamaAdapter.name == "llama_adapter"
