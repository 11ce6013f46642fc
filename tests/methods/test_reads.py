"""Tests how linears whose weight a model reads itself are found: by a run on fake tensors, or in the real forward.

What is true is found by brute force: ΔW = BA in the weight, and beside the linear; where outputs differ, W is read.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pathlib
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

import peftk
from peftk import LoraConfig
from peftk.checkpoints.files import CheckpointError
from peftk.methods import trial
from peftk.methods.inject import lora_layers
from peftk.methods.sample_inputs import sample_inputs
from peftk.nn import watched
from peftk.nn.llama_adapter import Projections
from peftk.nn.replace import fan_in_fan_out, is_linear
from tests.support.tiers import FULL

# ---------------------------------------------------------------- architectures

_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "vocab_size": 100, "max_position_embeddings": 64},
    **{"image_size": 32, "patch_size": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    **{"conv_dim": (16, 16), "conv_stride": (8, 8), "conv_kernel": (10, 8), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "max_source_positions": 32},
    **{"num_mel_bins": 16, "state_size": 8, "time_step_rank": 4, "projection_dim": 16, "max_length": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
_OWN: dict[str, dict[str, Any]] = {
    "longformer": {"attention_window": [4, 4]},
    "led": {"attention_window": [4, 4]},
    "xlnet": {"d_head": 8},
    "rwkv": {"attention_hidden_size": 32},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "wavlm": {"num_hidden_layers": 1},
    "mobilebert": {"num_hidden_layers": 1},
}
DEFAULT = ["wavlm", "mamba", "mobilebert masked", "siglip_vision_model"]
OTHERS = [
    *("longformer", "qwen2_moe", "bert", "gpt2", "t5", "bart", "whisper", "clip", "vit", "falcon", "bloom", "opt"),
    *("mpt", "phi3", "gemma2", "qwen3", "mamba2", "falcon_mamba", "wav2vec2", "hubert", "unispeech", "sew"),
    *("data2vec-audio", "wav2vec2-conformer", "wav2vec2-bert", "speech_to_text", "audio-spectrogram-transformer"),
    *("videomae", "dinov2", "beit", "vit_mae", "xlnet", "led", "big_bird", "deberta", "deberta-v2", "mobilebert"),
    *("mixtral", "granitemoe", "nllb-moe", "longt5", "switch_transformers", "rwkv", "patchtst", "flava", "blip"),
    *("gpt_bigcode", "bert masked", "m2m_100"),
]
STOPS = {"switch_transformers"}  # its run stops where it routes by values
# the linears that these architectures read and do not call, by the ends of their names
READ = {
    "wavlm": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "mamba": {"dt_proj"},
    "falcon_mamba": {"dt_proj"},
    "mobilebert masked": {"decoder"},
    "siglip_vision_model": {"out_proj"},
}


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    for name in (*vars(config), *_SMALL):
        value = getattr(config, name, None)
        if isinstance(value, PretrainedConfig):
            shrunk(value)
        elif name in _SMALL and hasattr(config, name):
            with contextlib.suppress(
                StrictDataclassFieldValidationError, AttributeError, NotImplementedError
            ):  # else there
                setattr(config, name, _SMALL[name])
    return config


def built(spec: str) -> PreTrainedModel:
    name, _, masked = spec.partition(" ")
    config = shrunk(transformers.CONFIG_MAPPING[name]())
    for field, value in _OWN.get(name, {}).items():
        setattr(config, field, value)
    kind = (MODEL_FOR_MASKED_LM_MAPPING_NAMES if masked else MODEL_MAPPING_NAMES)[name]
    torch.manual_seed(0)
    return getattr(transformers, kind if isinstance(kind, str) else kind[0])(config).float().eval()


def flat(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.double().flatten()
    elif isinstance(output, (tuple, list, dict)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from flat(part)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)
    np.random.seed(1)
    with torch.no_grad():
        return torch.cat(list(flat(model(**inputs))))


def with_numbers(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {
        n: torch.randn(t.shape) if t.is_floating_point() else torch.randint(3, 20, t.shape) for n, t in inputs.items()
    }


def truth(model: PreTrainedModel) -> tuple[set[str], set[str]]:
    """Names of the linears that are called, and of those where adding ΔW to W changes more than an adapter would."""
    for inputs in map(with_numbers, sample_inputs(model)):
        try:
            outputs(model, inputs)
        except Exception:  # these inputs are for a different kind of model
            continue
        break
    called, read = set(), set()
    for name, linear in model.named_modules():
        if not is_linear(linear):
            continue
        tied, delta = linear.weight, torch.randn(linear.weight.shape) * linear.weight.std().clamp(min=0.02) / 2
        linear.weight = nn.Parameter(tied.detach().clone())
        before = outputs(model, inputs)
        calls = []

        def beside(module: nn.Module, args: Any, y: Tensor, delta: Tensor = delta, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return y + F.linear(args[0], delta.t() if fan_in_fan_out(module) else delta)

        handle = linear.register_forward_hook(beside)
        with_adapter = outputs(model, inputs)
        handle.remove()
        linear.weight.data += delta
        merged = outputs(model, inputs)
        linear.weight = tied
        if calls:
            called.add(name)
        changes = float((merged - before).abs().max())
        if float((merged - with_adapter).abs().max()) > 1e-3 * changes + 1e-6 * float(before.abs().max()):
            read.add(name)
    return called, read


@pytest.mark.parametrize("spec", [*DEFAULT, *(pytest.param(spec, marks=FULL) for spec in OTHERS)])
def test_a_run_on_fake_tensors_finds_the_truth(spec: str, one_thread: None) -> None:
    model = built(spec)
    found = trial.run(model)
    called, read = truth(model)
    assert found.called == called or (spec in STOPS and found.called < called)
    assert found.read.keys() == read
    assert {name.rpartition(".")[2] for name in read - called} == READ.get(spec, set())


def wavlm() -> PreTrainedModel:
    return built("wavlm")


def audio() -> Tensor:
    return torch.randn(1, 2000, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- what depends on it


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"]),
        LoraConfig(r=2, target_modules=r".*\.out_proj"),
        peftk.ParallelAdapterConfig(bottleneck=2, where=["v_proj"]),
        peftk.SeriesAdapterConfig(bottleneck=2, where=["k_proj"]),
        peftk.LlamaAdapterConfig(
            2,
            attention=["attention"],
            projections=Projections("q_proj", "k_proj", "v_proj", "out_proj"),
            num_heads=4,
        ),
        [peftk.SeriesAdapterConfig(bottleneck=2, where=["feed_forward"]), LoraConfig(r=2, target_modules=["k_proj"])],
    ],
    ids=lambda config: type(config).__name__,
)
def test_an_adapter_that_would_do_nothing_is_refused(config: Any) -> None:
    model = wavlm()
    before, trained = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"got encoder\.layers\.0\.attention\.\w+, whose weight WavLMAttention reads"):
        peftk.inject(model, config)
    assert dict(model.named_modules()) == before
    assert [p.requires_grad for p in model.parameters()] == trained
    assert trial._KEY not in model.__dict__


def test_all_linear_leaves_them_out_and_checkpoints_round_trip(tmp_path: pathlib.Path) -> None:
    model = wavlm()
    names = peftk.inject(model, LoraConfig(r=2))
    assert names
    assert not any(name.endswith(("q_proj", "k_proj", "v_proj", "out_proj")) for name in names)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    plain = model(audio())[0]
    peftk.merge_adapter(model)
    torch.testing.assert_close(model(audio())[0], plain, atol=1e-4, rtol=1e-4)
    peftk.save_adapter(model, tmp_path)
    peftk.switch_adapter(model, tmp_path)
    other = wavlm()
    peftk.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(audio())[0], plain)
    served = wavlm()
    server = peftk.MultiAdapter(served)
    server.load("one", tmp_path)
    server.load("two", tmp_path)
    with server.route(["two"]):
        torch.testing.assert_close(served(audio())[0], plain)


def test_biases_that_a_model_reads_train() -> None:
    model = wavlm()
    peftk.inject(model, peftk.BitFitConfig(["q_proj", "out_proj"]))
    model(audio())[0].sum().backward()
    biases = [p for n, p in model.named_parameters() if n.endswith(("q_proj.bias", "out_proj.bias"))]
    assert all(p.grad is not None and bool(p.grad.any()) for p in biases)


def test_a_checkpoint_for_them_is_refused(tmp_path: pathlib.Path) -> None:
    peft.get_peft_model(wavlm(), peft.LoraConfig(r=2, target_modules=["q_proj", "output_dense"])).save_pretrained(
        tmp_path
    )
    model = wavlm()
    server = peftk.MultiAdapter(model)
    for load in (lambda: peftk.load_adapter(model, tmp_path), lambda: server.load("one", tmp_path)):
        with pytest.raises(CheckpointError, match="q_proj, whose weight WavLMAttention reads itself"):
            load()
        assert trial._KEY not in model.__dict__


def test_an_accelerated_peft_model_warns_too() -> None:
    model = peft.get_peft_model(wavlm(), peft.LoraConfig(r=2, target_modules=["q_proj", "output_dense"]))
    with pytest.warns(UserWarning, match=r"WavLMAttention computes with the weight of .*layers\.0\.attention\.q_proj"):
        peftk.accelerate(model)
    explained = peftk.explain(model)
    assert [len(names) for why, names in explained.peft.items() if "WavLMAttention computes with" in why] == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftk.accelerate(model)
    peftk.decelerate(model)
    assert not any(key.startswith("_peftk") for module in model.modules() for key in module.__dict__)


# ---------------------------------------------------------------- user-defined models


class Fused(nn.Module):
    """`lin` is called; the weight of the other linear is passed to `use`."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.lin, self.odd = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("table", torch.zeros(16, 8))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + self.use(self, x)


