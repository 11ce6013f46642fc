"""Tests of checkpoints in both directions with HF PEFT, on small BERT, GPT-2 (Conv1D) and T5 models."""

from __future__ import annotations

import copy
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftk
from peftk.checkpoints import peft as peft_checkpoint
from peftk.checkpoints.files import CheckpointError
from peftk.methods.plan import injections

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIGS: dict[str, dict[str, Any]] = {
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
    "layers": {
        "r": 3,
        "lora_alpha": 9,
        "target_modules": ["query", "dense"],
        "layers_to_transform": [1],
        "exclude_modules": ["query"],
    },
    "lora_bias": {"r": 3, "lora_alpha": 6, "target_modules": ["key", "dense"], "lora_bias": True},
    "lora_only": {"r": 3, "target_modules": ["query", "value"], "bias": "lora_only", "lora_bias": True},
    "all biases": {"r": 3, "target_modules": ["query", "dense"], "bias": "all"},
    "saved": {"r": 3, "target_modules": ["query"], "modules_to_save": ["pooler"]},
    "everything": {
        "r": 3,
        "target_modules": ["query", "dense"],
        "use_rslora": True,
        "lora_bias": True,
        "bias": "all",
        "modules_to_save": ["pooler", "LayerNorm"],
        "alpha_pattern": {"0.attention.self.query": 12},
    },
}
# checkpoints that a batch can mix by token
SERVED = ("few", "patterns", "all", "layers", "lora_bias", "lora_only")


def bert() -> nn.Module:
    return copy.deepcopy(_bert())


@functools.cache
def _bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    return _randomised(transformers.BertModel(config))


def gpt2() -> nn.Module:
    return copy.deepcopy(_gpt2())


@functools.cache
def _gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=100, bos_token_id=0, eos_token_id=0
    )
    return _randomised(transformers.GPT2Model(config))


def t5() -> nn.Module:
    return copy.deepcopy(_t5())


@functools.cache
def _t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=100, decoder_start_token_id=0
    )
    return _randomised(transformers.T5ForConditionalGeneration(config))


# by name: the model, PEFT's config, and the batch
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    **{name: (bert, config) for name, config in CONFIGS.items()},
    "gpt2": (gpt2, {"r": 4, "lora_alpha": 7, "target_modules": ["c_attn", "c_proj"], "rank_pattern": {"c_attn": 2}}),
    "gpt2 biases": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_fc"], "bias": "all", "fan_in_fan_out": True}),
    "t5": (t5, {"r": 4, "lora_alpha": 7, "target_modules": ["q", "v", "wi", "wo"], "use_rslora": True}),
}


