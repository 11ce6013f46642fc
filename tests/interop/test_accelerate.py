"""Tests of `peftk.accelerate` against plain HF PEFT: a copy of the same model that was not accelerated."""

from __future__ import annotations

import contextlib
import copy
import io
import pathlib
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftk
from tests.support import numerics

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from transformers.pytorch_utils import Conv1D  # noqa: E402

K, N, M = 48, 40, 6


class Two(nn.Module):
    """A Linear, a Conv1D and a Linear without bias, with activations between; optionally with checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(K, N), Conv1D(K, N), nn.Linear(K, N, bias=False)
        nn.init.normal_(self.b.weight, std=0.2)
        self.reentrant: bool | None = None

    def block(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)


def pair(
    *adapters: str, base: nn.Module | None = None, dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[Any, Any]:
    """A PEFT model and an accelerated copy, in eval mode. Each adapter has a different rank."""
    torch.manual_seed(0)
    names = adapters or ("default",)
    model: Any = None
    for number, name in enumerate(names):
        lora = peft.LoraConfig(
            **{
                "r": 3 + 2 * number,
                "lora_alpha": 4 + number,
                "target_modules": ["a", "b", "c"],
                "init_lora_weights": False,
                **config,
            }
        )
        if model is None:
            model = peft.get_peft_model((base or Two()).to(dtype), lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    plain = model.eval()
    accelerated = peftk.accelerate(copy.deepcopy(plain))
    return plain, accelerated


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]


@contextlib.contextmanager
def only_ours() -> Iterator[None]:
    """Within the `with`, an accelerated layer must not fall back to PEFT's own forward."""
    forward = peft.tuners.lora.Linear.forward

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        assert type(self) is peft.tuners.lora.Linear, "PEFT's own forward ran"
        return forward(self, *args, **kwargs)

    peft.tuners.lora.Linear.forward = refuse
    try:
        yield
    finally:
        peft.tuners.lora.Linear.forward = forward


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def no_worse(actual: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Checks that the error against fp64 is no larger than plain PEFT's, apart from rounding three outputs to dtype."""
    assert actual.dtype == plain.dtype
    assert actual.shape == plain.shape
    ours, theirs = ((y.double() - exact).norm() / exact.norm() for y in (actual, plain))
    assert ours <= 1.1 * theirs + 3 * numerics.NORM[dtype], f"error {ours:.2e}, plain PEFT's {theirs:.2e}"


def close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Both are rounded, and plain PEFT's fp32 is no better than ours, so outputs may differ by twice the norm of
    `tests.support.numerics`."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[actual.dtype] * scale
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.2e}"


def same_gradients(plain: nn.Module, accelerated: nn.Module, scale: float = 2.0) -> None:
    expected, actual = grads(plain), grads(accelerated)
    assert actual.keys() == expected.keys()
    assert expected
    for name, grad in expected.items():
        close(actual[name], grad, scale)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "bias": {"lora_bias": True, "target_modules": ["a", "b"]},
    "bias trains": {"bias": "all"},
    "pattern": {"rank_pattern": {"a": 17}, "alpha_pattern": {"b": 9}},
}