def fused_in_place(module: Any, x: Tensor) -> Tensor:
    packed = torch.empty(16, 8)
    packed[:8] = module.odd.weight
    packed[8:] = 0
    return F.linear(x, packed)[..., :8]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy, None


READERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: F.linear(x, m.odd.weight, m.odd.bias),
    "transposed": lambda m, x: x @ m.odd.weight.t(),
    "T": lambda m, x: x @ m.odd.weight.T,
    "data": lambda m, x: torch.matmul(x, m.odd.weight.data),
    "detached": lambda m, x: torch.matmul(x, m.odd.weight.detach()),
    "cast": lambda m, x: F.linear(x.double(), m.odd.weight.double()).float(),
    "packed": lambda m, x: F.linear(x, torch.cat([m.odd.weight, m.odd.weight]))[..., :8],
    "in place": fused_in_place,
    "scaled": lambda m, x: F.linear(x, m.odd.weight * 0.5),
    "scaled by a tensor": lambda m, x: F.linear(x, m.odd.weight * torch.tensor(0.5)),
    "heads": lambda m, x: torch.einsum("bk,hdk->bhd", x, m.odd.weight.view(2, 4, 8)).flatten(1),
    "rows": lambda m, x: F.linear(x, m.odd.weight[torch.arange(8)]),
    "embedding": lambda m, x: F.embedding(torch.zeros(len(x), dtype=torch.long), m.odd.weight),
    "convolution": lambda m, x: F.conv1d(x[..., None], m.odd.weight[..., None])[..., 0],
    "addmm": lambda m, x: torch.addmm(input=m.odd.bias, mat1=x, mat2=m.odd.weight),
    "function": lambda m, x: _Scan.apply(x, m.odd.weight),
    "numbers of it": lambda m, x: x * m.odd.weight.sum(0),
    "called, too": lambda m, x: m.odd(x) + x @ m.odd.weight,
}
LOOKERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "called": lambda m, x: m.odd(x),
    "forward": lambda m, x: m.odd.forward(x),
    "not called": lambda m, x: x,
    "bias": lambda m, x: x + m.odd.bias,
    "dtype": lambda m, x: x.to(m.odd.weight.dtype).to(m.odd.weight.device),
    "shape": lambda m, x: x.reshape(-1, m.odd.weight.shape[1]) * (m.odd.weight.dim() == m.odd.weight.ndim),
    "kind": lambda m, x: m.odd(x) if isinstance(m.odd.weight, nn.Parameter) and m.odd.weight.is_floating_point() else x,
    "logged": lambda m, x: m.odd(x) + 0 * len(m.odd.weight.detach().clone().cpu().flatten().abs()),
    "norm": lambda m, x: m.odd(x) + 0 * m.odd.weight.norm(),
    "penalty": lambda m, x: x + 1e-3 * (m.odd.weight.double() ** 2).mean().float(),
}
each_reader = pytest.mark.parametrize("use", READERS.values(), ids=READERS)
each_looker = pytest.mark.parametrize("use", LOOKERS.values(), ids=LOOKERS)
LORA = LoraConfig(r=2, target_modules=["odd"])


