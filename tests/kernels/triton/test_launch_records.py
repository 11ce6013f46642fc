"""Records of launches: what they cost in Python, and that no call gets the record or the kernel of another form."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk.adapters import checks, route
from peftk.adapters.adapter import Wanted, adapter_of
from peftk.adapters.table import AdapterTable, build
from peftk.backends import choice, determinism, gemm
from peftk.backends import triton as backend
from peftk.backends.call import Call
from peftk.launch import workspace
from peftk.launch.segments import Segments
from peftk.ops import dispatch
from peftk.reference import segments as reference_segments
from peftk.system import lasting
from peftk.triton_kernels import config, lora_wgrad, tuned
from peftk.triton_kernels import lora_linear as kernels
from tests.support.cases import normal
from tests.support.fake_streams import Device
from tests.support.python_cost import calls

pytest.importorskip("triton")
if backend.INTERPRETED:
    pytest.skip("needs the compiler's launcher", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
M, N, K, R = 5, 64, 128, 16


class Compiled:
    """Stands for a compiled kernel."""

    def __init__(self) -> None:
        self.launched: list[tuple[tuple[int, ...], tuple[Any, ...], int]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, stream: self.launched.append((grid, args, stream))


class Launcher:
    """Stands for Triton's launcher: a kernel for each specialization, as its own code computes that."""

    def __init__(self, found: Any) -> None:
        self.arg_names, self.signature = found.arg_names, found.signature
        self._bind = create_function_from_signature(
            found.signature, found.params, make_backend(GPUTarget("cuda", 90, 32))
        )
        self.compiled: dict[str, Compiled] = {}
        self.launched: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def specialization(self, *args: Any, **constants: Any) -> str:
        _, specialization, options = self._bind(*args, **constants)
        return str((specialization, options))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        return lambda *args, **constants: self._launch(grid, args, constants)

    def _launch(self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> Compiled:
        bound, *_ = self._bind(*args, **constants)
        self.launched.append((grid, tuple(bound.values())))
        return self.compiled.setdefault(self.specialization(*args, **constants), Compiled())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device(monkeypatch)
    for module in (kernels, tuned, lora_wgrad):
        monkeypatch.setattr(module, "target", lambda device: 90)
    monkeypatch.setattr(tuned, "gpu", lambda device: "no GPU")
    monkeypatch.setattr(backend, "_DEVICE", "cpu")
    monkeypatch.setattr(choice, "choose", lambda call, forced=None: choice.Choice("triton", "", ()))
    tuned.derived.clear()
    choice.forget()
    return device


@pytest.fixture
def wgrad_launcher(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    found = Launcher(lora_wgrad.wgrad_kernel)
    monkeypatch.setattr(lora_wgrad, "wgrad_kernel", found)
    return found


@pytest.fixture
def launcher(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    found = Launcher(kernels.lora_linear_kernel)
    monkeypatch.setattr(kernels, "lora_linear_kernel", found)
    monkeypatch.setattr(kernels, "CompiledKernel", Compiled)
    return found


def shifted(tensor: Tensor) -> Tensor:
    """The same values, not at a multiple of 16 bytes."""
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)


def wide(tensor: Tensor) -> Tensor:
    """The same values, with more space between the rows."""
    return torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]


def forms() -> dict[str, Callable[[], Any]]:
    """Calls that differ from the first one in one thing each."""
    x, W, bias = normal(M, K, dtype=BF16, seed=1), normal(N, K, dtype=BF16, seed=2), normal(N, dtype=F32, seed=3)
    A, B, a = normal(R, K, dtype=BF16, seed=4), normal(N, R, dtype=BF16, seed=5), normal(R, dtype=BF16, seed=6)
    seed = torch.tensor([3])

    def call(
        x: Tensor = x, W: Tensor = W, bias: Tensor | None = bias, A: Tensor = A, B: Tensor = B, **more: Any
    ) -> Any:
        return backend.lora_linear(x, W, bias, adapter_of(A, B, 0.5, bias_A=more.pop("a", None)), **more)

    return {
        "first": call,
        "more rows": lambda: call(normal(M + 1, K, dtype=BF16, seed=1)),
        "many rows": lambda: call(normal(300, K, dtype=BF16, seed=1)),
        "one row": lambda: call(x[:1]),
        "x not aligned": lambda: call(shifted(x)),
        "x with more space": lambda: call(wide(x)),
        "x transposed": lambda: call(x.t().contiguous().t()),
        "x fp16": lambda: call(x.half(), W.half(), bias, A.half(), B.half()),
        "W not aligned": lambda: call(W=shifted(W)),
        "W with more space": lambda: call(W=wide(W)),
        "W transposed": lambda: call(W=W.t().contiguous().t()),
        "W fp32": lambda: call(W=W.float()),
        "less of N": lambda: call(W=W[:-8], bias=bias[:-8], B=B[:-8]),
        "less of K": lambda: call(x[:, :-16], W[:, :-16], A=A[:, :-16]),
        "no bias": lambda: call(bias=None),
        "bias not aligned": lambda: call(bias=shifted(bias)),
        "bias bf16": lambda: call(bias=bias.bfloat16()),
        "A not aligned": lambda: call(A=shifted(A)),
        "B not aligned": lambda: call(B=shifted(B)),
        "B transposed": lambda: call(B=B.t().contiguous().t()),
        "factors fp32": lambda: call(A=A.float(), B=B.float()),
        "more ranks": lambda: call(A=torch.cat([A, A]), B=torch.cat([B, B], 1)),
        "bias_A": lambda: call(a=a),
        "dropout": lambda: call(dropout=peftk.adapters.dropout.dropout_from(0.25, seed)),
        "z": lambda: call(save_z=True),
        "over a product": lambda: call(bias=None, base=torch.zeros(M, N, dtype=BF16)),
        "no adapter": lambda: backend.lora_linear(x, W, bias, None),
        "no W": lambda: backend.lora_linear(x, None, None, adapter_of(A, A.t().contiguous(), 0.5)),
        "dX": lambda: kernels.backward(
            normal(M, N, dtype=BF16, seed=7), W, K, backend._one_adapter(adapter_of(A, B, 0.5))[0], None, None
        ),
        "field": lambda: in_field(call),
    }


def in_field(call: Callable[[], Any]) -> None:
    with peftk.precision("field"):
        call()


def wgrad_forms() -> dict[str, Callable[[], Any]]:
    """Gradients that differ from the first ones in one thing each."""
    x, dy = normal(M, K, dtype=BF16, seed=1), normal(M, N, dtype=BF16, seed=2)
    z, u = normal(M, R, dtype=F32, seed=3), normal(M, R, dtype=F32, seed=4)
    A, B, a = normal(R, K, dtype=BF16, seed=5), normal(N, R, dtype=BF16, seed=6), normal(R, dtype=BF16, seed=7)
    seed = torch.tensor([3])

    def one(
        x: Tensor = x, dy: Tensor = dy, z: Tensor = z, u: Tensor = u, A: Tensor = A, B: Tensor = B, **more: Any
    ) -> Any:
        wanted = more.pop("wanted", Wanted(True, True, False, False))
        adapters, _ = backend._one_adapter(adapter_of(A, B, 0.5, bias_A=more.pop("a", None)))
        plan = lora_wgrad.plan_of_one(A.shape[0], wanted, dy.shape[1], x.dtype, x.device, target=90)
        return lora_wgrad.wgrad(dy, x, z, u, adapters, None, plan, **more)

    def many(ranks: tuple[int, ...], dtype: torch.dtype = BF16) -> Callable[[], Any]:
        table = build(
            tuple(adapter_of(normal(r, K, dtype=dtype, seed=r), normal(N, r, dtype=dtype, seed=r), 1.0) for r in ranks),
            dtype=dtype,
            device=x.device,
        )
        order = Segments(*reference_segments.segments(torch.zeros(M, dtype=torch.int32), len(ranks)))
        adapters, plan = backend._table_adapters(table), backend._plan(table, None, N, x)
        wide = normal(M, table.z_width, dtype=F32, seed=8)
        return lambda: lora_wgrad.wgrad(dy, x, wide, wide, adapters, order, plan)

    long = 300
    return {
        "first": one,
        "more rows": lambda: one(
            *(normal(long, size, dtype=kind, seed=1) for size, kind in ((K, BF16), (N, BF16), (R, F32), (R, F32)))
        ),
        "x not aligned": lambda: one(shifted(x)),
        "x with more space": lambda: one(wide(x)),
        "x transposed": lambda: one(x.t().contiguous().t()),
        "dY not aligned": lambda: one(dy=shifted(dy)),
        "dY with more space": lambda: one(dy=wide(dy)),
        "z with more space": lambda: one(z=wide(z)),
        "z with a little more space": lambda: one(z=torch.cat([z, z[:, :4]], 1)[:, :R]),
        "z not aligned": lambda: one(z=shifted(z)),
        "u not aligned": lambda: one(u=shifted(u)),
        "less of K": lambda: one(x[:, :-16], A=A[:, :-16].contiguous()),
        "less of N": lambda: one(dy=dy[:, :-8], B=B[:-8]),
        "fp16": lambda: one(x.half(), dy.half(), A=A.half(), B=B.half()),
        "fp32": lambda: one(x.float(), dy.float(), A=A.float(), B=B.float()),
        "factors fp32": lambda: one(A=A.float(), B=B.float()),
        "more ranks": lambda: one(z=wide(z).repeat(1, 2), u=u.repeat(1, 2), A=A.repeat(2, 1), B=B.repeat(1, 2)),
        "A alone": lambda: one(wanted=Wanted(True, False, False, False)),
        "bias_A": lambda: one(a=a, wanted=Wanted(True, True, True, False)),
        "dropout": lambda: one(dropout_p=0.25, seed=seed),
        "another tile": lambda: one(block=config.Wgrad(16, 64, 1, 4, 2)),
        "field": lambda: in_field(one),
        "many": many((4, 9)),
        "many of more ranks": many((4, 20)),
        "many fp32": many((4, 9), F32),
    }


@pytest.mark.parametrize("of", [forms, wgrad_forms])
def test_a_kernel_is_launched_again_only_for_its_own_specialization(
    of: Callable[[], dict[str, Callable[[], Any]]], launcher: Launcher, wgrad_launcher: Launcher
) -> None:
    """Every form twice, in an order in which each follows every other."""
    found, launcher = of(), launcher if of is forms else wgrad_launcher
    for run in found.values():
        run()  # makes the records, with Triton's launcher
    assert len(launcher.compiled) >= 15
    made = len(launcher.launched)
    for run in [run for pair in itertools.product(found.values(), repeat=2) for run in pair]:
        run()
    assert len(launcher.launched) == made  # no more were needed
    for specialization, compiled in launcher.compiled.items():
        assert compiled.launched
        for _, args, _ in compiled.launched:
            assert launcher.specialization(*args).startswith(specialization[: specialization.rindex("], {") + 1])


def test_a_kept_kernel_gets_what_the_launcher_would_give_it(launcher: Launcher, gpu: Device) -> None:
    run = forms()["first"]
    run()
    run()
    [(grid, given)], [compiled] = launcher.launched, launcher.compiled.values()
    [(same_grid, args, stream)] = compiled.launched
    assert same_grid == (*grid, 1, 1)
    assert stream == gpu.stream.cuda_stream
    assert len(args) == len(given)
    for name, one, other in zip(launcher.arg_names, args, given, strict=True):
        if isinstance(one, Tensor):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        else:
            assert one == other, name


def test_plans_and_devices_are_not_mixed_up(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    run = forms()["first"]
    run()
    run()
    assert len(launcher.launched) == 1
    chosen = config.lora_linear
    monkeypatch.setattr(config, "lora_linear", lambda *args: chosen(*args)._replace(BLOCK_N=16))
    tuned.forget_loaded()  # as `peftk tune` does
    run()
    assert len(launcher.launched) == 2
    assert launcher.launched[1][0] != launcher.launched[0][0]
    for name, value in (("target", lambda device: 100), ("processors", lambda device: 7)):
        monkeypatch.setattr(kernels if name == "target" else workspace, name, value)
        run()
    assert len(launcher.launched) == 4


def test_records_are_not_kept_without_end(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "_MOST_RECORDS", 3)
    W = normal(N, K, dtype=BF16, seed=2)
    for rows in range(1, 20):
        backend.lora_linear(normal(rows, K, dtype=BF16, seed=1), W, None, None)
        assert len(tuned.derived) <= 3


def direct(x: Any, W: Any, bias: Any, A: Any, B: Any, a: Any = None, b: Any = None) -> Tensor | None:
    return backend.direct_lora_linear(x, W, bias, A, B, 0.5, "gelu", a, b, 0)


@pytest.fixture(params=["triton", "gemm"])
def chosen(request: pytest.FixtureRequest, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The ordinary functions of a backend that direct calls take the place of."""
    monkeypatch.setattr(choice, "choose", lambda call, forced=None: choice.Choice(request.param, "", ()))
    monkeypatch.setattr(gemm, "_on_top", lambda device: "triton")
    monkeypatch.setattr(checks, "ids_are_checked", lambda device: False)
    monkeypatch.setattr(determinism, "ever_entered", False)
    monkeypatch.setattr(backend, "segments", lambda ids, count: Segments(*reference_segments.segments(ids, count)))
    choice.forget()
    return backend if request.param == "triton" else gemm


def same_launches(launcher: Launcher, run: Callable[[], Any], other: Callable[[], Any]) -> Tensor:
    """Runs both, and compares their launches, if there are any. The result of run()."""
    made = []
    for each in (run, other):
        tuned.derived.clear()
        launcher.launched.clear()
        y = each()
        assert y is not None
        made.append((y, list(launcher.launched)))
    (y, launches), (expected, same) = made
    assert (y.numel(), y.dtype, len(launches)) == (expected.numel(), expected.dtype, len(same))
    for (grid, one), (same_grid, other_one) in zip(launches, same, strict=True):
        assert grid == same_grid
        for name, value, expected_value in zip(launcher.arg_names, one, other_one, strict=True):
            if isinstance(value, Tensor):
                assert (value.shape, value.stride()) == (expected_value.shape, expected_value.stride()), name
                assert name == "z" or "partials" in name or torch.equal(value, expected_value) or name in "xy", name
            else:
                assert value == expected_value, name
    return y


def test_a_direct_call_launches_what_the_ordinary_one_does(launcher: Launcher, chosen: Any) -> None:
    x, W, bias = normal(6, K, dtype=BF16, seed=1), normal(N, K, dtype=BF16, seed=2), normal(N, dtype=F32, seed=3)
    A, B = normal(R, K, dtype=BF16, seed=4), normal(N, R, dtype=BF16, seed=5)
    a, b = normal(R, dtype=BF16, seed=6), normal(N, dtype=BF16, seed=7)
    cases = [
        (A, B, a, b),
        (A, B, None, None),
        (None, None, None, None),
        (shifted(A), B, None, b),
        (A, wide(B), a, None),
    ]
    for adapter, rows in itertools.product(cases, (x, x.view(2, 3, K), wide(x))):
        ordinary = adapter_of(*adapter[:2], 0.5, activation="gelu", bias_A=adapter[2], bias_B=adapter[3])
        same_launches(
            launcher,
            lambda rows=rows, adapter=adapter: direct(rows, W, bias, *adapter),
            lambda rows=rows, ordinary=ordinary: chosen.lora_linear(rows.reshape(-1, K), W, bias, ordinary)[0],
        )
    assert direct(x.view(2, 3, K), W, bias, A, B).shape == (2, 3, N)  # type: ignore[union-attr]
    if chosen is gemm:
        launcher.launched.clear()
        assert torch.equal(direct(x, W, bias, None, None), gemm.product(x, W, bias))  # type: ignore[arg-type]
        assert not launcher.launched


def table_of(*ranks: int) -> AdapterTable:
    adapters = (adapter_of(normal(r, K, dtype=BF16, seed=r), normal(N, r, dtype=BF16, seed=r), 1.0) for r in ranks)
    return build(tuple(adapters), dtype=BF16, device=torch.device("cpu"))


def routed(ids: Tensor) -> Tensor:
    """The ids as a route gives them to the layers."""
    flat = ids.reshape(-1).clone()
    setattr(flat, route._DERIVED, (False, {}))
    setattr(ids, route._FLAT, flat)
    return ids


def test_a_direct_call_with_many_adapters_launches_what_the_ordinary_one_does(launcher: Launcher, chosen: Any) -> None:
    x, W, bias = normal(6, K, dtype=BF16, seed=1), normal(N, K, dtype=BF16, seed=2), normal(N, dtype=F32, seed=3)
    table, ids = table_of(4, 20), torch.tensor([1, 0, -1, 1, 1, 0], dtype=torch.int32)
    for rows, given in (
        (x, ids),
        (wide(x), ids.long()),
        (x.view(2, 3, K), ids.view(2, 3)),
        (x, torch.stack([ids, ids], 1)[:, 0]),
        (x.view(2, 3, K), routed(ids.view(2, 3).clone())),
    ):
        y = same_launches(
            launcher,
            lambda rows=rows, given=given: backend.direct_multi_lora_linear(rows, W, bias, table, given, 0),
            lambda rows=rows: chosen.multi_lora_linear(rows.reshape(-1, K), W, bias, table, ids)[0],
        )
        assert launcher.launched
        assert y.shape == (*rows.shape[:-1], N)


def test_what_a_direct_call_with_many_adapters_leaves_to_the_ordinary_way(
    launcher: Launcher, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W, bias = normal(6, K, dtype=BF16, seed=1), normal(N, K, dtype=BF16, seed=2), normal(N, dtype=F32, seed=3)
    table, ids = table_of(4, 20), torch.zeros(6, dtype=torch.int32)
    on_meta = dataclasses.replace(table, device=torch.device("meta"))

    def run(x: Any = x, W: Any = W, bias: Any = bias, table: AdapterTable = table, ids: Any = ids) -> Tensor | None:
        return backend.direct_multi_lora_linear(x, W, bias, table, ids, 0)

    assert run() is not None
    for bad in (
        {"x": x.view(2, 3, K), "ids": ids[:2]},
        {"ids": ids[:5]},
        {"ids": ids.float()},
        {"ids": [0] * 6},
        {"ids": ids.to("meta")},
        {"x": x[:, :-1]},
        {"x": x.to_sparse()},
        {"bias": bias[1:]},
        {"bias": torch.stack([bias, bias], 1)[:, 0]},
        {"table": on_meta},
    ):
        assert run(**bad) is None, bad
    monkeypatch.setattr(checks, "ids_are_checked", lambda device: True)  # PEFTK_CHECK=1
    assert run() is None
    monkeypatch.setattr(checks, "ids_are_checked", lambda device: False)
    asked: list[Call] = []
    assert run(ids=routed(ids.clone())) is not None
    monkeypatch.setattr(choice, "choose", lambda call: asked.append(call) or choice.Choice("cuda", "", ()))
    choice.forget()
    assert run() is None
    call = asked[-1]
    assert (call.op.many, call.M, call.N, call.K, call.rank, call.adapters) == (True, 6, N, K, 20, 2)
    assert (call.x_dtype, call.weight_dtype, call.adapter_dtype, call.device) == (BF16, BF16, BF16, "cpu")


def test_layers_ask_triton_directly() -> None:
    assert backend.backend().direct is backend
    assert backend.backend().direct_multi is backend


def test_what_a_direct_call_leaves_to_the_ordinary_way(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, bias = normal(M, K, dtype=BF16, seed=1), normal(N, K, dtype=BF16, seed=2), normal(N, dtype=F32, seed=3)
    A, B, a = normal(R, K, dtype=BF16, seed=4), normal(N, R, dtype=BF16, seed=5), normal(2 * R, dtype=BF16, seed=6)
    assert direct(x, W, bias, A, B) is not None
    for bad in (
        (x, W, bias, A.t().contiguous().t(), B),
        (x, W, bias, A, B, a[::2]),
        (x, W, torch.stack([bias, bias], 1)[:, 0], A, B),
        (x, W, bias, A, None),
        (x, W, bias, A[:, :-1], B),
        (x, W, bias, A.float(), B),
        (x, W, bias[1:], A, B),
        (x[:, :-1], W, bias, A, B),
        (x.int(), W, bias, A, B),
        (x.to_sparse(), W, bias, A, B),
        (x, W, bias, None, None, None, bias.bfloat16()),
        (x, None, bias, A, B),
        (x, W, bias, A.to("meta"), B),
    ):
        assert direct(*bad) is None
    asked: list[Call] = []
    name = "cuda"
    monkeypatch.setattr(choice, "choose", lambda call: asked.append(call) or choice.Choice(name, "", ()))
    assert direct(x, W, bias, A, B) is not None  # remembered
    choice.forget()  # as `peftk tune` does
    assert direct(x, W, bias, A, B) is None
    name = "triton"
    assert direct(x, W, bias, A, B) is None
    monkeypatch.setenv("PEFTK_BACKEND", "triton")  # another choice
    assert direct(x, W, bias, A, B) is not None
    call = asked[-1]
    assert (call.M, call.N, call.K, call.rank, call.adapters, call.aligned) == (M, N, K, R, 1, True)
    assert (call.x_dtype, call.weight_dtype, call.adapter_dtype, call.device) == (BF16, BF16, BF16, "cpu")
    assert direct(x, shifted(W), bias, A, B) is not None
    assert not asked[-1].aligned


@pytest.mark.parametrize(
    ("name", "python", "c"),
    [
        ("layer", 54, 57),
        ("backend", 55, 45),
        ("layer on a product", 55, 54),
        ("route", 80, 63),
        ("ids", 108, 95),
        ("backward", 89, 79),
        ("backward of many", 83, 82),
        ("gradients", 29, 30),
        ("gradients of many", 29, 37),
    ],
)
def test_the_cost_of_a_call(
    name: str, python: int, c: int, wgrad_launcher: Launcher, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Function calls of Python and of C, up to the call of the compiled kernel. Ids: with a sort of the reference's."""
    layer = peftk.LoRALinear.from_linear(nn.Linear(K, N).to(BF16), r=R, adapter_dtype=BF16).eval()
    many = peftk.MultiLoRALinear.from_linear(nn.Linear(K, N).to(BF16), max_adapters=4)
    many.add_adapter("a", normal(R, K, dtype=BF16, seed=4), normal(N, R, dtype=BF16, seed=5))
    x, dy, z = normal(M, K, dtype=BF16, seed=1), normal(M, N, dtype=BF16, seed=2), normal(M, R, dtype=F32, seed=3)
    for direct_way in ("_direct", "_direct_multi"):
        monkeypatch.setattr(dispatch, direct_way, lambda device: (backend,))
    monkeypatch.setattr(checks, "ids_are_checked", lambda device: False)
    monkeypatch.setattr(determinism, "ever_entered", False)
    monkeypatch.setattr(backend, "segments", lambda ids, count: Segments(*reference_segments.segments(ids, count)))
    ids = torch.zeros(M, dtype=torch.int32)
    of_route = routed(ids.clone())
    flat, table, adapter = route.flat(of_route), many.bank.table(), adapter_of(layer.lora_A, layer.lora_B, 0.5)
    assert table is not None
    assert flat is not None
    one, order = backend._one_adapter(adapter)[0], backend.sorted_rows.of(flat, 4)
    plan = lora_wgrad.plan([R], [Wanted(True, True, False, False)], (0, N), BF16, x.device, many=False)
    plan_of_many, of_many = backend._plan(table, None, N, x), backend._table_adapters(table)
    runs: dict[str, Callable[[], object]] = {
        "layer": lambda: layer(x),
        "backend": lambda: backend.lora_linear(x, layer.weight, layer.bias, adapter),
        "layer on a product": lambda: layer(x),
        "route": lambda: many(x, of_route),
        "ids": lambda: many(x, ids),
        "backward": lambda: backend.lora_linear_backward(dy, x, layer.weight, adapter, z),
        "backward of many": lambda: backend.multi_lora_linear_backward(dy, x, layer.weight, table, flat, z),
        "gradients": lambda: lora_wgrad.wgrad(dy, x, z, z, one, None, plan),
        "gradients of many": lambda: lora_wgrad.wgrad(dy, x, z, z, of_many, order, plan_of_many),
    }
    if name == "layer on a product":
        monkeypatch.setattr(choice, "choose", lambda call, forced=None: choice.Choice("gemm", "", ()))
    with torch.inference_mode():
        cost = calls(runs[name])
    of_c = sum(count for function, count in cost.items() if function.startswith("C "))
    assert cost.total() - of_c <= python, cost
    assert of_c <= c, cost
    launched = launcher.compiled | wgrad_launcher.compiled
    assert launched
    assert all(compiled.launched for compiled in launched.values())


def test_in_a_captured_graph_launches_follow_each_other(launcher: Launcher, gpu: Device) -> None:
    x, W = normal(300, K, dtype=BF16, seed=1), normal(N, K, dtype=BF16, seed=2)
    A, B = normal(R, K, dtype=BF16, seed=4), normal(N, R, dtype=BF16, seed=5)
    adapters, _ = backend._one_adapter(adapter_of(A, B, 0.5))
    shape = config.CallShape(300, N, K, False, False, False, True, BF16, BF16, BF16, False, 1)
    plan = next(plan for plan in config.shipped_plans(shape.shape_class(), 90) if plan.overlap)
    place = launcher.arg_names.index("OVERLAP")

    def overlaps() -> list[bool]:
        launcher.launched.clear()
        kernels.forward(x, W, None, adapters, None, plan=plan)
        return [arguments[place] for _, arguments in launcher.launched]

    assert overlaps() == [True, True]
    workspace._counters(x.device, 4096)  # a slab for the capture
    gpu.stream.captured = True
    assert overlaps() == [False, False]


def test_gradients_are_planned_once_for_a_table(gpu: Device) -> None:
    bank = peftk.AdapterBank(K, N, 2, BF16, "cpu")
    bank.add("a", normal(R, K, dtype=BF16, seed=4), normal(N, R, dtype=BF16, seed=5), 1.0)
    table, x = bank.table(), normal(M, K, dtype=BF16, seed=1)
    assert table is not None
    one = backend._plan(table, None, N, x)
    assert backend._plan(table, None, N, x) is one
    assert backend._plan(table, [Wanted(True, False, False, False)] * 2, N, x) is not one
    assert backend._table_adapters(table) is backend._table_adapters(table)


def test_a_plan_that_a_graph_reads_outlives_its_table(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lasting, "read_by_graphs", {})
    bank = peftk.AdapterBank(K, N, 2, BF16, "cpu")
    bank.add("a", normal(R, K, dtype=BF16, seed=4), normal(N, R, dtype=BF16, seed=5), 1.0)
    table, x = bank.table(), normal(M, K, dtype=BF16, seed=1)
    plan = backend._plan(table, None, N, x)  # a run before the capture
    assert not lasting.read_by_graphs
    with gpu.capture():
        assert backend._plan(table, None, N, x) is plan
    assert [*lasting.read_by_graphs.values()] == [plan]
