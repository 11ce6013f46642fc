"""Tests of inject, freeze, count, save and load on whole models, and of MultiAdapter with PEFT checkpoints."""

from __future__ import annotations

import contextlib
import json
import pathlib
import threading
import time

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import peftk
from peftk import AdapterBank, CheckpointError, LoraConfig, LoRALinear, MultiAdapter, MultiLoRALinear
from peftk.methods.inject import lora_layers
from tests.support.served_model import small_model, two_adapters, with_random_B


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["query", "value"], ["block.query", "block.value"]),
        ("block\\.(query|dense)", ["block.query", "block.dense"]),
        ("all-linear", ["block.query", "block.value", "block.dense", "head"]),
        (["block.dense"], ["block.dense"]),
    ],
)
def test_inject_replaces_targets_and_keeps_outputs(targets: str | list[str], names: list[str]) -> None:
    model, x = small_model(), torch.randn(7, 16)
    y = model(x)
    assert peftk.inject(model, LoraConfig(r=4, target_modules=targets)) == names
    torch.testing.assert_close(model(x), y)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"{name}.lora_{factor}" for name in names for factor in "AB"]


def test_counts() -> None:
    model = small_model()
    base = sum(p.numel() for p in model.parameters())
    peftk.inject(model, LoraConfig(r=4, target_modules=["query"], rank_pattern={"query": 3}))
    count = peftk.count_parameters(model)
    assert count == (3 * (16 + 16), base + 96)
    assert count.ratio == 96 / (base + 96)
    assert "96 trainable" in str(count)


def test_patterns_and_scaling() -> None:
    model = small_model()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value"], rank_pattern={"value": 2}, alpha_pattern={"value": 3}
    )
    peftk.inject(model, config)
    layers = dict(lora_layers(model))
    assert (layers["block.query"].r, layers["block.query"].scaling) == (4, 2.0)
    assert (layers["block.value"].r, layers["block.value"].scaling) == (2, 1.5)


def test_a_whole_model_is_merged_and_unmerged_or_not_at_all() -> None:
    model = small_model()
    peftk.inject(model, LoraConfig(r=3))
    with_random_B(model)
    layers = dict(lora_layers(model))
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    *_, (last, layer) = layers.items()
    with torch.no_grad():
        B = layer.lora_B.clone()
        layer.lora_B[0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"^{last}: weight: expected W"):
        peftk.merge_adapter(model)
    assert all(not m.merged and torch.equal(m.weight, before[n]) for n, m in layers.items())
    with torch.no_grad():
        layer.lora_B.copy_(B)
    next(iter(layers.values())).merge()  # a merged layer stays as it is
    peftk.merge_adapter(model)
    merged = {name: layer.weight.clone() for name, layer in layers.items()}
    assert all(m.merged and not torch.equal(m.weight, before[n]) for n, m in layers.items())
    with torch.no_grad():
        layer.weight[0, 0] += 1
        with pytest.raises(ValueError, match=f"^{last}: weight: expected the bits"):
            peftk.unmerge_adapter(model)
        layer.weight.copy_(merged[last])
    assert all(m.merged and torch.equal(m.weight, merged[n]) for n, m in layers.items())
    peftk.unmerge_adapter(model)
    peftk.unmerge_adapter(model)
    assert all(not m.merged and torch.equal(m.weight, before[n]) for n, m in layers.items())