def rows() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def without_warnings(run: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run()


@each_reader
def test_readers_are_found_by_a_run_with_example_inputs(use: Callable[[Any, Tensor], Tensor]) -> None:
    model = Fused(use)
    if use is READERS["called, too"]:
        with pytest.warns(UserWarning, match="Fused computes with the weight of odd itself"):
            peftk.inject(model, LORA, example_inputs=rows())
        return
    with pytest.raises(ValueError, match="got odd, whose weight Fused reads itself"):
        peftk.inject(model, LORA, example_inputs=rows())
    assert peftk.inject(model, LoraConfig(r=2), example_inputs=rows()) == ["lin"]


@each_looker
def test_looking_is_not_reading(use: Callable[[Any, Tensor], Tensor]) -> None:
    model = Fused(use)
    assert without_warnings(lambda: peftk.inject(model, LORA, example_inputs=rows())) == ["odd"]
    without_warnings(lambda: model(rows()))


@each_reader
def test_readers_give_a_warning_at_the_first_forward(use: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Fused(use)
    expected = model(rows())
    peftk.inject(model, LoraConfig(r=2))
    with pytest.warns(UserWarning, match="Fused computes with the weight of odd itself") as told:
        found = model(rows())
    assert len(told) == 1
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)
    again = without_warnings(lambda: model(rows()))
    assert type(again) is Tensor
    weight = model.odd.weight.clone()
    for merge in (model.odd.merge, lambda: peftk.merge_adapter(model)):
        with pytest.raises(ValueError, match="that only its layer computes with, got one that Fused reads"):
            merge()
    assert torch.equal(model.odd.weight, weight)
    assert not model.lin.merged


@each_looker
def test_looking_is_not_reading_at_the_first_forward(use: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Fused(use)
    expected = model(rows())
    peftk.inject(model, LoraConfig(r=2))
    for _ in range(2):
        found = without_warnings(lambda: model(rows()))
        assert type(found) is Tensor
        torch.testing.assert_close(found, expected)
    peftk.merge_adapter(model)


def test_a_model_of_a_multi_adapter_warns_too(tmp_path: pathlib.Path) -> None:
    model = Fused(READERS["linear"])
    peftk.inject(model, LORA)
    peftk.save_adapter(model, tmp_path)
    served = Fused(READERS["linear"])
    server = peftk.MultiAdapter(served)
    server.load("one", tmp_path)
    with server.route(["one"] * 3), pytest.warns(UserWarning, match="the weight of odd itself"):
        served(rows())
    server = peftk.MultiAdapter(Fused(READERS["linear"]), example_inputs=[rows()])
    with pytest.raises(CheckpointError, match="odd, whose weight Fused reads itself"):
        server.load("one", tmp_path)


def test_switching_adapters_is_refused_like_a_merge(tmp_path: pathlib.Path) -> None:
    model = Fused(READERS["linear"])
    peftk.inject(model, LORA)
    peftk.save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="odd"):
        model(rows())
    with pytest.raises(ValueError, match="odd: weight: expected one that only its layer computes with"):
        peftk.switch_adapter(model, tmp_path)


def test_gradients_through_a_reader_are_right() -> None:
    torch.manual_seed(0)
    model, x = Fused(READERS["packed"]), rows().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    peftk.inject(model, LoraConfig(r=2))
    with pytest.warns(UserWarning, match="odd"):
        (found,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copied, pickled, saved])
