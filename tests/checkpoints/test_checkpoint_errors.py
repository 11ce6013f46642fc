"""Tests that errors about checkpoints, paths and adapters say what is wrong, and that nothing has changed then."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftk
from peftk.checkpoints import adapterhub as adapterhub_checkpoint
from peftk.methods.plan import injections
from peftk.models.combine import combine
from tests.support.paths import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "adapterhub"
HERE = pathlib.Path(peftk.__file__).parent
# Every `raise` in these files is reached by a case below; in the server, only those about checkpoints.
SWEPT = {
    "checkpoints/adapterhub.py": None,
    "checkpoints/contents.py": None,
    "checkpoints/files.py": None,
    "checkpoints/fitting.py": None,
    "checkpoints/native.py": None,
    "checkpoints/peft.py": None,
    "checkpoints/store.py": None,
    "models/combine.py": None,
    "models/server.py": ("_adapters_of", "_check_linear"),
}


class Model(nn.Module):
    """Numbered layers, embeddings, a head; `tied` has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(6, 6), "value": nn.Linear(6, 5), "norm": nn.LayerNorm(5)})
            for _ in range(2)
        )
        self.embed = nn.Embedding(7, 6)
        self.lm_head = nn.Linear(6, 7, bias=False)
        self.classifier = nn.Linear(5, 3)
        self.tied = nn.Linear(6, 7, bias=False)
        self.tied.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


Tensors, Fields = dict[str, torch.Tensor], dict[str, Any]
QUERY = "base_model.model.layer.0.query"


@pytest.fixture
def good(tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkpoint in HF PEFT's format with biases."""
    model = Model()
    peftk.inject(model, peftk.LoraConfig(r=2, target_modules=["query", "value"], bias="lora_only"))
    peftk.save_adapter(model, tmp_path / "good")
    return tmp_path / "good"


def spoilt(good: pathlib.Path, change: Callable[[Tensors, Fields], None]) -> pathlib.Path:
    weights = load_file(good / "adapter_model.safetensors")
    config = json.loads((good / "adapter_config.json").read_text())
    change(weights, config)
    folder = good.parent / "spoilt"
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def put(key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors, Fields], None]:
    return lambda weights, config: weights.update({key: value(weights[key])})


def add(key: str, *shape: int) -> Callable[[Tensors, Fields], None]:
    return lambda weights, config: weights.update({f"base_model.model.{key}": torch.ones(shape)})


def say(**fields: Any) -> Callable[[Tensors, Fields], None]:
    return lambda weights, config: config.update(fields)


def without(part: str) -> Callable[[Tensors, Fields], None]:
    def change(weights: Tensors, config: Fields) -> None:
        for key in [key for key in weights if part in key]:
            del weights[key]

    return change


def one_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = torch.nan
    return tensor