def forward_and_gradients() -> list[Any]:
    every, cases = pytest.mark.full, []
    for form in FORMS:
        for adapters in ("one", "two active"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                often = dtype == torch.bfloat16 if form in ("plain", "bias") else dtype == torch.float32
                if form != "bias trains" or adapters == "one":  # in PEFT, only one adapter may train biases
                    cases.append(pytest.param(form, dtype, adapters, marks=() if often else every))
    return cases


@pytest.mark.parametrize(("form", "dtype", "adapters"), forward_and_gradients())
def test_forward_and_gradients(form: str, dtype: torch.dtype, adapters: str) -> None:
    adapters = {"one": ("default",), "two active": ("default", "other")}[adapters]
    plain, accelerated = pair(*adapters, dtype=dtype, **FORMS[form])
    exact = copy.deepcopy(plain).double()
    x = torch.randn(M, K).to(dtype)
    outputs = []
    for model in (plain, exact, accelerated):
        model.train().base_model.set_adapter(list(adapters))
        with only_ours():
            outputs.append(model(x.to(torch.float64 if model is exact else dtype)))
            outputs[-1].sum().backward()
    expected, best, actual = outputs
    no_worse(actual, expected, best, dtype)
    assert grads(accelerated).keys() == grads(plain).keys()
    for name, grad in grads(accelerated).items():
        no_worse(grad, grads(plain)[name], grads(exact)[name], dtype)
    accelerated.eval()
    with torch.no_grad(), only_ours():
        assert torch.equal(accelerated(x), actual)  # without gradients a different path runs, with the same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["a", "b"])
@pytest.mark.parametrize("active", [["default"], ["default", "other"]])
def test_a_layer_is_within_the_bound(dtype: torch.dtype, kind: str, active: list[str]) -> None:
    _, accelerated = pair("default", "other", dtype=dtype, lora_bias=True, target_modules=["a", "b"])
    layer = getattr(accelerated.base_model.model, kind)
    layer.set_adapter(active)
    x = torch.randn(M, layer.in_features).to(dtype)
    weight = layer.base_layer.weight.double()
    weight = weight.t() if kind == "b" else weight
    expected = x.double() @ weight.t() + layer.base_layer.bias.double()
    magnitude = x.double().abs() @ weight.abs().t() + layer.base_layer.bias.double().abs()
    contraction = K
    for name in active:
        A, B, s = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double(), layer.scaling[name]
        v, beta = x.double() @ A.t(), layer.lora_B[name].bias.double()
        expected = expected + s * (v @ B.t() + beta)
        magnitude = magnitude + s * ((x.double().abs() @ A.abs().t()) @ B.abs().t() + beta.abs())
        contraction += A.shape[0]
    with only_ours():
        numerics.check(layer(x).detach(), expected.detach(), magnitude.detach(), contraction)


def test_the_model_stays_pefts() -> None:
    plain, accelerated = pair("default", "other")
    assert repr(accelerated) == repr(plain)
    assert accelerated.state_dict().keys() == plain.state_dict().keys()
    assert peftk.accelerate(accelerated) is accelerated
    assert all(isinstance(layer, peft.tuners.lora.Linear) for layer in layers(accelerated))
    assert isinstance(accelerated.base_model, peft.tuners.lora.LoraModel)
    assert accelerated.get_model_status() == plain.get_model_status()


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"peft_model: expected an nn\.Module, got str"):
        peftk.accelerate("model")
    with pytest.raises(ValueError, match="peft_model: expected LoRA layers of HF PEFT, got Two without"):
        peftk.accelerate(Two())
    with pytest.raises(ValueError, match="peft_model: expected LoRA layers"):
        peftk.accelerate(peft.get_peft_model(Two(), peft.IA3Config(target_modules=["a"], feedforward_modules=[])))
    with pytest.raises(ValueError, match="peft_model: expected an accelerated model"):
        peftk.decelerate(pair()[0])
    with pytest.raises(TypeError, match=r"peft_model: expected an nn\.Module"):
        peftk.decelerate(3)