def sampled(*names: str) -> list[Any]:
    """These cases by default, and all others in the exhaustive run."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.full) for name in CASES]


def _randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():  # biases and LayerNorms of a new model are 0 and 1
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def hidden(model: nn.Module, rows: slice = slice(None)) -> torch.Tensor:
    torch.manual_seed(1)
    batch = {"input_ids": torch.randint(0, 100, (7, 6)), "attention_mask": torch.ones(7, 6, dtype=torch.int64)}
    batch["attention_mask"][1, 4:] = 0
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    with torch.inference_mode():
        return model(**{name: value[rows] for name, value in batch.items()})[0]


def trained_by_peft(name: str) -> nn.Module:
    """The model of a case, with random values in everything that PEFT trains."""
    make, config = CASES[name]
    model = peft.get_peft_model(make(), peft.LoraConfig(**config)).eval()
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def tensors_of(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter_model.safetensors")
    # with bias="all" PEFT writes biases of modules_to_save a second time, under names inside its wrapper
    return {k: v for k, v in found.items() if ".original_module." not in k and ".modules_to_save." not in k}


@pytest.mark.parametrize("name", sampled("patterns", "layers", "lora_only", "everything", "gpt2", "gpt2 biases", "t5"))
def test_from_peft_to_peftk_to_peft(tmp_path: pathlib.Path, name: str) -> None:
    theirs = trained_by_peft(name)
    theirs.save_pretrained(tmp_path / "theirs")
    make, _ = CASES[name]
    ours = make()
    unchanged = hidden(ours)
    peftk.load_adapter(ours, tmp_path / "theirs")
    assert not torch.allclose(hidden(ours), unchanged, atol=1e-3)
    torch.testing.assert_close(hidden(ours), hidden(theirs), atol=1e-5, rtol=1e-5)
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert peftk.count_parameters(ours).trainable == sum(theirs.get_parameter(n).numel() for n in trained)

    peftk.save_adapter(ours, tmp_path / "ours", format="peft")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert torch.equal(hidden(again), hidden(theirs))


@pytest.mark.parametrize("name", sampled("patterns", "layers", "everything", "gpt2 biases", "t5"))
def test_from_peftk_to_peft_and_back(tmp_path: pathlib.Path, name: str) -> None:
    make, config = CASES[name]
    ours = make()
    peftk.inject(ours, peftk.LoraConfig(**config))
    torch.manual_seed(3)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    peftk.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(hidden(theirs), hidden(ours), atol=1e-5, rtol=1e-5)
    injected, plain = make(), make()
    peftk.inject(injected, peftk.LoraConfig(**config))
    for again in (injected, plain):
        peftk.load_adapter(again, tmp_path)
        assert torch.equal(hidden(again), hidden(ours))
        assert peftk.count_parameters(again) == peftk.count_parameters(ours)


def test_multi_adapter_loads_checkpoints_of_peft(tmp_path: pathlib.Path) -> None:
    outputs = {None: hidden(bert())}
    for name in SERVED:
        model = trained_by_peft(name)
        model.save_pretrained(tmp_path / name)
        outputs[name] = hidden(model)
    base = bert()
    server = peftk.MultiAdapter(base, max_adapters=len(SERVED))
    for name in SERVED:
        server.load(name, tmp_path / name)
    route = [*reversed(SERVED), None]
    with server.route(route):
        mixed = hidden(base)
    for row, name in enumerate(route):
        torch.testing.assert_close(mixed[row], outputs[name][row], atol=1e-5, rtol=1e-5)
        assert name is None or not torch.allclose(mixed[row], outputs[None][row], atol=1e-3)
    torch.testing.assert_close(hidden(base), outputs[None], atol=1e-5, rtol=1e-5)


def test_multi_adapter_with_conv1d_and_t5(tmp_path: pathlib.Path) -> None:
    for name in ("gpt2", "t5"):
        model = trained_by_peft(name)
        model.save_pretrained(tmp_path / name)
        base = CASES[name][0]()
        server = peftk.MultiAdapter(base, max_adapters=2)
        server.load(name, tmp_path / name)
        plain = hidden(base)
        with server.route([None, name] * 3 + [None]):
            mixed = hidden(base)
        torch.testing.assert_close(mixed[1::2], hidden(model)[1::2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed[::2], plain[::2], atol=1e-5, rtol=1e-5)


def test_multi_adapter_refuses_what_a_batch_cannot_mix(tmp_path: pathlib.Path) -> None:
    base = bert()
    server = peftk.MultiAdapter(base)
    modules = list(base.modules())
    for name, message in (
        ("saved", r"expected only adapters.*modules_to_save.*pooler.*load_adapter"),
        ("all biases", r"LayerNorm.*expected an nn.Linear or a Conv1D, got LayerNorm"),
    ):
        trained_by_peft(name).save_pretrained(tmp_path / name)
        with pytest.raises(peftk.CheckpointError, match=message):
            server.load(name, tmp_path / name)
        assert server.names == []
        assert list(base.modules()) == modules
    # biases of all linears can be loaded if those of LayerNorms are the base model's
    weights = load_file(tmp_path / "all biases" / "adapter_model.safetensors")
    own = dict(bert().named_parameters())
    for key in weights:
        if "LayerNorm" in key:
            weights[key] = own[key.removeprefix("base_model.model.")].detach()
    save_file(weights, tmp_path / "all biases" / "adapter_model.safetensors")
    server.load("biases", tmp_path / "all biases")
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path / "all biases").eval()
    with server.route(["biases"] * 7):
        torch.testing.assert_close(hidden(base), hidden(theirs), atol=1e-5, rtol=1e-5)


def test_inject_takes_the_linears_that_peft_takes() -> None:
    for make, config in CASES.values():
        ours = peftk.inject(make(), peftk.LoraConfig(**config))
        theirs = peft.get_peft_model(make(), peft.LoraConfig(**config))
        found = [n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
        assert ours == found


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "trains": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "scalings": [m.scaling for m in model.modules() if isinstance(m, peftk.LoRALinear)],
        "injections": injections(model),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    values, others = one.pop("values"), other.pop("values")
    return one == other and values.keys() == others.keys() and all(torch.equal(values[k], others[k]) for k in values)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("everything")
    trained_by_peft("everything").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("at", [0, 13])
def test_a_load_that_fails_half_way_does_not_change_the_model(
    everything: pathlib.Path, monkeypatch: pytest.MonkeyPatch, at: int, injected: bool
) -> None:
    model = bert()
    if injected:
        peftk.inject(model, peftk.LoraConfig(**{**CONFIGS["everything"], "alpha_pattern": {}}))
    before = state(model)
    copy_, calls = torch.Tensor.copy_, []

    def failing(self: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(self)
        if len(calls) == at + 1:
            raise MemoryError
        return copy_(self, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(MemoryError):
        peftk.load_adapter(model, everything)
    monkeypatch.undo()
    assert same(state(model), before)
    peftk.load_adapter(model, everything)
    assert not same(state(model), state(bert()))


def _without(kind: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def change(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        del weights[next(key for key in weights if kind in key)]

    return change


def _other(**fields: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    return lambda weights, config: config.update(fields)


def _put(part: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def change(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        key = next(key for key in weights if part in key)
        weights[key] = value(weights[key]).contiguous()

    return change


def _add(key: str) -> Callable[..., None]:
    return lambda weights, config: weights.update({key: torch.zeros(2, 2)})


SPOILT: dict[str, tuple[Callable[..., None], str]] = {
    "a factor is missing": (_without("lora_B.weight"), "expected .*lora_B.weight"),
    "lora_bias is missing": (_without("lora_B.bias"), "expected .*lora_B.bias"),
    "a bias is missing": (
        _without("intermediate.dense.base_layer.bias"),
        "biases and modules_to_save that its",
    ),
    "a saved weight is missing": (_without("LayerNorm.weight"), "biases and modules_to_save that its"),
    "an unknown tensor": (_add("base_model.model.encoder.layer.0.weight"), "beyond what its config names"),
    "an embedding's adapter": (
        _add("base_model.model.embeddings.word_embeddings.lora_embedding_A"),
        "expected only adapters of linears, got one of an embedding",
    ),
    "a smaller embedding": (
        _add("base_model.model.embeddings.word_embeddings.weight"),
        r"expected the size of the model's embeddings, \[100, 32\], got \[2, 2\]; .*resize_token_embeddings",
    ),
    "no prefix": (_add("pooler.dense.lora_A.weight"), "expected keys like base_model.model"),
    "an odd name": (_add("base_model.model.../../x.lora_A.weight"), "expected dotted names"),
    "a name of no module": (_add("base_model.model.a/b.lora_A.weight"), "a/b.lora_B.weight"),
    "one bias too many": (_add("base_model.model.nowhere.bias"), r"expected a bias of shape \[N\]"),
    "nan": (_put("lora_A", lambda t: t * torch.nan), "expected finite values, got nan"),
    "inf in a bias": (_put("key.bias", lambda t: t + torch.inf), "expected finite values, got inf"),
    "integers": (_put("lora_A", lambda t: t.long()), "expected fp32, bf16, fp16 or fp64, got torch.int64"),
    "another shape of a factor": (_put("query.lora_A", lambda t: t[:, 1:]), r"expected lora_A \[R, 32\] and lora_B"),
    "another shape of a bias": (_put("key.bias", lambda t: t[1:]), r"expected torch.float32 \[32\], got .* \[31\]"),
    "another rank": (_other(r=4), "expected rank 4"),
    "no rank": (_other(r=None), "expected r to be"),
    "nan for alpha": (_other(lora_alpha=float("nan")), "expected lora_alpha to be"),
    "an infinite scaling": (_other(lora_alpha=1e300), "expected a scaling that fp32 can hold"),
    "another method": (_other(peft_type="IA3"), "expected peft_type 'LORA'"),
    "no method": (_other(peft_type=None), "expected peft_type 'LORA'"),
    "dora": (_other(use_dora=True), "got use_dora=True"),
    "alora": (_other(alora_invocation_tokens=[1]), "got alora_invocation_tokens"),
    "pissa": (_other(init_lora_weights="pissa"), "got init_lora_weights='pissa'"),
    "olora": (_other(init_lora_weights="olora"), "got init_lora_weights='olora'"),
    "replicated layers": (_other(layer_replication=[[0, 1]]), "got layer_replication"),
    "tokens": (_other(trainable_token_indices=[1]), "got trainable_token_indices"),
    "parameters": (_other(target_parameters=["x"]), "got target_parameters"),
    "a field of tomorrow": (_other(use_something=True), "got use_something=True"),
    "another bias": (_other(bias="some"), "got bias='some'"),
    "biases that are not said": (_other(bias="none"), "does not account for"),
    "modules that are not said": (
        _other(modules_to_save=None),
        "that its config names; missing: pooler.dense",
    ),
    "modules of another kind": (_other(modules_to_save="pooler"), "expected modules_to_save"),
    "targets of another kind": (_other(target_modules=5), "target_modules"),
    "no targets": (_other(target_modules=["nowhere"]), "fits the model"),
    "a bad pattern": (_other(rank_pattern={"(": 3}), "expected rank_pattern"),
    "patterns of another kind": (_other(alpha_pattern=[1]), "expected alpha_pattern"),
    "a dropout of 2": (_other(lora_dropout=2), "lora_dropout"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: pathlib.Path, everything: pathlib.Path, how: str) -> None:
    weights = load_file(everything / "adapter_model.safetensors")
    config = json.loads((everything / "adapter_config.json").read_text())
    spoil, message = SPOILT[how]
    spoil(weights, config)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = bert()
    before = state(model)
    with pytest.raises(peftk.CheckpointError, match=message):
        peftk.load_adapter(model, tmp_path)
    assert same(state(model), before)


def truncated(files: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Truncations of every kind: at each byte of the config and the start of the header, and at samples of the rest."""
    for name, data in files.items():
        header = 8 + int.from_bytes(data[:8], "little") if name.endswith("safetensors") else len(data)
        lengths = {*range(12), *range(12, header, 97), header - 1, header, header + 1, *range(header, len(data), 4999)}
        for length in sorted(lengths | {len(data) - 1}):
            if length < len(data):
                yield name, data[:length]
        yield name, data + b"x"
        for at in (*range(0, min(len(data), 64), 3), *range(64, header, 211)):  # a flipped bit
            yield name, data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :]