# By what is wrong: the damage, and the message of both load_adapter and a server.
DAMAGE: dict[str, tuple[Callable[[Tensors, Fields], None], str]] = {
    "one nan": (put(f"{QUERY}.lora_A.weight", one_nan), r"lora_A.weight: expected finite values, got nan \(1 of 12 v"),
    "inf": (put(f"{QUERY}.lora_B.weight", lambda t: t - torch.inf), r"finite values, got -inf \(12 of 12 values"),
    "nan in a bias": (put(f"{QUERY}.base_layer.bias", lambda t: t * torch.nan), "query.bias: expected finite values"),
    "integers": (put(f"{QUERY}.lora_A.weight", lambda t: t.long()), "lora_A.weight: expected fp32, .* got torch.int64"),
    "complex": (put(f"{QUERY}.lora_A.weight", lambda t: t.cfloat()), "expected fp32, .* got torch.complex64"),
    "a layer is lost": (without("layer.1.query.lora"), "for each linear that its config names; missing: layer.1"),
    "a config for half": (say(target_modules=["query"]), "each linear that its config names; unknown: layer.0.va"),
    "a config for other layers": (say(target_modules=["value"]), "missing|unknown: layer.0.query"),
    "a layer that the model lacks": (add("layer.2.query.lora_A.weight", 2, 6), "expected .*layer.2.query.lora_B.weigh"),
    "targets nowhere": (say(target_modules=["nowhere"]), "fits the model: target_modules: expected .*got .'nowhere'"),
    "a bias is lost": (without("layer.1.query.base_layer"), "its config names in the model; missing: layer.1.qu"),
    "a bias of nothing": (add("layer.0.base_layer.bias", 3), "biases and modules_to_save .*unknown: layer.0.base"),
    "a square bias": (put(f"{QUERY}.base_layer.bias", lambda t: t[None]), r"expected a bias of shape \[N\], got \[1"),
    "a short bias": (put(f"{QUERY}.base_layer.bias", lambda t: t[1:]), r"query.bias: expected torch.float32 \[6\], go"),
    "a large bias": (
        put(f"{QUERY}.base_layer.bias", lambda t: t.double() + 1e300),
        r"query.bias: expected values that torch.float32 can hold, of at most 3.4e\+38, got 1e\+300",
    ),
    "another K": (put(f"{QUERY}.lora_A.weight", lambda t: t[:, 1:]), r"expected lora_A \[R, 6\] and lora_B \[6, R\]"),
    "three axes": (put(f"{QUERY}.lora_A.weight", lambda t: t[None]), r"lora_A \[R, K\] and lora_B \[N, R\], got \[1, "),
    "a factor is lost": (without("layer.0.query.lora_B"), r"lora_A.weight and .*lora_B.weight according to .*, got"),
    "no factors": (without("lora_"), "expected LoRA factors, got none"),
    "no tensor": (without(""), "expected weights, got no tensor"),
    "no bias of the adapter": (say(lora_bias=True), "and layer.0.query.lora_B.bias according to adapter_config.json"),
    "a bias of the adapter too short": (
        lambda w, c: (
            c.update(lora_bias=True),
            [w.update({key.replace("weight", "bias"): torch.ones(1)}) for key in list(w) if "lora_B" in key],
        )[0],
        r"expected lora_B.bias \[6\], got \[1\]",
    ),
    "an odd name": (add("a..b.lora_A.weight", 2), "expected dotted names, got the key"),
    "no prefix": (lambda w, c: w.update({"layer.lora_A.weight": torch.ones(1)}), "expected keys like base_model"),
    "the same twice": (add("layer.0.query.lora_A.default.weight", 2, 6), "expected one tensor for layer.0.query.lora_"),
    "an embedding's adapter": (add("embed.lora_embedding_A", 2, 7), "only adapters of linears, got one of an embed"),
    "a strange tensor": (add("embed.something", 2), "expected no tensor that adapter_config.json does not account for"),
    "another weight": (add("layer.0.norm.weight", 5), "except the model's embeddings, got .*norm.weight, a diff"),
    "a weight of nothing": (add("nowhere.weight", 5), "got nowhere.weight, which the model does not have"),
    "a larger embedding": (add("embed.weight", 9, 6), r"\[7, 6\], got \[9, 6\]; give the model that size first"),
    "not a method": (say(peft_type="IA3"), "expected peft_type 'LORA', got 'IA3'"),
    "another format": (lambda w, c: (c.clear(), c.update(peftk=1))[0], "."),
    "no format": (lambda w, c: c.clear(), "expected a config of HF PEFT .* got the fields none"),
    "a broken rank": (say(r=2.5), "expected r to be an integer of 1 or more, got 2.5"),
    "no rank at all": (say(r=0), "expected r to be an integer of 1 or more, got 0"),
    "another rank": (say(r=4), "layer.0.query: expected rank 4 as in adapter_config.json, got factors of rank 2"),
    "no alpha": (say(lora_alpha="8"), "expected lora_alpha to be a finite number, got '8'"),
    "a vast alpha": (say(lora_alpha=1e300), r"expected a scaling that fp32 can hold, got 5e\+299"),
    "dora": (say(use_dora=True), "expected a LoRA that is s·BA and nothing more, got use_dora=True"),
    "a pattern of words": (say(alpha_pattern={"query": "x"}), "alpha_pattern to map patterns to numbers, got {'query'"),
    "a pattern of nan": (say(alpha_pattern={"query": float("nan")}), "expected finite numbers in alpha_pattern, got"),
    "one module to save": (say(modules_to_save="classifier"), "modules_to_save to be a list of names, got 'classifier"),
    "modules that are not there": (say(modules_to_save=["classifier"]), "missing: classifier.bias, classifier.w"),
    "dropout": (say(lora_dropout=2), "lora_dropout: expected 0 ≤ p < 1, got 2"),
    "a number for a name": (say(base_model_name_or_path=5), "expected base_model_name_or_path to be a string, got 5"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_a_server_refuses_what_load_adapter_refuses(good: pathlib.Path, how: str) -> None:
    change, message = DAMAGE[how]
    folder = spoilt(good, change)
    said = []
    for act in (peftk.load_adapter, lambda model, path: peftk.MultiAdapter(model).load("a", path)):
        model = Model()
        before = [(name, value.clone()) for name, value in model.state_dict().items()]
        with pytest.raises(peftk.CheckpointError, match=message) as refused:
            act(model, folder)
        said.append(str(refused.value))
        assert all(torch.equal(value, dict(before)[name]) for name, value in model.state_dict().items())
        assert injections(model) == ()
        assert [type(m) for m in model.modules()] == [type(m) for m in Model().modules()]
    if how != "another format":  # load_adapter reads that too
        assert said[0] == said[1]


def test_a_server_refuses_an_embedding_of_a_different_model(good: pathlib.Path) -> None:
    folder = spoilt(good, add("embed.weight", 7, 6))
    with pytest.raises(
        peftk.CheckpointError, match=r"embed.weight: expected the base model's own weight, got a different"
    ):
        peftk.MultiAdapter(Model()).load("a", folder)
    with pytest.raises(
        peftk.CheckpointError, match=r"embed.weight: expected the base model's own weight, got a different"
    ):
        peftk.switch_adapter(_injected(), spoilt(good.parent / "good", _factors_and_embedding))


def _factors_and_embedding(weights: Tensors, config: Fields) -> None:
    without("base_layer")(weights, config)
    config["bias"] = "none"
    weights["base_model.model.embed.weight"] = torch.ones(7, 6)


def _injected(**fields: Any) -> Model:
    model = Model()
    peftk.inject(model, peftk.LoraConfig(**{"r": 2, "target_modules": ["query", "value"], **fields}))
    return model


class Case(NamedTuple):
    act: Callable[[], Any]
    kind: type[Exception]
    message: str


def adapter(R: int = 2, K: int = 4, N: int = 5, **changes: Any) -> peftk.LoadedAdapter:
    made = peftk.LoadedAdapter(torch.ones(R, K), torch.ones(N, R), 2.0, False)
    return made._replace(**changes)


def other_cases(good: pathlib.Path) -> Iterator[Case]:
    """Cases that are not in DAMAGE: paths, models, other formats, combinations."""
    refused, tmp = peftk.CheckpointError, good.parent

    def saved(model: nn.Module, name: str, **options: Any) -> pathlib.Path:
        peftk.save_adapter(model, tmp / name, **options)
        return tmp / name

    def load(folder: Any, model: nn.Module | None = None) -> Callable[[], None]:
        return lambda: peftk.load_adapter(Model() if model is None else model, folder)

    def changed(folder: pathlib.Path, change: Callable[[Tensors, Fields], None]) -> pathlib.Path:
        target = tmp / f"changed {len(list(tmp.iterdir()))}"
        spoilt(folder, change).rename(target)
        return target

    # paths and files
    yield Case(load(5), TypeError, "path: expected the path of a folder, got 5")
    yield Case(load(""), TypeError, "path: expected the path of a folder, got ''")
    yield Case(load(tmp / "nowhere"), refused, "expected a folder with adapter_config.json, got no such folder")
    yield Case(load(good / "adapter_config.json"), refused, "expected a folder with adapter_config.json, got a file")
    yield Case(load(tmp), refused, "expected a folder with adapter_config.json, got none there")
    broken = changed(good, say())
    (broken / "adapter_config.json").write_text("{")
    yield Case(load(broken), refused, "adapter_config.json: expected JSON, got an error: Expecting property name")
    listed = changed(good, say())
    (listed / "adapter_config.json").write_text("[]")
    yield Case(load(listed), refused, "expected a JSON object, got list")
    cut = changed(good, say())
    (cut / "adapter_model.safetensors").write_bytes(b"1234567890")
    yield Case(load(cut), refused, "expected a complete safetensors file, got an error")
    bare = changed(good, say())
    (bare / "adapter_model.safetensors").rename(bare / "adapter_model.bin")
    yield Case(load(bare), refused, r"expected adapter_model.safetensors, got adapter_model.bin there \(pickled")

    # models
    yield Case(lambda: peftk.load_adapter("model", good), TypeError, "model: expected an nn.Module, got str")
    yield Case(lambda: peftk.save_adapter(5, tmp), TypeError, "model: expected an nn.Module, got int")
    yield Case(
        lambda: saved(Model(), "no"), ValueError, "model: expected LoRALinear layers or other adapters .*got none"
    )
    yield Case(
        lambda: saved(_injected(), "no", format="bin"), ValueError, "format: expected one of peft, adapterhub, pef"
    )
    model = _injected()
    yield Case(
        lambda: saved(_injected().to("meta"), "no"), ValueError, "model: expected values in .*, got a tensor on m"
    )
    (tmp / "file").write_text("")
    yield Case(lambda: saved(model, "file"), ValueError, "path: expected a folder, got the file ")
    merged = _injected(bias="lora_only")
    peftk.merge_adapter(merged)
    yield Case(
        load(good, merged), ValueError, "model: expected layer.0.query to be unmerged before its adapter changes"
    )
    wide = _injected(bias="lora_only", r=3)
    yield Case(load(good, wide), refused, "layer.0.query: expected rank 3 like the adapter in the model, got 2; load")
    biased = _injected(bias="lora_only", lora_bias=True)
    yield Case(load(good, biased), refused, "expected an adapter with lora_bias, got one without")
    few = _injected(bias="lora_only", target_modules=["query"])
    yield Case(load(good, few), refused, "exactly the model's LoRALinear layers; unknown: layer.0.value")
    yield Case(load(good, model), refused, "biases and modules_to_save as the model trains them; unknown: layer.0.q")

    yield Case(
        load(good, Model().to("meta")), refused, "layer.0.query: expected a weight with memory in the model, got"
    )

    half = Model()
    half.layer[0]["query"].bias = nn.Parameter(torch.ones(6, device="meta"))
    yield Case(load(good, half), refused, "query.bias: expected a tensor with memory in the model, got one on meta")

    # shared weights
    def whole(*names: str) -> Callable[[Tensors, Fields], None]:
        def change(weights: Tensors, config: Fields) -> None:
            config["modules_to_save"] = list(names)
            weights.update({f"base_model.model.{name}.weight": torch.ones(7, 6) * n for n, name in enumerate(names)})

        return change

    yield Case(
        load(changed(good, whole("embed"))), refused, "that share no weight with others, got embed.weight, which is"
    )
    both = changed(good, lambda w, c: (whole("embed")(w, c), add("tied.weight", 7, 6)(w, c))[0])
    yield Case(
        load(both),
        refused,
        "the same values for embed.weight and tied.weight, which are one weight in the model",
    )
    nan = changed(good, lambda w, c: (say(modules_to_save=["lm_head"])(w, c), add("lm_head.weight", 7, 6)(w, c))[0])
    weights = load_file(nan / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"][0, 0] = torch.nan
    save_file(weights, nan / "adapter_model.safetensors")
    yield Case(load(nan), refused, r"lm_head.weight: expected finite values, got nan \(1 of 42")

    # servers
    def serve(folder: pathlib.Path, model: nn.Module | None = None) -> Callable[[], None]:
        return lambda: peftk.MultiAdapter(Model() if model is None else model).load("a", folder)

    taken = Model()
    peftk.MultiAdapter(taken).load("a", good)
    yield Case(
        serve(good, taken), refused, "layer.0.query: expected a linear of this server, got a layer of a different"
    )
    head = saved(_injected(modules_to_save=["classifier"]), "head")
    yield Case(serve(head), refused, "which a batch can mix by token, got modules trained in full .*classifier.bias")
    norms = _injected(bias="all")
    nn.init.ones_(norms.layer[0]["norm"].bias)
    yield Case(serve(saved(norms, "norms")), refused, "norm: linear: expected an nn.Linear or a Conv1D, got LayerNorm")
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    one = copy.deepcopy(attention)
    peftk.inject(one, peftk.LoraConfig(r=2, target_modules=["fc"], bias="all"))
    nn.init.ones_(one["attention"].out_proj.bias)
    yield Case(
        serve(saved(one, "mha"), attention), refused, "out_proj: expected a linear that is called, got one whose"
    )

    larger = changed(good, add("embed.weight", 7, 6))
    yield Case(serve(larger), refused, "embed.weight: expected the base model's own weight, got a different")

    # peftk's format
    own = saved(_injected(), "own", format="peftk")
    yield Case(load(own, _injected().to("meta")), TypeError, "lora_A: expected a dense tensor, got a meta tensor")
    method = {"method": "LoraConfig", "r": 2, "target_modules": ["query", "value"]}
    for change, message in (
        (say(peftk=2), "expected peftk 1, got 2"),
        (say(methods="LoraConfig"), "expected methods to be a list of configs, got 'LoraConfig'"),
        (say(methods=[{"method": "X"}]), "expected a method of AdapterHubConfig, .*, got 'X'"),
        (say(methods=[{**method, "hidden": 1}]), "expected fields of LoraConfig, got hidden"),
        (
            say(methods=[{**method, "adapter_dtype": "int8"}]),
            "LoraConfig: adapter_dtype: expected one of float32.*'int8'",
        ),
        (
            say(methods=[{"method": "LlamaAdapterConfig", "projections": 3}]),
            "projections: expected query, key, .*got 3",
        ),
        (say(methods=[{**method, "r": 3}]), "expected rank 3 of adapter_config.json, got lora_A"),
        (
            say(methods=[{**method, "target_modules": ["nowhere"]}]),
            "expected a checkpoint that fits the model: target_m",
        ),
        (say(embeddings="embed"), "expected embeddings to be a list of names, got 'embed'"),
        (say(embeddings=["layer.0.norm.weight"]), "missing: layer.0.norm.weight"),
        (say(scalings={"layer": 3}), "expected scalings to give each layer lora_alpha, use_rslora, got {'layer': 3}"),
        (say(scalings={"layer": [1, False]}), "LoRALinear layers that were put in by hand; unknown: layer"),
        (say(revision=1), "expected revision to be a string, got 1"),
        (without("layer.0"), "exactly what the model trains; missing: layer.0.query.lora_A"),
        (put("layer.0.query.lora_A", lambda t: t * torch.nan), "layer.0.query.lora_A: expected finite values, got nan"),
        (
            put("layer.0.query.lora_A", lambda t: t[:, 1:]),
            r"expected torch.float32 \[2, 6\], got torch.float32 \[2, 5\]",
        ),
        (put("layer.0.query.lora_A", lambda t: t.long()), r"expected torch.float32 \[2, 6\], got torch.int64 \[2, 6\]"),
    ):
        yield Case(load(changed(own, change)), refused, message)
    strange = changed(own, say(embeddings=["x"]))
    weights = load_file(strange / "adapter_model.safetensors")
    save_file({**weights, "x": torch.ones(1)}, strange / "adapter_model.safetensors")
    yield Case(load(strange), refused, "expected embeddings to name embeddings of the model, got x")
    yield Case(serve(own), refused, "expected a LoRA checkpoint of HF PEFT, got one in the format of peftk")
    full = Model()
    peftk.inject(full, peftk.FullConfig())
    yield Case(load(own, full), refused, "expected the model's methods, FullConfig, got LoraConfig")
    bits, other = Model(), Model()
    peftk.inject(bits, peftk.BitFitConfig(biases=["query"]))
    peftk.inject(other, peftk.BitFitConfig(biases=["layer.0.query", "layer.1.query"]))
    yield Case(load(saved(bits, "bits"), other), refused, r"expected the model's BitFitConfig\(.*got BitFitConfig\(")
    unknown = _injected()
    unknown.__dict__["_peftk_injected"] = (injections(unknown)[0].__class__(Unknown(), (), (), ()),)
    yield Case(lambda: saved(unknown, "no", format="peftk"), ValueError, "config: expected one of Adapter.*got Unknown")
    yield Case(
        lambda: saved(full, "no", format="peft"), ValueError, "format: expected what a LoRA checkpoint .*FullConf"
    )

    # AdapterHub's format
    yield Case(
        lambda: saved(full, "no", format="adapterhub"), ValueError, "format: expected what a checkpoint of Adapter"
    )
    two = Model()
    peftk.inject(two, [peftk.BitFitConfig(biases=["query"]), peftk.LoraConfig(r=2, target_modules=["value"])])
    yield Case(
        lambda: saved(two, "no", format="adapterhub"), ValueError, "model: expected one method, got BitFitConfig, L"
    )
    hub = FIXTURES / "bert" / "houlsby"
    yield Case(load(hub, _injected()), refused, "expected a model with only bottleneck adapters: ")
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=16, num_attention_heads=2, vocab_size=9))
    peftk.inject(bert, peftk.AdapterHubConfig(activation="gelu"))
    yield Case(load(hub, bert), refused, "expected the model's activation, 'gelu', got 'silu'")
    for fields, message in (
        ({"name": "a.b"}, "expected name to be an adapter's name, got 'a.b'"),
        ({"config": 5}, "expected config to be the fields of a BnConfig, got 5"),
        ({"model_name": 5}, "expected base_model_name_or_path to be a string, got 5"),
        ({"architecture": "lora"}, "expected bottleneck adapters, got architecture 'lora'"),
        ({"mh_adapter": ...}, "expected the fields of a BnConfig, got none of mh_adapter"),
        ({"use_gating": True}, "nothing more, got use_gating=True"),
        ({"scaling": "learned"}, "expected scaling to be a number, got 'learned'"),
        ({"non_linearity": 5}, "expected non_linearity to be a name, got 5"),
        ({"non_linearity": "tan"}, "expected non_linearity one of relu, .*, got 'tan'"),
        ({"reduction_factor": -1}, "reduction_factor: expected"),
        (
            {"original_ln_before": 3},
            "expected a placement that keeps the model's own skip exactly once, got is_p",
        ),
    ):
        yield Case(lambda fields=fields: adapterhub_checkpoint.load(_hub(tmp, fields)), refused, message)
    for rename, message in (
        (("adapter_up.weight", "adapter_up.size"), "expected keys <module>.adapters.houlsby.adapter_"),
        (("adapter_up.bias", ""), "expected adapter_up.bias, got only 3 tensors of the adapter"),
        (("adapter_up.bias", "adapter_down.0.bias"), r"expected down \[R, d\], its bias \[R\], up \[d, R\]"),
    ):
        yield Case(lambda rename=rename: adapterhub_checkpoint.load(_hub(tmp, {}, rename)), refused, message)
    zero = peftk.AdapterHubConfig(scaling=0.0)
    yield Case(
        lambda: adapterhub_checkpoint.save(tmp / "no", zero, {}, {}),
        ValueError,
        "scaling: expected a number other than",
    )
    yield from _combinations(good)


class Unknown:
    """A config that is not one of peftk's methods."""


def _hub(tmp: pathlib.Path, fields: Fields, rename: tuple[str, str] | None = None) -> pathlib.Path:
    """An AdapterHub checkpoint with other fields, or with a tensor renamed (removed for "")."""
    source, target = FIXTURES / "bert" / "houlsby", tmp / f"hub {len(list(tmp.iterdir()))}"
    target.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    inner = config if fields.keys() <= {"name", "config", "model_name"} else config["config"]
    inner.update({name: value for name, value in fields.items() if value is not ...})
    for name in [name for name, value in fields.items() if value is ...]:
        del inner[name]
    weights = load_file(source / "adapter.safetensors")
    if rename is not None:
        key = next(key for key in weights if key.endswith(rename[0]))
        value = weights.pop(key)
        new = key.replace(*rename)
        if rename[1]:
            weights[new] = weights[new].new_ones(3) if new in weights else value
            weights.setdefault(key, value) if new in weights and rename[1].endswith("0.bias") else None
    save_file(weights, target / "adapter.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def _combinations(good: pathlib.Path) -> Iterator[Case]:
    two = [adapter(), adapter()]
    many: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: combine(two, [1, 1], "mean"), ValueError, "combination_type: expected one of svd, .*, got 'mean'"),
        (
            lambda: combine(two, [1, 1], "ties", density=0.5, majority_sign_method="x"),
            ValueError,
            "majority_sign_method: e",
        ),
        (lambda: combine(two, [1, 1], "ties"), ValueError, "density: expected 0 ≤ density ≤ 1 for ties, got None"),
        (lambda: combine(two, [1, 1], svd_rank=0), ValueError, "svd_rank: expected an integer of 1 or more, got 0"),
        (lambda: combine(two, [1, 1], svd_clamp=2), ValueError, "svd_clamp: expected a quantile, 0 … 1, got 2"),
        (lambda: combine(two, [1, 1], svd_rank=9), ValueError, r"svd_rank: expected at most 4 for ΔW \[5, 4\], got 9"),
        (
            lambda: combine(two, [1, 1], svd_driver="x"),
            ValueError,
            "svd_driver: expected one that torch has on cpu, got 'x'",
        ),
        (lambda: combine(iter(two), [1, 1]), TypeError, "adapters: expected a list or tuple, got list_iterator"),
        (lambda: combine(two, [1]), ValueError, "weights: expected one for each of 1 or more adapters, got 1 for 2"),
        (lambda: combine(two, [1, float("inf")]), ValueError, "weights: expected finite numbers, got inf"),
        (
            lambda: combine([adapter(), 5], [1, 1]),
            TypeError,
            "adapter 1: expected a LoadedAdapter, got int",
        ),
        (lambda: combine([adapter(lora_A=[1])], [1]), TypeError, "adapter 0: lora_A: expected a tensor, got list"),
        (
            lambda: combine([adapter(lora_bias=torch.ones(5))], [1]),
            ValueError,
            "adapter 0: lora_bias: expected None, got a",
        ),
        (lambda: combine([adapter(lora_A=torch.ones(2))], [1]), ValueError, r"with R ≥ 1, got \[2\] and \[5, 2\]"),
        (lambda: combine([adapter(R=0)], [1]), ValueError, r"with R ≥ 1, got \[0, 4\] and \[5, 0\]"),
        (
            lambda: combine([adapter(lora_alpha=float("nan"))], [1]),
            ValueError,
            "adapter 0: expected a finite scaling, got n",
        ),
        (
            lambda: combine([adapter(lora_B=torch.ones(5, 2) / 0)], [1]),
            ValueError,
            "adapter 0: lora_B: expected finite va",
        ),
        (
            lambda: combine([adapter(), adapter(K=3)], [1, 1]),
            ValueError,
            r"expected K = 4 and N = 5 like the first, got \[",
        ),
        (
            lambda: combine([adapter(), adapter(R=3)], [1, 1], "linear"),
            ValueError,
            r"expected one rank for linear .*\[2, 3",
        ),
        (
            lambda: combine([adapter(lora_alpha=1e38)] * 2, [9e9] * 2, "cat"),
            ValueError,
            "finite in torch.float32, got inf",
        ),
        (
            lambda: combine([adapter(lora_alpha=1e38)] * 2, [9e9] * 2, "svd"),
            ValueError,
            "Σ w·s·BA to be finite, got inf",
        ),
        (
            lambda: peftk.combine_checkpoints([{"fc": 5}], [1.0]),
            TypeError,
            "fc: adapter 0: expected a LoadedAdapter, got int",
        ),
        (
            lambda: peftk.combine_checkpoints([good], [1.0]),
            peftk.CheckpointError,
            "got other trained tensors: layer.0.query",
        ),
        (
            lambda: peftk.combine_checkpoints([spoilt(good, _factors_and_embedding)], [1.0]),
            peftk.CheckpointError,
            "expected only LoRA factors, got embed.weight of a base model whose embeddings have changed",
        ),
    ]
    elsewhere = adapter(lora_B=torch.ones(5, 2, device="meta"))
    many.append(
        (lambda: combine([elsewhere], [1]), ValueError, "on cpu like the first, got lora_A on cpu and lora_B on m")
    )
    yield from (Case(*one) for one in many)