@pytest.mark.full
def test_peft_is_not_imported_for_others() -> None:
    code = (
        "import sys, peftk, torch\n"
        "try: peftk.accelerate(torch.nn.Linear(2, 2))\n"
        "except ValueError: pass\n"
        "peftk.explain(peftk.LoRALinear.from_linear(torch.nn.Linear(2, 2)))\n"
        "assert not {'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layers_that_are_added_later_are_accelerated() -> None:
    plain, accelerated = pair(target_modules=["a"])
    more = peft.LoraConfig(r=2, target_modules=["a", "c"], init_lora_weights=False)
    for model in (plain, accelerated):
        torch.manual_seed(1)
        model.add_adapter("more", more)
        model.set_adapter("more")
    assert peftk.explain(accelerated).peft == {}
    assert [layer.lora_A.keys() >= {"more"} for layer in layers(accelerated)] == [True, True]
    x = torch.randn(M, K)
    with only_ours():
        actual = accelerated(x)
    close(actual, plain(x))
    for model in (plain, accelerated):
        model.delete_adapter("more")
    with only_ours():
        close(accelerated(x), plain(x))


def test_disabled_adapters_and_set_scale() -> None:
    plain, accelerated = pair("default", "other")
    x = torch.randn(M, K)
    before = accelerated(x)
    with accelerated.disable_adapter(), plain.disable_adapter():
        assert torch.equal(accelerated(x), plain(x))  # the base model's bits
        assert list(peftk.explain(accelerated).peft) == ["adapters are disabled, which leaves the base layer itself"]
    for model in (plain, accelerated):
        for layer in layers(model):
            layer.set_scale("default", 3.0)
    with only_ours():
        actual = accelerated(x)
    close(actual, plain(x))
    assert not torch.allclose(actual, before)


# -- mixed batches

NAMES = ["other", "__base__", "default", "other", "default", "third"]


@pytest.mark.parametrize("form", ["plain", "bias"])
@pytest.mark.parametrize("shape", [(M, K), (M, 5, K)])
def test_mixed_batch(form: str, shape: tuple[int, ...]) -> None:
    plain, accelerated = pair("default", "other", "third", **FORMS[form])
    accelerated.add_adapter("elsewhere", peft.LoraConfig(r=2, target_modules=["c"], init_lora_weights=False))
    plain.add_adapter("elsewhere", peft.LoraConfig(r=2, target_modules=["c"], init_lora_weights=False))
    plain.load_state_dict(accelerated.state_dict())
    plain.eval(), accelerated.eval()
    for names in (NAMES, NAMES, ["__base__"] * M, ["third"] * M, ["third"] * M, ["elsewhere", *NAMES[1:]]):
        x = torch.randn(shape)
        with torch.no_grad(), only_ours():
            actual = accelerated(x, adapter_names=names)
        with torch.no_grad():
            close(actual, plain(x, adapter_names=names))
        # the kernels' table follows when adapters move or change
        for model in (plain, accelerated):
            for layer in layers(model):
                for adapter in layer.lora_A:
                    weight = layer.lora_A[adapter].weight
                    weight.data = weight.data.flip(0).clone()
                    layer.scaling[adapter] *= 1.5
                    with torch.no_grad():
                        layer.lora_B[adapter].weight.mul_(0.9)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_a_mixed_batch_follows_changes_of_only_the_scaling(lora_bias: bool) -> None:
    plain, accelerated = pair("default", "other", "third", lora_bias=lora_bias, target_modules=["a", "b"])
    x, before = torch.randn(M, K), None
    for factor in (1.0, 3.0, -0.5):
        for model in (plain, accelerated):
            for layer in layers(model):
                layer.scaling["other"] *= factor
        with torch.no_grad(), only_ours():
            actual = accelerated(x, adapter_names=NAMES)
        with torch.no_grad():
            close(actual, plain(x, adapter_names=NAMES))
        if before is not None:
            named = torch.tensor([name == "other" for name in NAMES])
            assert torch.equal(actual[~named], before[~named])
            assert not torch.isclose(actual[named], before[named]).all()
        before = actual


def per_sample(plain: nn.Module, x: Tensor, names: list[str]) -> None:
    """Gradients of a mixed batch, sample by sample."""
    for sample, name in zip(x, names, strict=True):
        if name == "__base__":
            continue
        plain.set_adapter(name)
        plain.set_requires_grad(["default", "other", "third"])
        plain(sample[None]).square().sum().backward()


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_mixed_batches_train(reentrant: bool | None, mode: str) -> None:
    plain, accelerated = pair("default", "other", "third")
    x = torch.randn(M, 4, K)
    names = [name if name != "third" else "default" for name in NAMES]
    per_sample(plain, x, names)
    accelerated.set_requires_grad(["default", "other", "third"])
    accelerated.train(mode == "train")
    accelerated.base_model.model.reentrant = reentrant
    with only_ours():
        loss = accelerated(x.clone().requires_grad_(), adapter_names=names).square().sum()
        with torch.no_grad():  # a different batch before the backward; the recomputation must not use its names
            accelerated(x[:2], adapter_names=["third", "__base__"])
            accelerated(x)
        loss.backward()
    assert accelerated.base_model.training == (mode == "train")
    same_gradients(plain, accelerated, 4)  # none for "third", which no sample named


@pytest.mark.parametrize("reentrant", [False, True])
def test_mixed_batches_train_where_layers_stay_pefts(reentrant: bool) -> None:
    """An embedding's adapter and a layer with hooks stay PEFT's. Checkpoints that rerun them pass them the names."""

    class WithEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.a, self.c = nn.Embedding(20, K), nn.Linear(K, N), nn.Linear(N, N)
            self.checkpointed = False

        def block(self, ids: Tensor, one: Tensor) -> Tensor:
            return self.c(torch.tanh(self.a(self.embedding(ids) * one)))

        def forward(self, ids: Tensor) -> Tensor:
            one = torch.ones(1, requires_grad=True)
            if not self.checkpointed:
                return self.block(ids, one)
            return checkpoint(self.block, ids, one, use_reentrant=reentrant)

    _, model = pair("default", "other", base=WithEmbedding(), target_modules=["embedding", "a", "c"])
    model.set_requires_grad(["default", "other"])
    model.train()
    model.base_model.model.c.base_layer.register_forward_hook(lambda *_: None)
    assert list(peftk.explain(model).peft) == [
        "lora.Embedding",
        "the base layer has hooks or a forward of its own",
    ]
    ids, names, found = torch.randint(0, 20, (4, 3)), ["other", "default", "__base__", "other"], []
    for checkpointed in (False, True):
        model.base_model.model.checkpointed = checkpointed
        model.zero_grad()
        model(ids, adapter_names=names).square().sum().backward()
        found.append({name: grad.clone() for name, grad in grads(model).items()})
    assert len(found[0]) == 12
    for name, grad in found[0].items():
        close(found[1][name], grad)
    peftk.decelerate(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_mixed_batches_train_with_one_dropout() -> None:
    _, accelerated = pair("default", "other", lora_dropout=0.5)
    accelerated.set_requires_grad(["default", "other"])
    x, names = torch.randn(M, K), ["default", "other", "__base__"] * 2
    accelerated.train()
    with only_ours():
        outputs = [accelerated(x, adapter_names=names) for _ in range(2)]
    assert torch.equal(outputs[0][2] * 0, outputs[1][2] * 0)
    assert not torch.equal(outputs[0][0], outputs[1][0])
    outputs[0].sum().backward()
    assert len(grads(accelerated)) == 12
    for layer in layers(accelerated):
        layer.lora_dropout["other"] = nn.Dropout(0.25)
    accelerated(x, adapter_names=names)  # each adapter has its own mask: PEFT's code runs
    with pytest.raises(AssertionError, match="PEFT's own forward ran"), only_ours():
        accelerated(x, adapter_names=names)


def test_names_that_do_not_fit() -> None:
    plain, accelerated = pair("default", "other")
    x = torch.randn(M, K)
    for names, message in ((["default"] * 2, "Length of `adapter_names`"), (["nobody"] * M, "non-existing adapter")):
        for model in (plain, accelerated):
            with pytest.raises(ValueError, match=message):
                model(x, adapter_names=names)
    with only_ours():  # PEFT would not remove its hooks
        close(accelerated(x), pair("default", "other")[0](x))
    accelerated.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        accelerated(x, adapter_names=NAMES[:1] * M)


def test_generate_with_beams() -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    plain, accelerated = pair("default", "other", base=base, target_modules="all-linear", task_type="CAUSAL_LM")
    ids, names = torch.randint(3, 60, (3, 4)), ["other", "__base__", "default"]
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "adapter_names": names}
        expected = plain.generate(input_ids=ids, **options)
        with only_ours():
            assert torch.equal(accelerated.generate(input_ids=ids, **options), expected)


def test_threads_have_batches_of_their_own() -> None:
    plain, accelerated = pair("default", "other")
    x, failed = torch.randn(M, K), []
    batches = [["default", "other", "__base__"] * 2, ["__base__", "default", "other"] * 2]
    with torch.no_grad():
        expected = [plain(x, adapter_names=names) for names in batches]
    from peftk.interop import peft_batch

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                with peft_batch.share_batch(batches[number]):
                    y = x
                    y = accelerated.base_model.model.a(y, adapter_names=batches[number])
                    y = accelerated.base_model.model.b(torch.tanh(y), adapter_names=batches[number])
                    y = accelerated.base_model.model.c(torch.tanh(y), adapter_names=batches[number])
                if not torch.allclose(y, expected[number], atol=1e-5):
                    failed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# -- merging


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_cycles_restore_every_bit(dtype: torch.dtype) -> None:
    plain, model = pair("default", "other", "third", dtype=dtype, lora_bias=True, target_modules=["a", "b"])
    before, x = weights(model), torch.randn(M, K).to(dtype)
    expected = model(x)
    for cycle in range(6):
        model.merge_adapter(safe_merge=cycle % 2 == 1)
        assert [layer.merged_adapters for layer in layers(model)[:2]] == [["default"]] * 2
        with only_ours():
            torch.testing.assert_close(model(x), expected, atol=0.1, rtol=0.05)
        with pytest.warns(UserWarning, match="Already following adapters were merged"):
            model.merge_adapter(["third", "default", "other"])
        assert layers(model)[0].merged_adapters == ["default", "third", "other"]
        if cycle == 0:
            plain.merge_adapter(["default", "third", "other"])
            for ours, theirs in zip(weights(model), weights(plain), strict=True):
                near = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]  # PEFT rounds thrice
                torch.testing.assert_close(ours, theirs, atol=near, rtol=0)
        with torch.no_grad():
            layers(model)[0].lora_A["third"].weight.add_(1.0)  # receipts do not depend on it
        model.unmerge_adapter()
        assert not any(layer.merged for layer in layers(model))
        for now, then in zip(weights(model), before, strict=True):
            assert torch.equal(now, then)
    assert "_peftk_merged" not in "".join(model.state_dict())