def test_every_truncation_is_refused(tmp_path: pathlib.Path, everything: pathlib.Path) -> None:
    files = {file.name: file.read_bytes() for file in everything.iterdir() if file.name.startswith("adapter_")}
    count = 0
    for name, data in truncated(files):
        for file, whole in files.items():
            (tmp_path / file).write_bytes(data if file == name else whole)
        with pytest.raises(peftk.CheckpointError):
            peft_checkpoint.load(tmp_path)
        count += 1
    assert count > 150


def test_pickled_weights_are_not_read(tmp_path: pathlib.Path) -> None:
    trained_by_peft("few").save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(peftk.CheckpointError, match=r"got adapter_model.bin there .pickled files are not read"):
        peftk.load_adapter(bert(), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(peftk.CheckpointError, match=r"expected adapter_model.safetensors, got none there"):
        peftk.load_adapter(bert(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"model": 1}')
    with pytest.raises(peftk.CheckpointError, match=r"expected a config of HF PEFT .*got the fields model"):
        peftk.load_adapter(bert(), tmp_path)


def test_a_saved_embedding_that_is_the_head_too_is_refused(tmp_path: pathlib.Path) -> None:
    about = gpt2().config

    def gpt() -> nn.Module:
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(about)

    model = peft.get_peft_model(gpt(), peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"]))
    model.save_pretrained(tmp_path)  # PEFT trains a copy, which the head does not use
    with pytest.raises(peftk.CheckpointError, match=r"share no weight with others.*lm_head"):
        peftk.load_adapter(gpt(), tmp_path)


def test_a_head_that_only_other_models_have_is_ignored(tmp_path: pathlib.Path) -> None:
    about = bert().config

    def headed() -> nn.Module:
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(about).eval()

    # for SEQ_CLS, PEFT's config names both "classifier" and "score"; a model has one of them
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(headed(), config).eval()
    torch.manual_seed(2)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    theirs.save_pretrained(tmp_path)
    assert "score" in json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    ours = headed()
    peftk.load_adapter(ours, tmp_path)
    torch.testing.assert_close(hidden(ours), hidden(theirs), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.classifier.weight, theirs.base_model.model.classifier.modules_to_save.default.weight)


def distilbert() -> nn.Module:
    torch.manual_seed(0)
    about = transformers.DistilBertConfig(
        vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32, num_labels=3
    )
    return transformers.DistilBertForSequenceClassification(about).eval()


def roberta() -> nn.Module:
    """Its classifier is a module of several linears."""
    torch.manual_seed(0)
    about = transformers.RobertaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return transformers.RobertaForSequenceClassification(about).eval()


def moved(model: nn.Module) -> nn.Module:
    """Sets everything that trains to new values."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    return model


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize(
    ("make", "saved", "head"),
    [
        (roberta, None, ["classifier.dense", "classifier.out_proj"]),
        (distilbert, ["classifier"], ["classifier", "pre_classifier"]),
        (distilbert, None, ["classifier", "pre_classifier"]),  # PEFT adds "classifier" and "score" for SEQ_CLS
        (distilbert, ["1.output_layer_norm", "r_norm"], ["classifier", "pre_classifier"]),
        (bert, ["ooler"], ["pooler.dense"]),
        (bert, ["ate.dense", "pooler"], ["intermediate.dense", "pooler.dense"]),
    ],
)
def test_names_that_match_any_ending_train_in_full_as_in_peft(
    tmp_path: pathlib.Path, make: Callable[[], nn.Module], saved: list[str] | None, head: list[str], bias: str
) -> None:
    fields: dict[str, Any] = {"r": 2, "target_modules": ["q_lin", "query"], "modules_to_save": saved, "bias": bias}
    task = None if make is bert else "SEQ_CLS"
    theirs = moved(peft.get_peft_model(make(), peft.LoraConfig(**copy.deepcopy(fields), task_type=task))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make()
    peftk.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(hidden(ours), hidden(theirs), atol=1e-5, rtol=1e-5)
    # what inject trains
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    fields["modules_to_save"] = [name for name in config["modules_to_save"] if name != "score"]
    injected = make()
    peftk.inject(injected, peftk.LoraConfig(**fields))
    trains = {name for name, parameter in injected.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert all(any(f"{module}.weight" in name for name in trains) for module in head)
    assert sum(p.numel() for p in injected.parameters() if p.requires_grad) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )
    # and what PEFT loads
    peftk.save_adapter(moved(injected), tmp_path / "ours", format="peft")
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(hidden(back), hidden(injected), atol=1e-5, rtol=1e-5)


def with_lora() -> nn.Module:
    return peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))


OF_PEFT: dict[str, Callable[[], nn.Module]] = {
    "PeftModel": with_lora,
    "the model within it": lambda: with_lora().base_model.model,
    "accelerated": lambda: peftk.accelerate(with_lora()),
    "another method": lambda: (
        peft.get_peft_model(bert(), peft.IA3Config(target_modules=["query"], feedforward_modules=[])).base_model.model
    ),
    "a prompt": lambda: peft.get_peft_model(
        bert(), peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
    ),
    "a module that trains in full": lambda: nn.Sequential(
        nn.Linear(4, 4), peft.utils.other.ModulesToSaveWrapper(nn.Linear(4, 4), "default")
    ),
}
METHODS = [
    peftk.LoraConfig(r=2),
    peftk.LoraConfig(r=2, target_modules=["value", "0"]),
    peftk.SeriesAdapterConfig(2, where=["dense", "0"]),
    peftk.ParallelAdapterConfig(2, where=["dense", "0"]),
    peftk.BitFitConfig(),
    peftk.HeadConfig(["pooler", "0"]),
    peftk.FullConfig(),
]


@pytest.mark.parametrize("made", OF_PEFT)
def test_a_model_with_adapters_of_peft_is_refused(made: str, everything: pathlib.Path) -> None:
    model = OF_PEFT[made]()
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    told = r"model: expected one without HF PEFT's adapters, got one with a \w+; .*merge_and_unload.*peftk.accelerate"
    for config in METHODS:
        with pytest.raises(ValueError, match=f"^{told}"):
            peftk.inject(model, config)
    for act in (peftk.MultiAdapter, lambda model: peftk.load_adapter(model, everything)):
        with pytest.raises(ValueError, match=f"^{told}"):
            act(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    assert [type(module) for module in model.modules()] == classes


def test_a_model_without_pefts_adapters_any_more_is_accepted() -> None:
    assert peftk.inject(with_lora().merge_and_unload(), peftk.LoraConfig(r=2, target_modules=["query"]))


def test_a_config_of_peft_is_refused_but_its_fields_are_accepted() -> None:
    theirs = peft.LoraConfig(target_modules=["query", "value"], exclude_modules=["0.attention.self.query"])
    for wrong in (theirs, [theirs]):
        with pytest.raises(TypeError, match=r"config: .*got HF PEFT's LoraConfig; peftk.LoraConfig has its fields"):
            peftk.inject(bert(), wrong)
    fields = (
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
    )
    ours = peftk.LoraConfig(**{name: getattr(theirs, name) for name in fields})
    assert len(peftk.inject(bert(), ours)) == 3
    with pytest.raises(TypeError, match="'use_dora'"):
        peftk.LoraConfig(use_dora=True)  # type: ignore[call-arg]


def test_the_largest_scaling_that_fp32_holds(tmp_path: pathlib.Path) -> None:
    largest = torch.finfo(torch.float32).max
    factors = {"linear": (torch.ones(1, 4), torch.ones(4, 1))}
    config = {"r": 1, "target_modules": ["linear"]}
    peft_checkpoint.save(tmp_path, {**config, "lora_alpha": largest}, factors)
    assert peft_checkpoint.load(tmp_path).adapters["linear"].scaling == largest
    peft_checkpoint.save(tmp_path, {**config, "lora_alpha": 2 * largest}, factors)
    with pytest.raises(CheckpointError, match="scaling"):
        peft_checkpoint.load(tmp_path)