def test_no_match_changes_nothing() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"target_modules: expected to match some linear of the model \(block.query"):
        peftk.inject(model, LoraConfig(target_modules=["nonesuch"]))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r: expected an integer of 1 or more"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\]: expected"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number"),
        ({"lora_dropout": 1.0}, "lora_dropout: expected"),
        ({"target_modules": []}, "target_modules: expected"),
        ({"target_modules": 123}, "target_modules: expected names, a regular expression"),
        ({"target_modules": "["}, "target_modules: expected a regular expression"),
        ({"rank_pattern": {"[": 3}}, r"rank_pattern\['\['\]: expected a regular expression"),
        ({"lora_dropout": "a"}, "lora_dropout: expected"),
    ],
)
def test_bad_configs(fields: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


def test_shared_linear_stays_shared() -> None:
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": linear, "b": linear})
    assert peftk.inject(model, LoraConfig(r=2)) == ["a", "b"]
    assert model["a"] is model["b"]
    assert isinstance(model["a"], LoRALinear)


def test_torchs_own_transformer_sees_the_adapter() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    names = peftk.inject(encoder, LoraConfig(r=2))
    assert names == ["linear1", "linear2"]  # MHA computes with out_proj's weight and does not call it
    with torch.inference_mode():
        before = encoder(x)
        with_random_B(encoder)
        assert not torch.allclose(encoder(x), before)
    with pytest.raises(ValueError, match="out_proj, whose weight MultiheadAttention reads itself"):
        peftk.inject(nn.TransformerEncoderLayer(16, 2, 32), LoraConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize("rslora", [False, True])
def test_save_load_and_serve(tmp_path: pathlib.Path, rslora: bool) -> None:
    x = torch.randn(6, 16)
    outputs, paths = {}, {}
    for number, (name, r, targets) in enumerate(
        [("a", 1, ["query"]), ("b", 20, "all-linear"), ("c", 5, ["value", "head"])]
    ):
        model = small_model()
        config = LoraConfig(r=r, lora_alpha=7, use_rslora=rslora, target_modules=targets, rank_pattern={"dense": 3})
        peftk.inject(model, config)
        with_random_B(model, number)
        outputs[name] = model(x)
        paths[name] = tmp_path / name
        peftk.save_adapter(model, paths[name])
        other = small_model()
        peftk.inject(other, config)
        peftk.load_adapter(other, paths[name])
        torch.testing.assert_close(other(x), outputs[name])
    base = small_model()
    outputs[None] = base(x)
    server = MultiAdapter(base, max_adapters=3)
    for name, path in paths.items():
        server.load(name, path)
    route = ["b", None, "a", "c", "b", "a"]
    with server.route(route):
        mixed = base(x)
    for row, name in enumerate(route):
        torch.testing.assert_close(mixed[row], outputs[name][row])
    torch.testing.assert_close(base(x), outputs[None])
    with pytest.raises(ValueError, match="max_adapters: expected a free slot, got 3 adapters loaded already"):
        server.load("d", paths["a"])
    server.unload("a")
    with pytest.raises(ValueError, match="name: expected a loaded adapter"), server.route(["a"]):
        pass
    server.load("d", paths["c"])
    with server.route(["d", "b", None, None, None, "c"]):
        mixed = base(x)
    torch.testing.assert_close(mixed[0], outputs["c"][0])
    torch.testing.assert_close(mixed[1], outputs["b"][1])
    torch.testing.assert_close(mixed[5], outputs["c"][5])


def test_routes_take_tokens_and_reject_other_batches(tmp_path: pathlib.Path) -> None:
    model = small_model()
    peftk.inject(model, LoraConfig(r=2, target_modules=["query"]))
    with_random_B(model)
    peftk.save_adapter(model, tmp_path)
    base, x = small_model(), torch.randn(2, 16)
    server = MultiAdapter(base)
    server.load("a", tmp_path)
    with server.route(["a", None]):
        y = base(x)
        tokens = base(x[:, None].expand(2, 5, 16))
        for rows in (3, 6):
            with pytest.raises(ValueError, match=rf"route: expected x \[2, …, K\], .* got x \[{rows}, K\]"):
                base(torch.randn(rows, 16))
    torch.testing.assert_close(tokens, y[:, None].expand(2, 5, 5))
    per_token = server.ids(["a", None])[:, None].expand(2, 5)
    with server.route(per_token):
        torch.testing.assert_close(base(x[:, None].expand(2, 5, 16)), tokens)
    with pytest.raises(TypeError, match="names: expected one name or None per sequence"):
        server.ids("a")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_activation_checkpointing_remembers_each_forwards_route(
    tmp_path: pathlib.Path, use_reentrant: bool, mode: str
) -> None:
    base, server = two_adapters(tmp_path)
    base.train(mode == "train")

    def run(x: torch.Tensor, checkpointed: bool) -> torch.Tensor:
        if not checkpointed:
            return base(x).square().sum()
        return torch.utils.checkpoint.checkpoint(base, x, use_reentrant=use_reentrant).square().sum()

    def grads(checkpointed: bool, others: list[str | None] | None) -> list[torch.Tensor]:
        inputs = [torch.full((3, 16), 0.1 * n, requires_grad=True) for n in range(1, 4)]
        losses = []
        for x, names in zip(inputs, (["alice"] * 3, ["bob", None, "alice"]), strict=False):
            with server.route(names):
                losses.append(run(x, checkpointed))
        losses.append(run(inputs[2], checkpointed))  # outside of any route
        # a backward may run outside of a route, or while another batch is routed
        with server.route(others) if others is not None else contextlib.nullcontext():
            sum(losses).backward()
        return [x.grad for x in inputs]

    expected = grads(False, None)
    for others in (None, ["bob", "bob", "bob"]):
        for actual, wanted in zip(grads(True, others), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


def test_nested_checkpoints_remember_the_route(tmp_path: pathlib.Path) -> None:
    base, server = two_adapters(tmp_path)
    checkpoint = torch.utils.checkpoint.checkpoint

    def inner(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(base, x, use_reentrant=False)

    x, y = torch.ones(2, 16, requires_grad=True), torch.ones(2, 16, requires_grad=True)
    with server.route(["bob", "alice"]):
        plain, nested = base(x).square().sum(), checkpoint(inner, y, use_reentrant=False).square().sum()
    plain.backward()
    with server.route([None, None]):
        nested.backward()
    torch.testing.assert_close(y.grad, x.grad)


def test_loading_and_unloading_do_not_disturb_a_graph_or_a_table_in_use(tmp_path: pathlib.Path) -> None:
    base, server = two_adapters(tmp_path)
    x = torch.randn(2, 16, requires_grad=True)
    with server.route(["alice", "bob"]):
        loss = base(x).square().sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    server.load("carol", tmp_path / "bob")
    server.unload("alice")
    server.load("dave", tmp_path / "bob")  # would get alice's pages if nothing held them
    (actual,) = torch.autograd.grad(loss, x)
    assert torch.equal(actual, expected)


def test_threads_do_not_see_half_an_adapter(tmp_path: pathlib.Path) -> None:
    paths = {}
    for name, value in (("one", 1.0), ("thousand", 1000.0)):
        model = nn.ModuleDict({"fc": nn.Linear(64, 64, bias=False)})
        peftk.inject(model, LoraConfig(r=16, lora_alpha=16, target_modules=["fc"]))
        nn.init.constant_(model["fc"].lora_A, 1 / 1024)
        nn.init.constant_(model["fc"].lora_B, value)
        paths[name] = tmp_path / name
        peftk.save_adapter(model, paths[name])
    base = nn.ModuleDict({"fc": nn.Linear(64, 64, bias=False)})
    nn.init.zeros_(base["fc"].weight)
    server = MultiAdapter(base, max_adapters=2)
    server.load("tenant", paths["one"])
    seen: set[float] = set()
    stop = threading.Event()

    def serve() -> None:
        x = torch.ones(256, 64)
        while not stop.is_set():
            try:
                seen.update(base["fc"](x, server.ids(["tenant"] * 256)).flatten().tolist())
            except ValueError:  # between unload and load there is no adapter, or its number is a different one
                continue

    thread = threading.Thread(target=serve)
    thread.start()
    for turn in range(150):
        server.unload("tenant")
        server.load("tenant", paths["thousand" if turn % 2 == 0 else "one"])
        time.sleep(0.003)
    stop.set()
    thread.join()
    assert seen == {1.0, 1000.0}


def test_a_padded_batch_through_torchs_encoder() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.inference_mode():
        expected = encoder(x, src_key_padding_mask=mask)
        peftk.inject(encoder, LoraConfig(r=2))
        actual = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1, :3], expected[1, :3])


def test_modules_other_than_plain_linears_are_refused_and_nothing_changes() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "odd": Doubled(4, 4)})
    with pytest.raises(TypeError, match=r"linear: expected nn.Linear's own forward, got Doubled"):
        peftk.inject(model, LoraConfig(r=2, target_modules=["fc", "odd"]))
    with pytest.raises(TypeError, match="adapter_dtype: expected"):
        peftk.inject(model, LoraConfig(r=2, target_modules=["fc"], adapter_dtype=torch.int8))
    normed = nn.ModuleDict({"fc": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    with pytest.raises(TypeError, match="linear: expected a weight that is a Parameter"):
        peftk.inject(normed, LoraConfig(r=2))
    for module in (model, normed):
        assert all(p.requires_grad for p in module.parameters())
        assert not any(isinstance(m, LoRALinear) for m in module.modules())


def test_hooks_stay() -> None:
    model, called = small_model(), []
    model["head"].register_forward_hook(lambda *_: called.append("head"))
    peftk.inject(model, LoraConfig(r=2, target_modules=["head"]))
    model(torch.randn(1, 16))
    assert called == ["head"]


def spoil(folder: pathlib.Path, how: str) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "garbage":
        weights.write_bytes(b"not a checkpoint")
    elif how == "no weights":
        weights.unlink()
    elif how == "pickle":
        weights.unlink()
        (folder / "adapter_model.bin").write_bytes(b"")
    elif how == "no config":
        config.unlink()
    elif how == "bad json":
        config.write_text("{")
    elif how in ("pissa", "alora", "bad pattern"):
        changes = {
            "pissa": {"init_lora_weights": "pissa_niter_4"},
            "alora": {"alora_invocation_tokens": [1, 2]},
            "bad pattern": {"alpha_pattern": {"query": "much"}},
        }
        config.write_text(json.dumps({**fields, **changes[how]}))
    else:
        fields.update({"other method": {"peft_type": "IA3"}, "dora": {"use_dora": True}, "rank": {"r": 9}}[how])
        fields["rank_pattern"] = {}
        config.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "expected a complete safetensors file"),
        ("garbage", "expected a complete safetensors file"),
        ("no weights", "expected adapter_model.safetensors, got none there"),
        ("pickle", "got adapter_model.bin there .pickled files are not read"),
        ("no config", "expected a folder with adapter_config.json"),
        ("bad json", "expected JSON"),
        ("other method", "expected peft_type 'LORA', got 'IA3'"),
        ("dora", "expected a LoRA that is s·BA and nothing more, got use_dora=True"),
        ("pissa", "expected a LoRA that is s·BA and nothing more, got init_lora_weights='pissa_niter_4'"),
        ("alora", "expected a LoRA that is s·BA and nothing more, got alora_invocation_tokens="),
        ("bad pattern", "expected alpha_pattern to map patterns to numbers"),
        ("rank", "expected rank 9 as in adapter_config.json, got factors of rank 2"),
    ],
)
def test_damaged_checkpoints_are_refused_and_the_rest_goes_on(tmp_path: pathlib.Path, how: str, message: str) -> None:
    model = small_model()
    peftk.inject(model, LoraConfig(r=2, target_modules=["query", "dense"]))
    with_random_B(model)
    for name in ("good", "bad"):
        peftk.save_adapter(model, tmp_path / name)
    spoil(tmp_path / "bad", how)
    base, x = small_model(), torch.randn(2, 16)
    server = MultiAdapter(base)
    with pytest.raises(CheckpointError, match=message):
        server.load("bad", tmp_path / "bad")
    assert not any(isinstance(m, MultiLoRALinear) for m in base.modules())
    assert all(p.requires_grad for p in base.parameters())
    server.load("good", tmp_path / "good")
    with server.route(["good", "good"]):
        y = base(x)
    with pytest.raises(CheckpointError, match=message):
        server.load("bad", tmp_path / "bad")
    with server.route(["good", "good"]):
        assert torch.equal(base(x), y)
    assert server.names == ["good"]
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        peftk.load_adapter(model, tmp_path / "bad")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("loaded_before", [False, True])
def test_running_out_of_memory_during_a_load_changes_no_layer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, loaded_before: bool
) -> None:
    if loaded_before:
        base, server = two_adapters(tmp_path)
    else:
        base = small_model()
        server = MultiAdapter(base)
    model = small_model()
    peftk.inject(model, LoraConfig(r=2, target_modules=["query", "dense", "head"]))
    with_random_B(model)
    peftk.save_adapter(model, tmp_path / "carol")
    layers = [m for m in base.modules() if isinstance(m, MultiLoRALinear)]
    names = [dict(layer.bank.names) for layer in layers]
    keep, calls = AdapterBank.keep, []

    def keep_until_memory_ends(self: AdapterBank, *args: object) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        keep(self, *args)

    monkeypatch.setattr(AdapterBank, "keep", keep_until_memory_ends)
    with pytest.raises(MemoryError):
        server.load("carol", tmp_path / "carol")
    monkeypatch.undo()
    assert "carol" not in server.names
    assert [m for m in base.modules() if isinstance(m, MultiLoRALinear)] == layers
    assert [dict(layer.bank.names) for layer in layers] == names
    server.load("carol", tmp_path / "carol")
    x = torch.randn(1, 16)
    with server.route(["carol"]):
        torch.testing.assert_close(base(x), model(x))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: pathlib.Path) -> None:
    other = nn.ModuleDict({"block": nn.ModuleDict({"query": nn.Linear(16, 17)}), "tail": nn.Linear(3, 3)})
    peftk.inject(other, LoraConfig(r=2, target_modules=["query"]))
    peftk.save_adapter(other, tmp_path / "shape")
    server = MultiAdapter(small_model())
    with pytest.raises(CheckpointError, match=r"block.query: expected lora_A \[R, 16\] and lora_B \[16, R\]"):
        server.load("x", tmp_path / "shape")
    peftk.inject(other, LoraConfig(r=2, target_modules=["tail"]))
    peftk.save_adapter(other, tmp_path / "name")
    with pytest.raises(CheckpointError, match="expected"):
        server.load("x", tmp_path / "name")


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    peftk.inject(model, LoraConfig(r=2, target_modules=["query"]))
    peftk.save_adapter(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with_random_B(model)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("json.dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        peftk.save_adapter(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="model: expected LoRALinear layers"):
        peftk.save_adapter(small_model(), tmp_path)


class TwoLayers(torch.nn.Module):
    """Named as in transformers' models: numbered layers, and a head beside them."""

    def __init__(self) -> None:
        super().__init__()
        block = lambda: torch.nn.ModuleDict({n: torch.nn.Linear(16, 16) for n in ("query", "value", "dense")})  # noqa: E731
        self.layer = torch.nn.ModuleList([block(), block()])
        self.norm = torch.nn.LayerNorm(16)
        self.classifier = torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layer:
            x = self.norm(x + block["dense"](torch.relu(block["query"](x)) * block["value"](x)))
        return self.classifier(x)


@pytest.mark.parametrize(
    ("fields", "layers", "trained"),
    [
        ({"target_modules": ["query"], "layers_to_transform": 1}, ["layer.1.query"], []),
        ({"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": "layer"}, ["layer.0.query"], []),
        ({"exclude_modules": ["dense", "value"], "modules_to_save": ["classifier"]}, ["layer.0.query", "layer.1.query"],
         ["classifier.weight", "classifier.bias"]),
        ({"target_modules": r"layer\.0\.(query|value)", "bias": "lora_only"}, ["layer.0.query", "layer.0.value"],
         ["layer.0.query.bias", "layer.0.value.bias"]),
        ({"target_modules": ["layer.1.dense"], "bias": "all"}, ["layer.1.dense"],
         [f"layer.{i}.{n}.bias" for i in (0, 1) for n in ("query", "value", "dense")]
         + ["norm.bias", "classifier.bias"]),
    ],
)  # fmt: skip
def test_what_a_lora_config_trains(fields: dict, layers: list[str], trained: list[str]) -> None:  # type: ignore[type-arg]
    model, x = TwoLayers(), torch.randn(2, 5, 16)
    before = model(x)
    assert peftk.inject(model, peftk.LoraConfig(r=2, **fields)) == layers
    assert_close(model(x), before)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{layer}.lora_{half}" for layer in layers for half in "AB"} | set(trained)
    model(x).square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == names


def test_several_configs_are_injected_together_or_not_at_all() -> None:
    model = TwoLayers()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    good, bad = peftk.LoraConfig(target_modules=["query"]), peftk.LoraConfig(target_modules=["query"], r=4)
    for configs in ([good, bad], [good, peftk.LoraConfig(target_modules=["value"], modules_to_save=["nonesuch"])]):
        with pytest.raises(ValueError, match=r"replaced already|nonesuch"):
            peftk.inject(model, configs)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
        assert not list(lora_layers(model))
    peftk.inject(model, [good, peftk.LoraConfig(target_modules=["value"], r=4)])
    peftk.inject(model, peftk.LoraConfig(target_modules=["dense"], r=1))  # the earlier layers stay, and train
    assert {name: layer.r for name, layer in lora_layers(model) if layer.lora_A.requires_grad} == {
        f"layer.{i}.{name}": r for i in (0, 1) for name, r in (("query", 8), ("value", 4), ("dense", 1))
    }


def test_a_weight_that_one_method_freezes_cannot_be_trained_by_another() -> None:
    model = TwoLayers()
    peftk.inject(model, peftk.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"expected layer\.0\.query\.weight to be frozen"):
        peftk.inject(model, peftk.LoraConfig(target_modules=["value"], modules_to_save=["query"]))
    assert [name for name, _ in lora_layers(model)] == ["layer.0.query", "layer.1.query"]


def test_conv1d_reads_its_weight_as_it_is_stored() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, x = Conv1D(24, 16), torch.randn(5, 16)
    layer = peftk.LoRALinear.from_linear(conv, r=3)
    assert layer.weight is conv.weight
    assert_close(layer(x), conv(x))
    torch.nn.init.normal_(layer.lora_B)
    expected = conv(x) + layer.scaling * x @ layer.lora_A.t() @ layer.lora_B.t()
    assert_close(layer(x), expected)
    before = conv.weight.detach().clone()
    layer.merge()
    assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert torch.equal(conv.weight, before)
    multi = peftk.MultiLoRALinear.from_linear(conv, max_adapters=2)
    multi.add_adapter("one", layer.lora_A, layer.lora_B, layer.scaling)
    assert_close(multi(x, torch.zeros(5, dtype=torch.int32)), expected)