def test_merged_copies_and_pickles_unmerge() -> None:
    _, model = pair()
    before = weights(model)
    model.merge_adapter()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), reloaded(model)):
        other.unmerge_adapter()
        for now, then in zip(weights(other), before, strict=True):
            assert torch.equal(now, then)
    with model.disable_adapter():
        model(torch.randn(M, K))  # PEFT unmerges if adapters are disabled
    for now, then in zip(weights(model), before, strict=True):
        assert torch.equal(now, then)


def reloaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_adapters_that_peft_merged_are_unmerged_by_peft() -> None:
    plain, _ = pair("default", "other")
    before = weights(plain)
    plain.merge_adapter(["default"])
    merged = weights(plain)
    accelerated = peftk.accelerate(plain)
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        accelerated.merge_adapter(["other"])
    accelerated.unmerge_adapter()
    for now, then in zip(weights(accelerated), before, strict=True):
        torch.testing.assert_close(now, then)  # PEFT's subtraction does not restore the bits
    assert not any(
        torch.equal(now, then) for now, then in zip(weights(accelerated), merged, strict=True) if now.dim() > 1
    )


def test_a_weight_that_changed_is_unmerged_by_subtraction() -> None:
    _, model = pair()
    before = weights(model)
    model.merge_adapter()
    model.to(torch.bfloat16).to(torch.float32)
    with pytest.warns(UserWarning, match="cannot be unmerged exactly"):
        model.unmerge_adapter()
    for now, then in zip(weights(model), before, strict=True):
        torch.testing.assert_close(now, then, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merge_that_is_not_finite_changes_nothing(safe_merge: bool) -> None:
    _, model = pair("default", "other", lora_bias=True, target_modules=["a", "b"])
    for where in ("weight", "bias"):
        layer = model.base_model.model.a
        tensor = getattr(layer.lora_B["other"], where)
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[0] = float("nan")
        before = weights(model)
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            layer.merge(safe_merge=safe_merge, adapter_names=["default", "other"])
        for now, then in zip(weights(model), before, strict=True):
            assert torch.equal(now, then)
        assert not layer.merged
        with torch.no_grad():
            tensor.copy_(kept)


def test_a_weight_that_cannot_be_written_is_not_reported_as_broken() -> None:
    _, model = pair()
    base = model.base_model.model.a.base_layer
    base.weight = nn.Parameter(torch.ones(1, K).expand(N, K), requires_grad=False)
    with pytest.raises(ValueError, match=r"^a: weight: expected elements that do not overlap, got strides \(0, 1\)"):
        model.merge_adapter()


def test_lora_bias_without_a_bias_in_the_base_layer() -> None:
    with pytest.warns(UserWarning, match="has no bias"):
        _, model = pair(lora_bias=True, target_modules=["c"], base=Two())
    before = weights(model)
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
        model.merge_adapter()
    assert all(torch.equal(now, then) for now, then in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(("kind", "safe_merge"), [("linear", False), ("linear", True), ("dora", True)])
def test_a_merge_that_one_layer_refuses_changes_no_layer(call: str, safe_merge: bool, kind: str) -> None:
    """DoRA layers stay PEFT's; they are restored from copies."""
    _, model = pair("default", "other", use_dora=kind == "dora", r=3)
    x = torch.randn(M, K)
    with torch.no_grad():
        model.base_model.model.c.lora_B["default"].weight[0, 0] = float("nan")
        model.set_adapter("other")
        before, y, was = weights(model), model(x), [*model.named_modules()]
        with pytest.raises(ValueError, match="NaNs detected"):
            getattr(model, call)(safe_merge=safe_merge, adapter_names=["other", "default"])
    assert [*model.named_modules()] == was
    assert all(torch.equal(now, then) for now, then in zip(weights(model), before, strict=True))
    assert not any(layer.merged for layer in layers(model))
    assert model.active_adapters == ["other"]
    assert torch.equal(model(x), y)
    if kind == "linear":
        with pytest.raises(ValueError, match=r"^c: NaNs detected in the merged weights"):
            model.merge_adapter(["default"])


def test_merge_and_unload() -> None:
    plain, accelerated = pair("default", "other")
    x = torch.randn(M, K)
    expected = plain(x)
    merged = accelerated.merge_and_unload()
    assert type(merged) is Two
    assert type(merged.a) is nn.Linear
    close(merged(x), expected, 4)


def test_decelerate() -> None:
    plain, model = pair("default", "other")
    x = torch.randn(M, K)
    model(x, adapter_names=NAMES[:1] * M)  # makes the layer cache a table
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"expected unmerged layers, got base_model\.model\.a with default merged"):
        peftk.decelerate(model)
    model.unmerge_adapter()
    assert peftk.decelerate(model) is model
    assert torch.equal(model(x), plain(x))
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert type(module) is type(other)
        assert module.__dict__.keys() == other.__dict__.keys()
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(x, adapter_names=NAMES)


# -- PEFT's operations on adapters


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "dare_linear"])
def test_add_weighted_adapter(combination: str) -> None:
    plain, accelerated = pair("default", "other", r=4)
    x, outputs = torch.randn(M, K), []
    for model in (plain, accelerated):
        torch.manual_seed(3)
        density = {"density": 0.5} if combination in ("ties", "dare_linear") else {}
        model.add_weighted_adapter(["default", "other"], [0.3, 0.6], "both", combination_type=combination, **density)
        model.set_adapter("both")
        outputs.append(model(x))
    close(outputs[1], outputs[0])


