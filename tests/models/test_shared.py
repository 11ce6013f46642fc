"""Tests of weights that several modules share: a merge that would change another module is refused, or unties first."""

from __future__ import annotations

import copy
import io
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk.checkpoints.peft import LoadedAdapter
from peftk.methods.inject import lora_layers
from peftk.nn import shared
from peftk.system import memory
from tests.support import sharing
from tests.support.sharing import FINE, SHARING, Sharing
from tests.support.tiers import spread

pytest.importorskip("transformers")

# ---- which tensors overlap ------------------------------------------------------------------------------------------

W = torch.zeros(12, 8, dtype=torch.bfloat16)
PAIRS = {
    "itself": (W, W, True),
    "a view": (W, W[:4], True),
    "transposed": (W, W.t(), True),
    "halves of the columns": (W[:, :4], W[:, 4:], False),
    "a column in common": (W[:, :5], W[:, 4:], True),
    "halves of the rows": (W[:4], W[4:], False),
    "every other row": (W[::2], W[1::2], False),
    "a row in common": (W[::2], W[2:4], True),
    "another dtype": (W, W.view(torch.uint8)[3:5, 3:4], True),
    "high and low bytes": (W.view(torch.uint8)[:, 1::2], W.view(torch.uint8)[:, ::2], False),
    "a number": (W[0, 0], W[:, 0], True),
    "expanded": (W[:1].expand(5, 8), W[0], True),
    "no element": (W[:0], W, False),
    "a copy": (W, W.clone(), False),
}


@pytest.mark.parametrize(("first", "second", "overlap"), PAIRS.values(), ids=PAIRS)
def test_overlapping_tensors(first: Tensor, second: Tensor, overlap: bool) -> None:
    assert list(memory.overlapping([first, second])) == [(0, 1)] * overlap
    assert list(memory.overlapping([torch.zeros(3), second, torch.zeros(4), first])) == [(1, 3)] * overlap


@pytest.mark.parametrize("seed", spread(range(20), default=1, full=4))
def test_any_views_of_one_memory(seed: int) -> None:
    """Compared with the sets of their elements' addresses."""
    rng = random.Random(seed)
    memory_of_views = torch.arange(80)
    for _ in range(60):
        views, places = [], []
        for _ in range(4):
            shape, strides = ([rng.randint(1, 4) for _ in range(2)], [rng.choice((1, 2, 3, 5, 8)) for _ in range(2)])
            views.append(memory_of_views.as_strided(shape, strides, rng.randint(0, 20)))
            places.append(set(views[-1].flatten().tolist()))
        expected = [(i, j) for i, j in itertools.combinations(range(4), 2) if places[i] & places[j]]
        assert sorted(memory.overlapping(views)) == expected


def test_a_tensor_without_an_address_overlaps_only_itself() -> None:
    meta = torch.zeros(4, 4, device="meta")
    assert list(memory.overlapping([meta, torch.zeros(4, 4, device="meta"), meta])) == [(0, 2)]


def test_an_overlap_that_is_too_hard_to_decide_counts_as_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_hard(*arguments: Any, **options: Any) -> bool:
        raise np.exceptions.TooHardError

    monkeypatch.setattr(np, "shares_memory", too_hard)
    assert list(memory.overlapping([W[::2], W[1::2]])) == [(0, 1)]


# ---- peftk's merges -------------------------------------------------------------------------------------------------


def injected(make: Callable[[], nn.Module], targets: list[str], **options: Any) -> nn.Module:
    model = make()
    peftk.inject(model, peftk.LoraConfig(r=2, lora_alpha=4, target_modules=targets, **options))
    _random_adapters(model)
    return model