def test_copies_warn_too(how: Callable[[nn.Module], nn.Module]) -> None:
    model = Fused(fused_in_place)
    peftk.inject(model, LoraConfig(r=2))
    for _ in range(2):
        with pytest.warns(UserWarning, match="the weight of odd itself"):
            how(model)(rows())
    with pytest.warns(UserWarning, match="the weight of odd itself"):
        model(rows())
    without_warnings(lambda: how(model)(rows()))
    with pytest.raises(ValueError, match="Fused reads too"):
        how(model).odd.merge()


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Fused(READERS["linear"]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


def test_a_part_that_is_called_alone_and_one_that_is_not_called() -> None:
    model = Outer()
    peftk.inject(model, LoraConfig(r=2))
    with pytest.warns(UserWarning, match=r"weight of experts\.0\.odd itself") as told:
        model(rows())
    assert len(told) == 1
    with pytest.warns(UserWarning, match=r"weight of experts\.1\.odd itself"):
        model.experts[1](rows())


def test_an_expert_that_is_not_called_gets_its_adapter() -> None:
    names = peftk.inject(Outer(), LoraConfig(r=2), example_inputs=(rows(),))
    assert names == ["experts.0.lin", "experts.1.lin", "experts.1.odd"]


def test_outside_of_a_forward_the_weight_is_no_alias() -> None:
    model = Fused(LOOKERS["dtype"])
    weight = model.odd.weight
    peftk.inject(model, LORA)
    assert model.odd.weight is weight
    without_warnings(lambda: rows() @ model.odd.weight)


def test_watching_ends_after_some_reads() -> None:
    given = []
    model = Fused(lambda m, x: (given.append(m.odd.weight), x)[1])
    weight = model.odd.weight
    peftk.inject(model, LORA)
    for _ in range(watched.ALIASES + 1):
        model(rows())
    assert [one is weight for one in given] == [False] * watched.ALIASES + [True]
    assert all(isinstance(one, nn.Parameter) and one.data_ptr() == weight.data_ptr() for one in given)


def test_a_tied_embedding_may_read_the_weight() -> None:
    class Tied(nn.Module):
        def __init__(self, head_is_called: bool) -> None:
            super().__init__()
            self.embedding, self.head, self.head_is_called = nn.Embedding(10, 8), nn.Linear(8, 10), head_is_called
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            h = self.embedding(ids)
            return self.head(h) if self.head_is_called else F.linear(h, self.embedding.weight)

    ids = torch.arange(5)
    config = LoraConfig(r=2, target_modules=["head"])
    assert without_warnings(lambda: peftk.inject(Tied(True), config, example_inputs=ids)) == ["head"]
    with pytest.raises(ValueError, match="got head, whose weight Tied reads itself"):
        peftk.inject(Tied(False), config, example_inputs=ids)


def test_views_of_one_weight_are_distinguished() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            packed = torch.randn(16, 8)
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
            self.q.weight, self.k.weight = nn.Parameter(packed[:8]), nn.Parameter(packed[8:])

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + x @ self.k.weight

    found = trial.run(Packed(), rows())
    assert (found.called, found.read) == ({"q"}, {"k": "Packed"})


@pytest.mark.parametrize("given", [{"y": rows()}, (rows(), rows()), {}, []], ids=["named", "two", "no names", "none"])
def test_example_inputs_that_do_not_fit_are_an_error(given: Any) -> None:
    model = Fused(LOOKERS["called"])
    for run in (
        lambda: peftk.inject(model, LORA, example_inputs=given),
        lambda: peftk.MultiAdapter(model, example_inputs=given),
    ):
        with pytest.raises(TypeError, match=r"example_inputs: expected what Fused\.forward takes, got something else"):
            run()
    assert type(model.odd) is nn.Linear


@pytest.mark.parametrize(
    "given", [rows(), (rows(),), [rows()], {"x": rows()}, rows().double()], ids=lambda v: type(v).__name__
)
def test_forms_of_example_inputs(given: Any) -> None:
    assert trial.run(Fused(READERS["linear"]), given).read == {"odd": "Fused"}


# ---------------------------------------------------------------- a run has no side effects


def test_models_that_branch_by_values_run_too() -> None:
    def branches(m: Any, x: Tensor) -> Tensor:
        if (x > 0).all():
            return x
        length = int(x.argmax())
        chosen = x[x.sum(-1) > 0]
        hit = (x > 0).nonzero()
        for row in hit[:2]:
            x = x + row.sum().item()
        return F.linear(x, m.odd.weight) + chosen.sum() + length

    found = trial.run(Fused(branches), rows())
    assert (found.called, found.read) == ({"lin"}, {"odd": "Fused"})


def test_a_model_that_cannot_run_on_fake_tensors_is_no_error() -> None:
    def stops(m: Any, x: Tensor) -> Tensor:
        y = F.linear(x, m.odd.weight)
        return y + float(np.asarray(x.tolist()).sum()) if x.data_ptr() else y

    model = Fused(stops)
    found = trial.run(model, rows())
    assert found.read == {"odd": "Fused"}  # what was seen until then
    assert peftk.inject(Fused(lambda m, x: x + x.numpy().sum()), LORA, example_inputs=rows()) == ["odd"]


def test_a_run_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 0.0)
    assert peftk.inject(wavlm(), LoraConfig(r=2, target_modules=["q_proj"]))