def test_checkpoints(tmp_path: pathlib.Path) -> None:
    plain, accelerated = pair()
    x = torch.randn(M, K)
    accelerated.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Two(), tmp_path).eval()
    close(again(x), plain(x))
    peftk.accelerate(again)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    with only_ours():
        close(again(x), plain(x))


def test_hotswap(tmp_path: pathlib.Path) -> None:
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other, _ = pair(r=5, lora_alpha=3)
    with torch.no_grad():
        for layer in layers(other):
            layer.lora_A["default"].weight.mul_(1.7)
    other.save_pretrained(tmp_path)
    plain, accelerated = pair()
    x = torch.randn(M, K)
    for model in (plain, accelerated):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    with only_ours():
        close(accelerated(x), plain(x))
    for model in (plain, accelerated):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert isinstance(layers(accelerated)[0].scaling["default"], Tensor)
    with only_ours():
        close(accelerated(x), plain(x))
        close(accelerated(x, adapter_names=["default"] * M), plain(x))
    close(plain(x), other(x))
    accelerated.merge_adapter()
    accelerated.unmerge_adapter()


# -- torch's features for modules


@pytest.mark.parametrize(
    "active", [["default"], pytest.param(["default", "other"], marks=pytest.mark.full)], ids=["one", "two"]
)
def test_compile_fullgraph(active: list[str]) -> None:
    plain, accelerated = pair("default", "other")
    x = torch.randn(M, K)
    compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")
    for model in (plain, accelerated):
        model.train().base_model.set_adapter(active)
    actual, expected = compiled(x), plain(x)
    close(actual, expected)
    actual.sum().backward()
    expected.sum().backward()
    same_gradients(plain, accelerated)