def _random_adapters(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def adapters(model: nn.Module) -> dict[str, LoadedAdapter]:
    return {
        name: LoadedAdapter(
            layer.lora_A.detach() * 2,
            layer.lora_B.detach() + 0.125,
            2.0,
            False,
            None if layer.lora_bias is None else layer.lora_bias.detach() + 1,
        )
        for name, layer in lora_layers(model)
    }


def _within(model: nn.Module, **untie: bool) -> None:
    with peftk.merged(model, **untie):
        pass


MERGES: dict[str, Callable[..., None]] = {
    "merge_adapter": peftk.merge_adapter,
    "merged": _within,
    "switch_adapter": lambda model, **untie: peftk.switch_adapter(model, adapters(model), **untie),
    "layer": lambda model, **untie: [layer.merge(**untie) for _, layer in lora_layers(model)],
}


def values(model: nn.Module) -> dict[str, Tensor]:
    """The bits of all Parameters and buffers."""
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name: tensor.detach().contiguous().view(torch.uint8).clone() for name, tensor in held}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def everything(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything that a merge could change: the Parameters' identities and bits, and the layers' own state."""
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    state: dict[str, tuple[Any, ...]] = {
        name: (id(held[name]), held[name].requires_grad, value) for name, value in values(model).items()
    }
    for name, layer in lora_layers(model):
        state[f"{name}()"] = (layer.receipt, layer.bias_receipt, layer.ties, layer.r, layer.scaling)
    return state


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def alike(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return one.keys() == other.keys() and all(
        all(alike(a, b) for a, b in zip(one[name], other[name], strict=True)) for name in one
    )


def refusal(case: Sharing) -> str:
    return f"{case.name}: expected one that no other module holds.*got one that is also ({'|'.join(case.others)})"


@pytest.mark.parametrize(
    ("case", "merge"), spread(itertools.product(SHARING, MERGES), default=24, full=24), ids=lambda value: value
)
def test_a_merge_into_a_weight_that_another_module_holds(case: str, merge: str) -> None:
    given = SHARING[case]
    model = injected(given.make, given.targets, **given.options)
    before, y = everything(model), sharing.run(model)
    name = "" if merge == "layer" else f"{given.layer}: "
    layer = model.get_submodule(given.layer)
    with torch.no_grad():
        with pytest.raises(ValueError, match=f"^{name}{refusal(given)}"):
            layer.merge() if merge == "layer" else MERGES[merge](model)
        assert same(everything(model), before)

        MERGES[merge](model, untie=True)
        if merge != "merged":
            assert layer.merged
            names = tuple(f"{name}." for name, _ in lora_layers(model))
            for path, value in values(model).items():
                assert path.startswith(names) or torch.equal(value, before[path][-1]), f"{path} has changed"
            if merge != "switch_adapter":
                torch.testing.assert_close(sharing.run(model), y, rtol=1e-4, atol=1e-4)
            peftk.unmerge_adapter(model)
    if merge != "switch_adapter":
        assert same(everything(model), before)  # shared again


@pytest.mark.parametrize("case", FINE)
def test_a_merge_in_a_model_with_shared_weights_elsewhere(case: str) -> None:
    make, targets = FINE[case]
    model = injected(make, targets)
    before, y = everything(model), sharing.run(model)
    with torch.no_grad():
        with peftk.merged(model):
            assert all(layer.merged for _, layer in lora_layers(model))
            torch.testing.assert_close(sharing.run(model), y, rtol=1e-4, atol=1e-4)
        for _, layer in lora_layers(model):
            layer.merge()
        torch.testing.assert_close(sharing.run(model), y, rtol=1e-4, atol=1e-4)
        peftk.unmerge_adapter(model)
    assert same(everything(model), before)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("travel", [copied, pickled])
def test_copies_know_what_they_share(travel: Callable[[nn.Module], nn.Module]) -> None:
    given = SHARING["one storage"] if travel is pickled else SHARING["one Parameter"]
    model = travel(injected(given.make, given.targets))
    layer = model.get_submodule(given.layer)
    with pytest.raises(ValueError, match=refusal(given)):
        layer.merge()
    before = values(model)
    peftk.merge_adapter(model, untie=True)
    model = travel(model)
    peftk.unmerge_adapter(model)
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()
    assert equal(values(model), before)


def test_a_weight_that_is_no_longer_shared_is_merged() -> None:
    given = SHARING["GPT-2"]
    for untie in (lambda model: model.lm_head, lambda model: model.transformer.wte):
        model = injected(given.make, given.targets)
        untie(model).weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        peftk.merge_adapter(model)
        peftk.unmerge_adapter(model)
        if untie(model) is model.lm_head:
            model.lm_head.merge()


def test_a_weight_that_was_shared_after_inject_is_refused() -> None:
    """By tie_weights()."""
    given = SHARING["GPT-2"]
    model = injected(given.make, given.targets)
    model.transformer.wte.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    peftk.merge_adapter(model)
    peftk.unmerge_adapter(model)
    model.tie_weights()
    with pytest.raises(ValueError, match=refusal(given)):
        peftk.merge_adapter(model)


def test_a_merge_that_fails_after_untying_shares_again() -> None:
    given = SHARING["one Parameter, both adapted"]
    model = injected(given.make, given.targets)
    before = everything(model)
    for _, layer in list(lora_layers(model))[1:]:
        layer.lora_B.data[0, 0] = float("nan")
        before = everything(model)
        for merge in (peftk.merge_adapter, lambda model, untie: model.b.merge(untie=untie)):
            with pytest.raises(ValueError, match="expected W"):
                merge(model, untie=True)
            after = everything(model)
            assert {name: one[0] for name, one in after.items()} == {name: one[0] for name, one in before.items()}
    assert model.a.weight is model.b.weight


def test_a_layer_does_not_go_back_to_a_shared_weight_that_changed_meanwhile() -> None:
    given = SHARING["one Parameter"]
    model = injected(given.make, given.targets)
    base = model.a.weight.detach().clone()
    peftk.merge_adapter(model, untie=True)
    model.b.weight.data += 1
    peftk.unmerge_adapter(model)
    assert torch.equal(model.a.weight, base)
    assert torch.equal(model.b.weight, base + 1)


def test_a_model_that_was_untied_is_saved_and_loaded(tmp_path: Any) -> None:
    given = SHARING["GPT-2"]
    model = injected(given.make, given.targets)
    y = sharing.run(model)
    peftk.merge_adapter(model, untie=True)
    model.config.tie_word_embeddings = False
    plain = given.make()
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "lora" not in name})
    torch.testing.assert_close(sharing.run(plain), y, rtol=1e-4, atol=1e-4)


# ---- HF PEFT's merges, accelerated ----------------------------------------------------------------------------------

PEFT_MERGES: dict[str, Callable[..., None]] = {
    "merge_adapter": lambda model, layer, **untie: model.merge_adapter(**untie),
    "merge_and_unload": lambda model, layer, **untie: model.merge_and_unload(**untie),
    "safe": lambda model, layer, **untie: model.merge_and_unload(safe_merge=True, **untie),
    "layer": lambda model, layer, **untie: layer.merge(**untie),
}


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("merge", PEFT_MERGES)
def test_pefts_merge_into_a_module_that_is_used_in_two_places(merge: str, untie: bool) -> None:
    """PEFT adapts it in one place. In the other it is the base layer itself, so a copy of its weight does not help."""
    peft = pytest.importorskip("peft")
    given = SHARING["one of two places"]
    model = peftk.accelerate(
        peft.get_peft_model(given.make(), peft.LoraConfig(target_modules=["a"], init_lora_weights=False))
    )
    base = model.base_model.model
    before, was = values(base), dict(base.named_modules())
    with pytest.raises(
        ValueError, match=r"weight: expected that of a module used in one place of the model, got one that is"
    ):
        PEFT_MERGES[merge](model, base.a, untie=untie)
    assert dict(base.named_modules()) == was
    assert not base.a.merged
    assert equal(values(base), before)


@pytest.mark.parametrize(
    ("case", "merge"),
    spread(itertools.product(sorted({*SHARING} - {"one of two places"}), PEFT_MERGES), default=16, full=16),
    ids=lambda value: value,
)
@pytest.mark.filterwarnings("ignore:Model with `tie_word", "ignore:Input and output", "ignore:fan_in_fan_out")
def test_pefts_merge_into_a_weight_that_another_module_holds(case: str, merge: str) -> None:
    peft = pytest.importorskip("peft")
    given = SHARING[case]
    config = peft.LoraConfig(target_modules=given.targets, init_lora_weights=False, **given.options)
    torch.manual_seed(0)
    model = peftk.accelerate(peft.get_peft_model(given.make(), config))
    base = model.base_model.model
    layer = base.get_submodule(given.layer)
    before, y, was = values(base), sharing.run(base), dict(base.named_modules())
    name = "" if merge == "layer" else f"{given.layer}: "
    with torch.no_grad():
        with pytest.raises(ValueError, match=f"^{name}{refusal(given).replace('.weight', '.*weight')}"):
            PEFT_MERGES[merge](model, layer)
        assert dict(base.named_modules()) == was
        assert not any(module.merged for module in base.modules() if hasattr(module, "merged_adapters"))
        assert equal(values(base), before)

        PEFT_MERGES[merge](model, layer, untie=True)
        if merge != "layer":
            torch.testing.assert_close(sharing.run(base), y, rtol=1e-4, atol=1e-4)
        if merge in ("merge_adapter", "layer"):
            model.unmerge_adapter()
            assert equal(values(base), before)
            with pytest.raises(ValueError, match=refusal(given).replace(".weight", ".*weight")):
                model.merge_adapter()  # shared again


def test_an_unmerge_that_fails_once_it_has_shared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged model keeps its copy: sharing again is undone."""
    peft = pytest.importorskip("peft")
    case = next(name for name in sorted(SHARING) if name != "one of two places" and not SHARING[name].options)
    given = SHARING[case]
    config = peft.LoraConfig(target_modules=given.targets, init_lora_weights=False)
    model = peftk.accelerate(peft.get_peft_model(given.make(), config))
    base = model.base_model.model
    model.merge_adapter(untie=True)
    merged = {name: (id(p), p.detach().clone()) for name, p in base.named_parameters(remove_duplicate=False)}
    retie = shared.retie

    def fail(tie: shared.Tie) -> None:
        retie(tie)
        raise RuntimeError("in between")

    monkeypatch.setattr(shared, "retie", fail)
    with pytest.raises(RuntimeError, match="in between"):
        model.unmerge_adapter()
    now = {name: (id(p), p.detach()) for name, p in base.named_parameters(remove_duplicate=False)}
    assert {name: one for name, (one, _) in now.items()} == {name: one for name, (one, _) in merged.items()}
    assert all(torch.equal(value, merged[name][1]) for name, (_, value) in now.items())
    monkeypatch.undo()
    model.unmerge_adapter()
