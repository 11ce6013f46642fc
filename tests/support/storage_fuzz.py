"""Passes tensors of every kind of storage at every position to every public entry point.

    python -m tests.support.storage_fuzz NUMBER …      runs these cases

It runs in a child process (tests/system/test_storage.py), since a case that reads wrong memory may crash. It prints the
number of a case before running it, and the outcome after it: right (the values of plain torch), refused (an error that
says what was expected), unmade (there is no such tensor), or what is wrong.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import peftk
from peftk import functional
from peftk.adapters.bank import AdapterBank, PackedBank
from peftk.checkpoints.peft import LoadedAdapter
from peftk.nn import BitFitLinear, ParallelAdapter, ParallelAdapterLinear, SeriesAdapter
from tests.support.storage_kinds import KINDS

M, N, K, R, S = 3, 8, 8, 2, 0.5
Tensors = Mapping[str, Any]


class Way(NamedTuple):
    """An entry point: the tensors it takes, what it does with them, and the expected result in plain torch."""

    positions: tuple[str, ...]
    run: Callable[[dict[str, Any]], Any]
    expected: Callable[[dict[str, Tensor | None]], Tensor | None]
    modes: tuple[str, ...] = ("no_grad", "inference", "grad")
    others: bool = False  # whether torch's or PEFT's own code handles some kinds, and raises its own errors


def given() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "x": (M, K), "weight": (N, K), "bias": (N,), "lora_A": (R, K), "lora_B": (N, R), "bias_A": (R,), "bias_B": (N,),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {**tensors, "ids": torch.tensor([0, -1, 1]), "seed": torch.tensor([7])}


def formula(t: Mapping[str, Tensor | None], activation: str = "identity", ids: Tensor | None = None) -> Tensor:
    x, weight = t["x"].double(), t.get("weight")
    y = x if weight is None else x @ weight.double().t()
    if t.get("bias") is not None:
        y = y + t["bias"].double()
    term = torch.zeros(())
    if t.get("lora_A") is not None:
        z = x @ t["lora_A"].double().t()
        z = z if t.get("bias_A") is None else z + t["bias_A"].double()
        term = S * (z.relu() if activation == "relu" else z) @ t["lora_B"].double().t()
    term = term if t.get("bias_B") is None else term + t["bias_B"].double()
    return y + term if ids is None else y + torch.where((ids == 0)[:, None], term, 0.0)


def put(module: nn.Module, t: Tensors, *names: str) -> None:
    """Sets tensors past every check, as offloading, quantizing in place and functional_call do."""
    for name in names:
        if not isinstance(t[name], Tensor | None):
            raise TypeError(f"{name}: expected a tensor, as a Module does")
        module._parameters[name] = t[name]


def put_parameters(module: nn.Module, t: Tensors, *names: str) -> None:
    """Sets tensors as Parameters, as in a model."""
    put(module, {name: t[name] if t[name] is None else parameter(t[name]) for name in names}, *names)


def parameter(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter):
        return tensor
    try:
        return nn.Parameter(tensor, requires_grad=False)
    except (RuntimeError, TypeError):  # some kinds cannot be Parameters
        return tensor


FACTORS = ("lora_A", "lora_B", "bias_A", "bias_B")


def linear(t: Tensors) -> nn.Linear:
    layer = nn.Linear(K, N)
    put_parameters(layer, t, "weight", "bias")
    return layer


def new_linear() -> nn.Linear:
    return nn.Linear(K, N).requires_grad_(False)


def lora_made(t: Tensors) -> Tensor:
    layer = peftk.LoRALinear.from_linear(linear(t), r=R, lora_alpha=S * R)
    put(layer, t, "lora_A", "lora_B")
    return layer(t["x"])


def lora_replaced(t: Tensors) -> Tensor:
    layer = peftk.LoRALinear.from_linear(new_linear(), r=R, lora_alpha=S * R, lora_bias=True)
    put(layer, t, "weight", "bias", "lora_A", "lora_B")
    put(layer, {"lora_bias": t["bias_B"]}, "lora_bias")
    return layer(t["x"])


def lora_merged(t: Tensors) -> Tensor:
    layer = peftk.LoRALinear.from_linear(new_linear(), r=R, lora_alpha=S * R)
    layer.merge()
    put(layer, t, "weight", "bias")
    return layer(t["x"])


def lora_merge(t: Tensors) -> Tensor:
    layer = peftk.LoRALinear.from_linear(new_linear(), r=R, lora_alpha=S * R)
    put(layer, t, "weight", "lora_A", "lora_B")
    layer.merge()
    layer.unmerge()
    return layer.weight


def lora_unmerge(t: Tensors) -> Tensor:
    layer = peftk.LoRALinear.from_linear(new_linear(), r=R, lora_alpha=S * R)
    layer.merge()
    put(layer, t, "weight")
    layer.unmerge()
    return layer.weight


def multi_replaced(t: Tensors) -> Tensor:
    layer = peftk.MultiLoRALinear.from_linear(new_linear(), max_adapters=2)
    add(layer, given(), trainable=True)
    put(layer, t, "weight", "bias")
    put(layer.trained["slot0"], t, *FACTORS)
    layer.add_adapter("other", None, None)
    return layer(t["x"], t["ids"])


def multi_served(t: Tensors) -> Tensor:
    layer = peftk.MultiLoRALinear.from_linear(linear(t), max_adapters=2)
    add(layer, t)
    layer.add_adapter("other", None, None)
    return layer(t["x"], t["ids"])


def multi_trained(t: Tensors) -> Tensor:
    layer = peftk.MultiLoRALinear.from_linear(linear(t), max_adapters=2)
    add(layer, t, trainable=True)
    layer.add_adapter("other", None, None)
    return layer(t["x"], t["ids"])


def add(layer: peftk.MultiLoRALinear, t: Tensors, **kwargs: Any) -> None:
    layer.add_adapter("one", t["lora_A"], t["lora_B"], S, bias=t["bias_B"], bias_A=t["bias_A"], **kwargs)


def bank(t: Tensors) -> AdapterBank:
    made = AdapterBank(K, N, 2, torch.float32, "cpu")
    made.add("one", t["lora_A"], t["lora_B"], S, bias_A=t["bias_A"], bias_B=t["bias_B"])
    made.add("other", None, None, 1.0)
    return made


def packed(t: Tensors) -> Tensor:
    first, second = bank(t), bank(given())
    second.remove("one")
    second.add("one", None, None, 1.0)
    weight, bias = torch.cat([given()["weight"]] * 2), torch.cat([given()["bias"]] * 2)
    return functional.multi_lora_linear(t["x"], weight, bias, PackedBank([first, second]), t["ids"])[..., :N]


def bitfit(t: Tensors) -> Tensor:
    layer = BitFitLinear.from_linear(new_linear())
    put(layer, t, "weight", "bias")
    return layer(t["x"])


def bitfit_made(t: Tensors) -> Tensor:
    return BitFitLinear.from_linear(linear(t))(t["x"])


def series(t: Tensors) -> Tensor:
    layer = SeriesAdapter(K, R, scaling=S)
    put(layer, t, *FACTORS)
    return layer(t["x"])


def parallel(t: Tensors) -> Tensor:
    layer = ParallelAdapter(K, R, scaling=S)
    put(layer, t, *FACTORS)
    return t["x"] + layer(t["x"])


def parallel_linear(t: Tensors) -> Tensor:
    layer = ParallelAdapterLinear.from_linear(new_linear(), bottleneck=R, scaling=S)
    put(layer, t, "weight", "bias", *FACTORS)
    return layer(t["x"])


def injected(t: Tensors) -> Tensor:
    model = nn.Sequential(linear(t))
    peftk.inject(model, peftk.LoraConfig(r=R, lora_alpha=S * R, target_modules=["0"]))
    put_parameters(model[0], t, "lora_A", "lora_B")
    return model(t["x"])


def injected_model() -> nn.Sequential:
    model = nn.Sequential(new_linear(), nn.Linear(N, N))
    peftk.inject(model, peftk.LoraConfig(r=R, lora_alpha=S * R, target_modules=["0", "1"]))
    return model


def saved(t: Tensors) -> Tensor:
    model = injected_model()
    put_parameters(model[0], t, "lora_A", "lora_B")
    other = injected_model()
    with tempfile.TemporaryDirectory() as folder:
        peftk.save_adapter(model, folder)
        peftk.load_adapter(other, folder)
    return other[0].lora_B @ other[0].lora_A


def loaded(t: Tensors) -> Tensor:
    model, other = injected_model(), injected_model()
    put_parameters(other[0], given(), "lora_A", "lora_B")
    put_parameters(model[0], t, "weight", "lora_A", "lora_B")
    with tempfile.TemporaryDirectory() as folder:
        peftk.save_adapter(other, folder)
        peftk.load_adapter(model, folder)
    return model[0].lora_B @ model[0].lora_A


def all_merged(t: Tensors) -> Tensor:
    model = injected_model()
    put_parameters(model[1], t, "weight", "lora_A", "lora_B")
    before = model[0].weight.clone()
    try:
        peftk.merge_adapter(model)
    except Exception:
        assert torch.equal(model[0].weight, before), "the first layer has changed"
        raise
    peftk.unmerge_adapter(model)
    return model[1].weight


def switched(t: Tensors) -> Tensor:
    model = injected_model()
    put_parameters(model[0], t, "weight")
    one = LoadedAdapter(t["lora_A"], t["lora_B"], S, S * R, False)
    other = LoadedAdapter(given()["lora_A"], given()["lora_B"], S, S * R, False)
    peftk.switch_adapter(model, {"0": one, "1": other})
    peftk.unmerge_adapter(model)
    return model[0].weight


def combined(t: Tensors) -> Tensor:
    one = LoadedAdapter(t["lora_A"], t["lora_B"], S, S * R, False)
    made = peftk.combine([one, one], [0.5, 0.5], "cat")
    return made.lora_B @ made.lora_A


def peft_linear(t: Tensors, *, lora_bias: bool = True) -> Any:
    import peft

    model = nn.Sequential(new_linear())
    config = peft.LoraConfig(r=R, lora_alpha=S * R, target_modules=["0"], lora_bias=lora_bias, init_lora_weights=False)
    accelerated = peftk.accelerate(peft.get_peft_model(model, config))
    layer = accelerated.base_model.model[0]
    put(layer.base_layer, t, "weight", "bias")
    put(layer.lora_A["default"], {"weight": t["lora_A"]}, "weight")
    put(layer.lora_B["default"], {"weight": t["lora_B"], "bias": t["bias_B"] if lora_bias else None}, "weight", "bias")
    return accelerated, layer


def accelerated(t: Tensors) -> Tensor:
    return peft_linear(t)[0](t["x"])


def accelerated_mixed(t: Tensors) -> Tensor:
    model, _ = peft_linear(t)
    model.eval()
    return model(t["x"], adapter_names=["default", "__base__", "__base__"])


def accelerated_merge(t: Tensors) -> Tensor:
    model, layer = peft_linear(t, lora_bias=False)
    model.merge_adapter()
    return layer.base_layer.weight


def routed(t: Tensors) -> Tensor:
    import json

    from safetensors.torch import save_file

    model = nn.Sequential(linear(t))
    server = peftk.MultiAdapter(model, max_adapters=2)
    with tempfile.TemporaryDirectory() as folder:
        config = {"peft_type": "LORA", "r": R, "lora_alpha": S * R, "target_modules": ["0"], "bias": "none"}
        Path(folder, "adapter_config.json").write_text(json.dumps(config))
        tensors = {f"base_model.model.0.lora_{x}.weight": given()[f"lora_{x}"] for x in "AB"}
        save_file(tensors, Path(folder, "adapter_model.safetensors"))
        server.load("one", folder)
    with server.route(t["ids"].clamp(max=0) if type(t["ids"]) is Tensor else t["ids"]):
        return model(t["x"])


def merged(t: Tensors) -> Tensor:
    functional.merge_(t["weight"], t["lora_A"], t["lora_B"], S)
    return t["weight"]


def merged_layers(t: Tensors) -> Tensor:
    first = given()
    before = first["weight"].clone()
    try:
        receipts = functional.merge_layers_(
            [first["weight"], t["weight"]], [first["lora_A"], t["lora_A"]], [first["lora_B"], t["lora_B"]], S
        )
    except Exception:
        assert torch.equal(first["weight"], before), "the first layer has changed"
        raise
    functional.unmerge_layers_([first["weight"], t["weight"]], receipts)
    return t["weight"]


def remerged(t: Tensors) -> Tensor:
    plain = given()
    receipt = functional.merge_(plain["weight"], plain["lora_A"], plain["lora_B"], S)
    functional.remerge_(plain["weight"], receipt, t["lora_A"], t["lora_B"], S)
    return plain["weight"]


RECEIPT = ("receipt_A", "receipt_B", "code", "far", "raw_values")


def unmerged(t: Tensors) -> Tensor:
    weight = given()["weight"]
    receipt = functional.merge_(weight, given()["lora_A"], given()["lora_B"], S)
    parts = {name: t.get(name, getattr(receipt, name)) for name in RECEIPT[2:]}
    factors = receipt.factors._replace(
        lora_A=t.get("receipt_A", receipt.factors.lora_A), lora_B=t.get("receipt_B", receipt.factors.lora_B)
    )
    functional.unmerge_(weight, functional.MergeReceipt(factors, **parts, checksum=receipt.checksum))
    return weight


def unmerge_another(t: Tensors) -> Tensor:
    weight = given()["weight"]
    receipt = functional.merge_(weight, given()["lora_A"], given()["lora_B"], S)
    functional.unmerge_(t["weight"], receipt)
    return t["weight"]


def bare(t: Tensors, **kwargs: Any) -> Tensor:
    rest = (t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"], S)
    return functional.lora_linear(*rest, activation="relu", bias_A=t["bias_A"], bias_B=t["bias_B"], **kwargs)


def bare_many(t: Tensors) -> Tensor:
    return functional.multi_lora_linear(t["x"], t["weight"], t["bias"], bank(t), t["ids"])


def bare_block(t: Tensors) -> Tensor:
    return functional.adapter_block(
        t["x"], t["lora_A"], t["lora_B"], S, activation="relu", bias_A=t["bias_A"], bias_B=t["bias_B"]
    )


def without(t: Mapping[str, Tensor | None], *names: str) -> dict[str, Tensor | None]:
    return {name: tensor for name, tensor in t.items() if name not in names}


def by_row(t: Mapping[str, Tensor | None]) -> Tensor:
    return formula(t, ids=t["ids"])


LINEAR, LORA = ("x", "weight", "bias"), ("x", "weight", "bias", "lora_A", "lora_B")
ONCE = ("no_grad",)


def delta(t: Mapping[str, Tensor | None]) -> Tensor:
    return t["lora_B"].double() @ t["lora_A"].double()


def after_merge(t: Mapping[str, Tensor | None]) -> Tensor:
    return t["weight"].double() + S * delta(t)


WAYS: dict[str, Way] = {
    "lora_linear": Way((*LORA, "bias_A", "bias_B"), bare, lambda t: formula(t, "relu")),
    "lora_linear dropout": Way((*LORA, "seed"), lambda t: bare(t, dropout_p=0.5, seed=t["seed"]), lambda t: None),
    "adapter_block": Way(("x", *FACTORS), bare_block, lambda t: formula(without(t, "weight", "bias"), "relu")),
    "multi_lora_linear": Way((*LINEAR, *FACTORS, "ids"), bare_many, by_row),
    "multi_adapter_block": Way(
        ("x", *FACTORS, "ids"),
        lambda t: functional.multi_adapter_block(t["x"], bank(t), t["ids"]),
        lambda t: by_row(without(t, "weight", "bias")),
    ),
    "packed bank": Way(("x", *FACTORS, "ids"), packed, by_row),
    "LoRALinear made": Way(LORA, lora_made, lambda t: formula(without(t, "bias_A", "bias_B"))),
    "LoRALinear replaced": Way(
        (*LORA, "bias_B"),
        lora_replaced,
        lambda t: formula({**without(t, "bias_A"), "bias_B": None if t["bias_B"] is None else S * t["bias_B"]}),
    ),
    "LoRALinear merged": Way(LINEAR, lora_merged, lambda t: formula({name: t[name] for name in LINEAR})),
    "LoRALinear.merge": Way(("weight", "lora_A", "lora_B"), lora_merge, lambda t: t["weight"], ONCE),
    "LoRALinear.unmerge": Way(("weight",), lora_unmerge, lambda t: None, ONCE),
    "MultiLoRALinear replaced": Way((*LINEAR, *FACTORS, "ids"), multi_replaced, by_row),
    "MultiLoRALinear served": Way((*LINEAR, *FACTORS, "ids"), multi_served, by_row),
    "MultiLoRALinear trained": Way((*LINEAR, *FACTORS, "ids"), multi_trained, by_row),
    "BitFitLinear": Way(LINEAR, bitfit, lambda t: formula({name: t[name] for name in LINEAR})),
    "BitFitLinear made": Way(LINEAR, bitfit_made, lambda t: formula({name: t[name] for name in LINEAR})),
    "SeriesAdapter": Way(("x", *FACTORS), series, lambda t: formula(without(t, "weight", "bias"), "relu")),
    "ParallelAdapter": Way(
        ("x", *FACTORS), parallel, lambda t: formula(without(t, "weight", "bias"), "relu"), others=True
    ),
    "ParallelAdapterLinear": Way((*LINEAR, *FACTORS), parallel_linear, lambda t: formula(t, "relu")),
    "inject": Way(LORA, injected, lambda t: formula(without(t, "bias_A", "bias_B"))),
    "save_adapter": Way(("lora_A", "lora_B"), saved, delta, ONCE),
    "load_adapter": Way(("lora_A", "lora_B"), loaded, lambda t: delta(given()), ONCE),
    "merge_adapter": Way(("weight", "lora_A", "lora_B"), all_merged, lambda t: t["weight"], ONCE),
    "switch_adapter": Way(("weight", "lora_A", "lora_B"), switched, lambda t: t["weight"], ONCE),
    "combine": Way(("lora_A", "lora_B"), combined, lambda t: S * delta(t), ONCE),
    "accelerate": Way(
        (*LORA, "bias_B"),
        accelerated,
        lambda t: formula({**without(t, "bias_A"), "bias_B": None if t["bias_B"] is None else S * t["bias_B"]}),
        others=True,
    ),
    "accelerate mixed": Way(
        (*LORA, "bias_B"),
        accelerated_mixed,
        lambda t: formula(
            {**without(t, "bias_A"), "bias_B": None if t["bias_B"] is None else S * t["bias_B"]},
            ids=torch.tensor([0, -1, -1]),
        ),
        others=True,
    ),
    "accelerate merge": Way(("weight", "lora_A", "lora_B"), accelerated_merge, after_merge, ONCE, True),
    "MultiAdapter": Way(
        (*LINEAR, "ids"),
        routed,
        lambda t: formula({**without(t, "bias_A", "bias_B"), **_plain_factors()}, ids=t["ids"].clamp(max=0)),
    ),
    "merge_": Way(("weight", "lora_A", "lora_B"), merged, after_merge, ONCE),
    "merge_layers_": Way(("weight", "lora_A", "lora_B"), merged_layers, lambda t: t["weight"], ONCE),
    "remerge_": Way(("lora_A", "lora_B"), remerged, lambda t: given()["weight"].double() + S * delta(t), ONCE),
    "unmerge_": Way(RECEIPT, unmerged, lambda t: given()["weight"], ONCE),
    "unmerge_ another": Way(("weight",), unmerge_another, lambda t: None, ONCE),
}


def _plain_factors() -> dict[str, Tensor]:
    return {name: given()[name] for name in ("lora_A", "lora_B")}


class Case(NamedTuple):
    way: str
    position: str
    kind: str
    mode: str


CASES = [
    Case(way, position, kind, mode)
    for way, found in WAYS.items()
    for position, kind, mode in itertools.product(found.positions, KINDS, found.modes)
    if (position, kind) != ("ids", "None")  # a layer without ids is the base layer
]


def outcome(case: Case) -> str:
    """Runs a case: "right", "refused", "unmade", or what is wrong."""
    way, tensors = WAYS[case.way], given()
    plain = _part_of_a_receipt(case.position) if case.position in RECEIPT else tensors[case.position]
    try:
        odd, same = KINDS[case.kind](plain)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError):
        return "unmade"
    try:
        with {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}[case.mode]():
            got = way.run({**tensors, case.position: odd})
            if case.mode == "grad" and got.requires_grad:
                got.sum().backward()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return (
            "refused" if way.others or _says(str(error)) else f"an error that does not say what was expected: {error!r}"
        )
    except Exception as error:
        if way.others:
            return "refused"
        if "is not an nn.Parameter" in str(error):
            return "unmade"  # there is none of this kind, and a model has nothing else
        return f"an error of another class: {error!r}"
    if not isinstance(got, Tensor):
        return f"no tensor: {got!r}"
    if same is None and way.others:
        return "right"  # torch computes something with a meta tensor beside others, too
    if same is None and case.kind not in ("None",):
        without_values = got.is_meta or type(got).__name__ == "FakeTensor"
        return "right" if without_values else f"values from nowhere, a {type(got).__name__}"
    try:
        expected = way.expected({**given(), case.position: same})  # what was given may have been merged into
    except (RuntimeError, IndexError, AttributeError, TypeError) as error:
        return f"served, where torch says {error}"
    if expected is None:
        return "right"
    found = got.get_data() if type(got).__name__ == "MaskedTensor" else got
    found = found.to_local() if hasattr(found, "to_local") else found
    if torch._is_functional_tensor(found):
        torch._sync(found)
        found = torch._from_functional_tensor(found)
    found, expected = found.detach().resolve_neg().double(), expected.detach().double()
    if found.shape != expected.shape:
        return f"shape {list(found.shape)}, expected {list(expected.shape)}"
    tolerance = 2e-3 if case.kind == "half" else 1e-4
    return "right" if torch.allclose(found, expected, atol=tolerance, rtol=tolerance) else "wrong values"


def _says(message: str) -> bool:
    """What was expected, by peftk; or what torch or a subclass says of a tensor of no use."""
    theirs = (
        "uninitialized parameter",
        "escaped from inside a function being vmapped",
        "OnlyLinear has no",
        "not implemented for",
        "inference",
    )
    return "expected" in message or any(words in message for words in theirs)


def _part_of_a_receipt(name: str) -> Tensor:
    receipt = functional.merge_(given()["weight"], given()["lora_A"], given()["lora_B"], S)
    return getattr(receipt.factors, f"lora_{name[-1]}") if name.startswith("receipt") else getattr(receipt, name)


def numbers(text: list[str]) -> Iterator[int]:
    for part in text:
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number in numbers(arguments):
        print(number, end=" ", flush=True)
        print(outcome(CASES[number]).replace("\n", " "), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