@pytest.mark.full
def test_compile_a_mixed_batch() -> None:
    plain, accelerated = pair("default", "other")
    x, names = torch.randn(M, K), [*NAMES[:5], "default"]
    layer = torch.compile(accelerated.base_model.model.a, fullgraph=True, backend="aot_eager")
    close(layer(x, adapter_names=names), plain.base_model.model.a(x, adapter_names=names))


@pytest.mark.full
def test_hotswap_does_not_compile_again(tmp_path: pathlib.Path) -> None:
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other, _ = pair(r=5, lora_alpha=3)
    other.save_pretrained(tmp_path)
    _, model = pair()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled, x = torch.compile(model), torch.randn(M, K)
    with torch.no_grad():
        compiled(x)
        hotswap_adapter(compiled, tmp_path, adapter_name="default")
        with torch.compiler.set_stance("fail_on_recompile"):
            close(compiled(x), other(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    plain, accelerated = pair(dtype=dtype)
    x = torch.randn(M, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(x)
        with only_ours():
            actual = accelerated(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    close(actual, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    _, accelerated = pair(lora_dropout=0.3)
    x = torch.randn(M, K, requires_grad=True)
    accelerated.train()
    found = []
    for mode in (None, reentrant):
        accelerated.base_model.model.reentrant = mode
        accelerated.zero_grad()
        torch.manual_seed(5)
        with only_ours():
            accelerated(x).sum().backward()
        found.append(grads(accelerated).copy())
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name  # masks included


def test_inference_mode_and_hooks_of_the_layer() -> None:
    plain, accelerated = pair()
    x, seen = torch.randn(M, K), []
    accelerated.base_model.model.a.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.inference_mode(), only_ours():
        y = accelerated(x)
    close(y, plain(x).detach())
    assert len(seen) == 1


# -- cases in which PEFT's code runs


def hook(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, y: y + 1)


def hook_of_the_adapter(layer: Any) -> None:
    layer.lora_A["default"].register_forward_hook(lambda module, args, y: y * 2)


def train_the_weight(layer: Any) -> None:
    layer.base_layer.weight.requires_grad_(True)


def replace_the_forward(layer: Any) -> None:
    linear = layer.base_layer
    linear.forward = lambda x: nn.functional.linear(x, linear.weight)


def different_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Hardtanh()


def weight_subclass(layer: Any) -> None:
    class Quantized(nn.Parameter):
        pass

    layer.base_layer.weight = Quantized(layer.base_layer.weight.detach(), requires_grad=False)


def parametrized(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer.base_layer)


def different_base_layer(layer: Any) -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    layer.base_layer.__class__ = Shifted


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "the base layer has hooks"),
        (hook_of_the_adapter, "lora_A, lora_B or lora_dropout have hooks"),
        (train_the_weight, "the base layer's weight trains"),
        (replace_the_forward, "the base layer has hooks or a forward of its own"),
        (different_dropout, "lora_dropout is a Hardtanh"),
        (weight_subclass, "the weight is a Quantized"),
        (parametrized, "ParametrizedLinear|weight is computed"),
        (different_base_layer, "the base layer is a Shifted"),
    ],
)
def test_unsupported_layers_run_pefts_code(change: Any, reason: str) -> None:
    plain, accelerated = pair(target_modules=["a"])
    for model in (plain, accelerated):
        change(model.base_model.model.a)
    x = torch.randn(M, K)
    assert torch.equal(accelerated(x), plain(x))
    choice = peftk.explain(accelerated.base_model.model.a, x)
    assert choice.backend == "peft"
    assert re.search(reason, choice.reason)
    accelerated.merge_adapter()
    accelerated.unmerge_adapter()


def test_float64_and_other_inputs_run_pefts_code() -> None:
    plain, accelerated = pair()
    plain.double(), accelerated.double()
    x = torch.randn(M, K, dtype=torch.float64)
    assert torch.equal(accelerated(x), plain(x))
    assert "float64" in str(peftk.explain(accelerated))
    for model in pair():
        with pytest.raises(RuntimeError, match="dtype"):
            model(x)
    plain, accelerated = pair()
    batch = torch.randn(3, M, K)
    vmapped = torch.func.vmap(accelerated.base_model.model.a)(batch)
    close(vmapped, plain.base_model.model.a(batch))


@pytest.mark.parametrize(
    "use", [{"use_dora": True}, {"init_lora_weights": True, "use_dora": True, "lora_dropout": 0.1}]
)
def test_dora_runs_pefts_code(use: dict[str, Any]) -> None:
    plain, accelerated = pair(**use)
    x = torch.randn(M, K)
    assert torch.equal(accelerated(x), plain(x))
    explanation = peftk.explain(accelerated)
    assert explanation.peftk == {}
    assert list(explanation.peft) == ["DoraLinearVariant is not plain LoRA"]
    before = weights(accelerated)
    for model in (plain, accelerated):
        model.merge_adapter()
    for ours, theirs in zip(weights(accelerated), weights(plain), strict=True):
        assert torch.equal(ours, theirs)
    with accelerated.disable_adapter(), plain.disable_adapter():  # this unmerges, and gives a Conv1D's W new storage
        torch.testing.assert_close(accelerated(x), plain(x))
    for now, then in zip(weights(accelerated), before, strict=True):
        torch.testing.assert_close(now, then)


def test_explain() -> None:
    plain, accelerated = pair("default", "other")
    assert peftk.explain(plain).peftk == {}
    assert list(peftk.explain(plain).peft) == ["not accelerated: lora.Linear"]
    explanation = peftk.explain(accelerated)
    assert explanation.peft == {}
    assert [name for names in explanation.peftk.values() for name in names] == [
        f"base_model.model.{name}" for name in "abc"
    ]
    assert "3 layers on peftk's kernels\n  3: cpu: C++ lora_linear kernels" in str(explanation)
    layer = accelerated.base_model.model.a
    assert peftk.explain(layer, torch.randn(M, K)).backend == "cpu"
    assert peftk.explain(layer, M=4, backend="reference").backend == "reference"


def test_multihead_attention_runs_pefts_code() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(K, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.mha(x, x, x)[0]

    plain, accelerated = pair(base=Attends(), target_modules=["mha"])
    x = torch.randn(2, 5, K)
    assert torch.equal(accelerated(x), plain(x))
    for model in (plain, accelerated):
        model(x).sum().backward()
    same_gradients(plain, accelerated)
    for model in (plain, accelerated):
        model.merge_adapter()
    assert torch.equal(accelerated(x), plain(x))