_cache: dict[int, Tensor] = {}


@functools.lru_cache
def _positions(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32)


class Careless(nn.Module):
    """A model that keeps state wherever that is possible."""

    shared: ClassVar[dict[int, Tensor]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.plain, self.kept, self.calls, self.own = torch.zeros(1), [], 0, {}
        self.scaled = functools.lru_cache(self._scaled)

    def _scaled(self, factor: int) -> Tensor:
        return self.lin.bias * factor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.plain += 1
        self.kept.append(x)
        self.last = x
        positions = [_cache, self.shared, self.own]
        for cache in positions:
            cache.setdefault(len(x), torch.arange(len(x)))
        noise = torch.rand(8) + random.random() + np.random.rand()
        scale = _positions(8) + self.scaled(2)
        return self.dropout(self.norm(self.lin(x + noise))) * scale + sum(c[len(x)].sum() for c in positions)


@pytest.mark.parametrize("training", [False, True])
def test_a_run_has_no_side_effects(training: bool) -> None:
    model = Careless().train(training)
    called: list[Any] = []
    model.register_forward_hook(lambda *args: called.append(args))
    model.lin.register_forward_pre_hook(lambda *args: called.append(args))
    model.scaled(1)
    _positions(3)
    before, tensors = copy.deepcopy(model.__dict__), {n: t.clone() for n, t in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = trial.run(model, torch.randn(5, 8, generator=torch.Generator()))
    assert found.called == {"lin"}
    assert not told
    assert not called
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert (model.calls, model.kept, model.own, float(model.plain)) == (0, [], {}, 0.0)
    assert model.__dict__.keys() == before.keys()
    assert model.training is training
    assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())
    assert 5 not in _cache
    assert 5 not in Careless.shared
    assert type(_positions(8)) is Tensor
    assert type(model.scaled(2)) is Tensor
    assert torch.backends.mha.get_fastpath_enabled()
    model(rows().repeat(2, 1))


def test_compiled_modules_and_replaced_forwards_run_as_plain_modules() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = Outer()
    model.experts[0].compile(backend=backend)
    model.forward = torch.compile(model.forward, backend=backend)
    found = trial.run(model, rows())
    assert (found.called, found.read) == ({"experts.0.lin"}, {"experts.0.odd": "Fused"})
    assert not compiled
    assert type(model(rows())) is Tensor
    assert compiled  # the module is still compiled


def test_a_function_with_a_module_in_its_closure_prevents_the_run() -> None:
    model = Fused(READERS["linear"])
    inner = model.lin
    model.helper = lambda x: inner(x)
    assert trial.run(model, rows()) == (frozenset(), {})


def test_compiled_models_read_without_aliases() -> None:
    torch.manual_seed(0)
    model = Fused(READERS["transposed"])
    expected = model(rows())
    peftk.inject(model, LoraConfig(r=2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(without_warnings(lambda: compiled(rows())), expected)
    with pytest.warns(UserWarning, match="odd"):
        model(rows())


def test_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = transformers.WavLMModel(shrunk(transformers.WavLMConfig()))
    with pytest.raises(ValueError, match="whose weight WavLMAttention reads itself"):
        peftk.inject(model, LoraConfig(target_modules=["v_proj"]))
    assert peftk.inject(model, LoraConfig())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    found = trial.run(wavlm().to(dtype))
    assert len(found.read) == 4
    assert len(found.called) == 4


def test_models_of_transformers_within_another_model() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = wavlm(), nn.Linear(32, 3)

        def forward(self, pieces: list[Any]) -> Tensor:
            return self.head(self.encoder(pieces[0])[0])

    names = peftk.inject(Classifier(), LoraConfig(r=2))
    assert "head" in names
    assert not any("q_proj" in name for name in names)


def test_a_second_injection_uses_the_first_ones_run() -> None:
    model = wavlm()
    peftk.inject(model, LoraConfig(r=2, target_modules=["intermediate_dense"]))
    with pytest.raises(ValueError, match="whose weight WavLMAttention reads itself"):
        peftk.inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    del model.__dict__["_peftk_look"]
    assert trial.run(model).called.isdisjoint({"encoder.layers.0.attention.q_proj"})  # with a layer of ours in it
    assert len(trial.run(model).read) == 4
    copied = copy.deepcopy(model)
    assert not any("q_proj" in name for name in peftk.inject(copied, LoraConfig(r=2)))