def raises(file: str) -> list[tuple[int, int]]:
    """First and last line of every `raise` statement of a file with an exception of its own."""
    tree = ast.parse((HERE / file).read_text())
    only = SWEPT[file]
    inside = tree.body if only is None else [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in only
    ]  # fmt: skip
    found = [node for part in inside for node in ast.walk(part) if isinstance(node, ast.Raise) and node.exc is not None]
    return [(node.lineno, node.end_lineno or node.lineno) for node in found]


def raised_at(error: BaseException | None) -> Iterator[tuple[str, int]]:
    """Where an error and its causes were raised."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            yield trace.tb_frame.f_code.co_filename, trace.tb_lineno
            trace = trace.tb_next
        error = error.__context__


def test_every_error_says_what_is_wrong(good: pathlib.Path) -> None:
    damage = [
        Case(lambda change=change: peftk.load_adapter(Model(), spoilt(good, change)), peftk.CheckpointError, message)
        for change, message in DAMAGE.values()
    ]
    seen, wrong = set(), []
    for act, kind, message in (*damage, *other_cases(good)):
        try:
            act()
        except Exception as error:
            if not isinstance(error, kind) or not re.search(message, str(error)) or "expected" not in str(error):
                wrong.append(f"{message!r}: got {error!r}")
            seen |= set(raised_at(error))
        else:
            wrong.append(f"{message!r}: got no error")
    assert not wrong, "\n".join(wrong)
    not_met = {
        f"{file}:{first}"
        for file in SWEPT
        for first, last in raises(file)
        if not any((str(HERE / file), line) in seen for line in range(first, last + 1))
    }
    assert not not_met


# saves that fail


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


STEPS = {
    "mkdir": (pathlib.Path, "mkdir"),
    "a scratch folder": (tempfile, "TemporaryDirectory"),
    "the weights": (safetensors.torch, "save_file"),
    "the config": (pathlib.Path, "write_text"),
    "a link": (os, "link"),
    "the first move": (os, "replace"),
    "the second move": (os, "replace"),
}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()], ids=repr
)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("format", ["peft", "peftk"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_save_that_fails_changes_nothing(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    earlier: bool,
    format: str,
    step: str,
    error: BaseException,
) -> None:
    folder, model = tmp_path / "a" / "b", _injected()
    if earlier:
        peftk.save_adapter(_injected(r=3), folder, format=format)
    before, values = tree(tmp_path), copy.deepcopy(model.state_dict())
    owner, name = STEPS[step]
    real, calls = getattr(owner, name), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 1 + (step == "the second move"):
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails)
    met = contextlib.suppress(type(error)) if step == "a link" else pytest.raises(type(error))
    with met:  # if links fail with an OSError, the earlier files are copied
        peftk.save_adapter(model, folder, format=format)
    monkeypatch.undo()
    if step == "a link" and (not earlier or isinstance(error, OSError)):
        assert tree(tmp_path).keys() == {"a/b/adapter_config.json", "a/b/adapter_model.safetensors"}
    else:
        assert tree(tmp_path) == before
        assert earlier or not (tmp_path / "a").exists()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    peftk.save_adapter(model, folder, format=format)
    peftk.load_adapter(model, folder)
    assert len(tree(tmp_path)) == 2


@pytest.mark.parametrize("in_the_way", ["a file above", "a folder for the weights", "a folder that goes"])
def test_a_path_that_cannot_hold_a_checkpoint(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, in_the_way: str
) -> None:
    folder, model = tmp_path / "a" / "b", _injected()
    if in_the_way == "a file above":
        (tmp_path / "a").write_text("text")
    elif in_the_way == "a folder for the weights":
        peftk.save_adapter(_injected(r=3), folder)
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.safetensors").mkdir()
    else:
        real = safetensors.torch.save_file
        monkeypatch.setattr(
            safetensors.torch, "save_file", lambda *args, **kwargs: (real(*args, **kwargs), shutil.rmtree(folder))
        )
    before = tree(tmp_path)
    with pytest.raises(OSError, match=r"a|b"):
        peftk.save_adapter(model, folder)
    assert tree(tmp_path) == before
    assert (tmp_path / "a").exists() == (in_the_way != "a folder that goes")


def test_a_checkpoint_that_is_a_link_is_replaced(tmp_path: pathlib.Path) -> None:
    """As in a cache of snapshots, whose files are links to blobs: the blob belongs to others and stays."""
    peftk.save_adapter(_injected(r=3), tmp_path / "blobs")
    before = tree(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in before:
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    peftk.save_adapter(_injected(), tmp_path / "snapshot")
    assert tree(tmp_path / "blobs") == before
    peftk.load_adapter(_injected(), tmp_path / "snapshot")
