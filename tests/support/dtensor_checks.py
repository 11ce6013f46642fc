"""Every public function with a DTensor in each place: it computes, or says what it expected; the process lives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

import peftk
from peftk import functional as F
from peftk.system.sharded import is_sharded

K, N, R, M = 16, 16, 3, 4


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (M, K), "weight": (N, K), "bias": (N,), "A": (R, K), "B": (N, R), "a": (R,), "beta": (N,)}
    found = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {**found, "ids": torch.tensor([0, -1, 0, 0]), "seed": torch.tensor([3])}


def bank(**of: Tensor) -> peftk.AdapterBank:
    found = peftk.AdapterBank(K, N, 2, torch.float32, "cpu")
    t = tensors() | of
    found.add("a", t["A"], t["B"], 1.0, activation="relu", bias_A=t["a"], bias_B=t["beta"])
    return found


def merged(weight: Tensor) -> tuple[Tensor, Any]:
    """A merged weight, of the kind of `weight`, and its receipt."""
    t = tensors()
    receipt = F.merge_(t["weight"], t["A"], t["B"], 1.0)
    kind: Any = weight
    return distribute_tensor(t["weight"], kind.device_mesh, [Replicate()]) if is_sharded(kind) else t["weight"], receipt


def layer(of: dict[str, Tensor]) -> peftk.LoRALinear:
    found = peftk.LoRALinear.from_linear(nn.Linear(K, N), r=R)
    for name, key in (("weight", "weight"), ("bias", "bias"), ("lora_A", "A"), ("lora_B", "B")):
        found._parameters[name] = nn.Parameter(of[key], requires_grad=name.startswith("lora"))
    return found


def multi(of: dict[str, Tensor], *, trainable: bool) -> peftk.MultiLoRALinear:
    found = peftk.MultiLoRALinear.from_linear(nn.Linear(K, N), max_adapters=2)
    found.add_adapter("a", tensors()["A"], tensors()["B"], trainable=trainable)
    found._parameters["weight"] = nn.Parameter(of["weight"], requires_grad=False)
    if trainable:
        found.trained["slot0"]._parameters["lora_A"] = nn.Parameter(of["A"])
    return found


CALLS: dict[str, tuple[Sequence[str], Callable[[dict[str, Tensor]], Any]]] = {
    "lora_linear": (
        ("x", "weight", "bias", "A", "B", "a", "beta"),
        lambda t: F.lora_linear(
            t["x"], t["weight"], t["bias"], t["A"], t["B"], 1.0, activation="relu", bias_A=t["a"], bias_B=t["beta"]
        ),
    ),
    "lora_linear with dropout": (
        ("x", "seed"),
        lambda t: F.lora_linear(t["x"], t["weight"], None, t["A"], t["B"], 1.0, dropout_p=0.5, seed=t["seed"]),
    ),
    "adapter_block": (("x", "A", "B", "a"), lambda t: F.adapter_block(t["x"], t["A"], t["B"], bias_A=t["a"])),
    "multi_lora_linear": (
        ("x", "weight", "bias", "ids"),
        lambda t: F.multi_lora_linear(t["x"], t["weight"], t["bias"], bank(), t["ids"]),
    ),
    "multi_adapter_block": (("x", "ids"), lambda t: F.multi_adapter_block(t["x"], bank(), t["ids"])),
    "packed": (
        ("x", "weight", "ids"),
        lambda t: F.multi_lora_linear(
            t["x"], torch.cat([t["weight"]] * 2), None, peftk.PackedBank([bank(), bank()]), t["ids"]
        ),
    ),
    "bank.add": (("A", "B", "a", "beta"), lambda t: bank(**{name: t[name] for name in ("A", "B", "a", "beta")})),
    "bank.slots_of": (("ids",), lambda t: bank().slots_of(t["ids"])),
    "merge_": (("weight", "A", "B"), lambda t: F.merge_(t["weight"], t["A"], t["B"], 1.0)),
    "merge_layers_": (("weight", "A", "B"), lambda t: F.merge_layers_([t["weight"]], [t["A"]], [t["B"]], [1.0])),
    "remerge_": (("weight", "A", "B"), lambda t: F.remerge_(*merged(t["weight"]), t["A"], t["B"], 1.0)),
    "remerge_layers_": (
        ("weight", "A", "B"),
        lambda t: F.remerge_layers_([t["weight"]], [None], [t["A"]], [t["B"]], [1.0]),
    ),
    "unmerge_": (("weight",), lambda t: F.unmerge_(*merged(t["weight"]))),
    "unmerge_layers_": (("weight",), lambda t: F.unmerge_layers_(*([part] for part in merged(t["weight"])))),
    "LoRALinear": (("x", "weight", "bias", "A", "B"), lambda t: layer(t)(t["x"])),
    "LoRALinear.merge": (("weight", "A", "B"), lambda t: layer(t).merge()),
    "LoRALinear.base": (("weight",), lambda t: layer(t).base("weight")),
    "from_linear": (("weight",), lambda t: peftk.LoRALinear(t["weight"], None, r=R, lora_alpha=1)),
    "MultiLoRALinear": (("x", "weight", "ids"), lambda t: multi(t, trainable=False)(t["x"], t["ids"])),
    "MultiLoRALinear that trains": (("x", "A", "ids"), lambda t: multi(t, trainable=True)(t["x"], t["ids"])),
    "add_adapter": (
        ("A", "B", "beta"),
        lambda t: multi(tensors(), trainable=False).add_adapter("b", t["A"], t["B"], bias=t["beta"]),
    ),
    "add_adapter that trains": (
        ("A", "B", "beta"),
        lambda t: multi(tensors(), trainable=False).add_adapter("b", t["A"], t["B"], bias=t["beta"], trainable=True),
    ),
    "explain": (("weight", "A"), lambda t: str(peftk.explain(layer(t)))),
    "count_parameters": (("weight", "A"), lambda t: str(peftk.count_parameters(layer(t)))),
    "merge_adapter": (("weight", "A"), lambda t: peftk.merge_adapter(nn.Sequential(layer(t)))),
    "torch.ops": (
        ("x", "weight", "A"),
        lambda t: torch.ops.peftk.lora_linear(
            t["x"], t["weight"], None, t["A"], t["B"], 1.0, "identity", None, None, 0.0, None, None
        ),
    ),
    "compiled": (
        ("weight",),
        lambda t: torch.compile(layer(t), backend="eager")(t["x"]),
    ),
}


def check_dtensors_in_every_place(mesh: DeviceMesh) -> None:
    """One argument at a time, and all: an error that says what was expected, or the right result."""

    def sharded(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Replicate()])

    for what, (places, call) in CALLS.items():
        plain = call(tensors())
        for chosen in [*((place,) for place in places), tuple(places)]:
            for grad in (False, True):
                given = {name: sharded(t) if name in chosen else t for name, t in tensors().items()}
                found, error = None, None
                try:
                    with torch.set_grad_enabled(grad):
                        found = call(given)
                except (TypeError, ValueError, RuntimeError) as raised:
                    error = str(raised)
                said = error is None or any(word in error for word in ("expected", "DTensor", "sharding strategy"))
                assert said, f"{what} {chosen}: {error}"
                if isinstance(found, Tensor) and isinstance(plain, Tensor):
                    whole: Any = found.full_tensor() if hasattr(found, "full_tensor") else found
                    assert torch.allclose(whole, plain, atol=1e-4), f"{what} {chosen}"
