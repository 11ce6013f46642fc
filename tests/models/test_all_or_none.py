"""Tests that operations on a model's layers change all layers or none: any call inside may fail."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk.checkpoints.peft import LoadedAdapter
from peftk.methods.inject import lora_layers
from tests.support.failures import ERRORS, OURS, count, differences, everything, failing
from tests.support.tiers import LONG

K = 12


def sweep(make: Callable[[], Any], act: Callable[[Any], object], folders: tuple[str, ...], places: int | None) -> None:
    """Lets `act` fail at `places` of its calls, evenly spread, or at each for None. Checks that nothing changed."""
    act(make())  # so that one-time work of the process is done
    model = make()
    total = count(lambda: act(model), folders)
    assert total > 3
    wrong, step = [], 1.0 if places is None else max(total / places, 1.0)
    for number in range(int(total / step)):
        model, error = make(), ERRORS[number % len(ERRORS)]
        before = everything(model)
        with failing(1 + int(number * step), error, folders) as calls, contextlib.suppress(error):
            act(model)
        assert calls.failed is not None
        changed = differences(before, everything(model))
        if changed:
            wrong.append(f"{calls.failed} failed, and left changed: {changed[:5]}")
    assert not wrong, "\n".join(wrong)


# ---- peftk's own ----------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, K)
        self.a, self.b, self.head = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(self.embedding(ids))))))


def injected(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Chain()
    peftk.inject(model, peftk.LoraConfig(**{"r": 2, "target_modules": ["a", "b"], "lora_bias": True, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_bias" in name:
                parameter.normal_()
    return model


def merged() -> nn.Module:
    model = injected()
    peftk.merge_adapter(model)
    return model


def half_merged() -> nn.Module:
    model = injected()
    model.a.merge()
    return model


def tied() -> nn.Module:
    return injected(target_modules=["a", "head"], lora_bias=False)


def untied() -> nn.Module:
    model = tied()
    peftk.merge_adapter(model, untie=True)
    return model


def others(model: nn.Module, r: int = 2) -> dict[str, LoadedAdapter]:
    torch.manual_seed(1)
    return {
        name: LoadedAdapter(
            torch.randn(r, layer.in_features),
            torch.randn(layer.out_features, r),
            float(r),
            False,
            None if layer.lora_bias is None else torch.randn(layer.out_features),
        )
        for name, layer in lora_layers(model)
    }


def within(model: nn.Module) -> None:
    with peftk.merged(model):
        pass


Operation = tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]
OURS_ONLY: dict[str, Operation] = {
    "merge": (injected, peftk.merge_adapter),
    "merge the others": (half_merged, peftk.merge_adapter),
    "merge and untie": (tied, lambda model: peftk.merge_adapter(model, untie=True)),
    "unmerge": (merged, peftk.unmerge_adapter),
    "switch": (merged, lambda model: peftk.switch_adapter(model, others(model))),
    "switch to a first": (injected, lambda model: peftk.switch_adapter(model, others(model))),
    "switch from some": (half_merged, lambda model: peftk.switch_adapter(model, others(model))),
    "switch and untie": (tied, lambda model: peftk.switch_adapter(model, others(model), untie=True)),
    "inject": (Chain, lambda model: peftk.inject(model, peftk.LoraConfig(r=2, target_modules=["a", "b"]))),
    "inject several": (
        Chain,
        lambda model: peftk.inject(
            model,
            [
                peftk.LoraConfig(r=2, target_modules=["a", "b"], bias="all"),
                peftk.SeriesAdapterConfig(bottleneck=2, where=["a"]),
                peftk.ParallelAdapterConfig(bottleneck=2, where=["b"]),
            ],
        ),
    ),
}


@pytest.mark.parametrize("places", [12, pytest.param(None, marks=LONG)])
@pytest.mark.parametrize("operation", OURS_ONLY)
def test_any_call_of_ours_fails(operation: str, places: int | None) -> None:
    make, act = OURS_ONLY[operation]
    sweep(make, act, (OURS,), places)


# ---- HF PEFT's, accelerated -----------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers that become ours when accelerated, and some that stay PEFT's."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embedding = nn.Embedding(9, K)
        self.a, self.b, self.head = nn.Linear(K, K), Conv1D(K, K), nn.Linear(K, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(self.embedding(ids))))))


def peft_model() -> Any:
    import peft

    torch.manual_seed(0)
    config = {
        "r": 2, "target_modules": ["a", "embedding", "b"], "modules_to_save": ["head"], "init_lora_weights": False,
    }  # fmt: skip
    model = peft.get_peft_model(Mixed(), peft.LoraConfig(**config))
    model.add_adapter("other", peft.LoraConfig(**config | {"r": 3, "modules_to_save": None}))
    return model


def accelerated() -> Any:
    return peftk.accelerate(peft_model())


def accelerated_and_merged() -> Any:
    """Merged twice: the adapter that is unmerged second was merged first."""
    model = accelerated()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    return model


def merged_by_peft() -> Any:
    model = peft_model()
    model.merge_adapter()
    return peftk.accelerate(model)


def partly_merged() -> Any:
    model = accelerated()
    model.base_model.model.b.merge()
    return model


def inner(name: str, *arguments: Any, **options: Any) -> Callable[[Any], object]:
    return lambda model: getattr(model.base_model, name)(*arguments, **options)


def add(model: Any) -> None:
    import peft

    model.base_model.inject_adapter(model.base_model.model, "other")
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False))


PEFTS: dict[str, Operation] = {
    "merge_adapter": (accelerated, inner("merge_adapter")),
    "merge_adapter, safe": (accelerated, inner("merge_adapter", ["other", "default"], safe_merge=True)),
    "merge_adapter of the rest": (partly_merged, inner("merge_adapter")),
    "merge_adapter of another": (merged_by_peft, inner("merge_adapter", ["other"])),
    "unmerge_adapter": (accelerated_and_merged, inner("unmerge_adapter")),
    "unmerge_adapter, PEFT's merge": (merged_by_peft, inner("unmerge_adapter")),
    "merge_and_unload": (accelerated, inner("merge_and_unload")),
    "merge_and_unload, safe": (accelerated, inner("merge_and_unload", safe_merge=True, adapter_names=["other"])),
    "merge_and_unload of what is merged": (accelerated_and_merged, inner("merge_and_unload")),
    "unload": (accelerated, inner("unload")),
    "set_adapter": (accelerated, inner("set_adapter", "other")),
    "delete_adapter": (accelerated, inner("delete_adapter", "default")),
    "add_weighted_adapter": (
        accelerated, inner("add_weighted_adapter", ["default", "other"], [0.5, 2.0], "sum", combination_type="cat")
    ),
    "accelerate": (peft_model, peftk.accelerate),
    "decelerate": (accelerated, peftk.decelerate),
}  # fmt: skip


@pytest.mark.parametrize("places", [8, pytest.param(None, marks=LONG)])
@pytest.mark.parametrize("operation", PEFTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_call_of_pefts_fails(operation: str, places: int | None) -> None:
    peft = pytest.importorskip("peft")
    make, act = PEFTS[operation]
    sweep(make, act, (OURS, str(pathlib.Path(peft.__file__).parent)), places)
