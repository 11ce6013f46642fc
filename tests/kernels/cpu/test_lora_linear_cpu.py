"""The CPU kernels at every SIMD level of this machine: values, gradients, bits."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from peftk import _cpu
from peftk.adapters import activations, table
from peftk.adapters.adapter import Adapter, AdapterGrads
from peftk.adapters.dropout import Dropout
from peftk.backends import cpu
from peftk.reference import philox
from tests.support import numerics
from tests.support.calls import call
from tests.support.cases import DTYPES, Case, expected, expected_grads, random_case

LEVELS = _cpu.simd_levels()
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def forward(case: Case, **kwargs: object) -> tuple[Tensor, Tensor | None]:
    if case.ids is None:
        return cpu.lora_linear(case.x, case.weight, case.bias, case.adapters[0], **kwargs)
    return cpu.multi_lora_linear(case.x, case.weight, case.bias, case.table(), case.ids, **kwargs)


def backward(case: Case, dy: Tensor, z: Tensor | None, **kwargs: object) -> tuple[Tensor, list[AdapterGrads | None]]:
    if case.ids is None:
        dx, grads = cpu.lora_linear_backward(dy, case.x, case.weight, case.adapters[0], z, **kwargs)
        return dx, [None if case.adapters[0] is None else grads]
    assert z is not None
    return cpu.multi_lora_linear_backward(dy, case.x, case.weight, case.table(), case.ids, z, **kwargs)


def adapter(N: int, K: int, r: int, dtype: torch.dtype = torch.float32, activation: str = "identity") -> Adapter:
    A, B = torch.randn(r, K) * K**-0.5, torch.randn(N, r) * r**-0.5
    return Adapter((A.to(dtype),), (B.to(dtype),), 2.0, activation, torch.randn(r).to(dtype), torch.randn(N).to(dtype))


def base(M: int, N: int, K: int, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(M, K).to(x_dtype), (torch.randn(N, K) * K**-0.5).to(weight_dtype), torch.randn(N)


def check(case: Case) -> None:
    y, _ = forward(case)
    assert y.dtype == case.x.dtype
    numerics.check(y, *expected(case))


def test_random_cases(level: str) -> None:
    for seed in range(20_000, 20_150):
        case = random_case(seed, max_rows=300)
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"case {seed}: {case}: {error}") from error


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("adapter_dtype", DTYPES)
def test_dtypes(level: str, x_dtype: torch.dtype, weight_dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    for M in (1, 5, 40):
        x, weight, bias = base(M, 67, 301, x_dtype, weight_dtype)
        check(Case(x, weight, bias, (adapter(67, 301, 9, adapter_dtype),), None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens(level: str, dtype: torch.dtype) -> None:
    for M in (0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 200, 511, 513, 600):
        x, weight, bias = base(M, 129, 70, dtype, dtype)
        check(Case(x, weight, bias, (adapter(129, 70, 16, dtype),), None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks(level: str, dtype: torch.dtype) -> None:
    x, weight, bias = base(37, 50, 90, dtype, dtype)
    for r in (1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 100, 255, 256):
        check(Case(x, weight, bias, (adapter(50, 90, r, dtype),), None))


@pytest.mark.parametrize("M", [3, 64, 530])
def test_ids(level: str, M: int) -> None:
    x, weight, bias = base(M, 96, 128, torch.bfloat16, torch.bfloat16)
    adapters = tuple(adapter(96, 128, 1 + 3 * i % 40, torch.bfloat16) for i in range(64))
    patterns = [torch.full((M,), -1), torch.full((M,), 63), torch.arange(M) % 64, torch.randint(-1, 64, (M,))]
    patterns += [patterns[-1].sort().values, patterns[-1].sort(descending=True).values]
    for ids in patterns:
        check(Case(x, weight, bias, adapters, ids.to(torch.int32)))


def test_weight_and_factors_in_any_layout(level: str) -> None:
    x, weight, bias = base(45, 60, 83, torch.float16, torch.float16)
    columns = weight.t().contiguous().t()
    neither = torch.randn(60, 166).to(torch.float16)[:, ::2]
    plain = adapter(60, 83, 20)
    B = torch.randn(40, 120)
    for pages_B in (plain.pages_B[0].t().contiguous().t(), B[::2, :60].t(), B[:20, ::2].t()):
        one = Adapter(plain.pages_A, (pages_B,), 1.0)
        for w in (weight, columns, neither):
            for M in (2, 45):
                case = Case(x[:M], w, bias, (one,), None)
                check(case)
                check_gradients(case, 0.0)


def test_an_adapter_in_pages_is_the_same_as_in_one_piece(level: str) -> None:
    x, weight, bias = base(21, 48, 64, torch.float32, torch.float32)
    whole = adapter(48, 64, 40)
    A, B = whole.pages_A[0], whole.pages_B[0].t().contiguous()
    pages = Adapter(A.split(16), tuple(p.t() for p in B.split(16)), 2.0, "identity", whole.bias_A, whole.bias_B)
    y, z = cpu.lora_linear(x, weight, bias, whole, save_z=True)
    paged, paged_z = cpu.lora_linear(x, weight, bias, pages, save_z=True)
    assert torch.equal(y, paged)
    assert torch.equal(z, paged_z)


@pytest.mark.parametrize("activation", activations.CODES)
def test_activations(level: str, activation: str) -> None:
    x, weight, bias = base(33, 40, 100, torch.float32, torch.float32)
    case = Case(x * 3, weight, bias, (adapter(40, 100, 12, activation=activation),), None)
    check(case)
    check_gradients(case, 0.0)


def check_gradients(case: Case, dropout_p: float, dy: Tensor | None = None) -> None:
    kwargs = {"dropout": Dropout(dropout_p, torch.tensor([0x1234_5678_9ABC_DEF0])) if dropout_p else None}
    if dy is None:
        dy = torch.randn(case.x.shape[0], case.weight.shape[0]).to(case.x.dtype)
    _, z = forward(case, save_z=True, **kwargs)
    dx, grads = backward(case, dy, z, **kwargs)
    dx64, grads64, dx_magnitude, magnitudes, terms = expected_grads(case, dy, **kwargs)
    assert dx.dtype == case.x.dtype
    numerics.check(dx, dx64, dx_magnitude, terms)
    for actual, wanted, magnitude in zip(grads, grads64, magnitudes, strict=True):
        for name in AdapterGrads._fields if actual is not None else ():
            grad = getattr(actual, name)
            assert (grad is None) == (getattr(wanted, name) is None), name
            if grad is not None:
                numerics.check(grad, getattr(wanted, name), getattr(magnitude, name), terms)


# Rounding errors of similar terms, or of terms of one sign, do not cancel.
def filled(kind: str, *shape: int, value: float = 0.7) -> Tensor:
    if kind == "constant":
        return torch.full(shape, value)
    if kind == "rows of one":
        return torch.rand(1, shape[1]).expand(shape)  # stride 0
    if kind == "columns of one":
        return torch.rand(shape[0], 1).expand(shape)
    return torch.rand(shape)  # positive


KINDS = ("constant", "rows of one", "columns of one", "positive")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [64, 128, 256, 1024, 4096, 16384])
def test_long_sums_of_like_terms(level: str, kind: str, K: int) -> None:
    weight, bias = filled(kind, 35, K), torch.ones(35)
    for M in (2, 8, 64):
        x = filled(kind, M, K, value=0.3)
        for w in (weight, weight.t().contiguous().t()):
            check(Case(x, w, bias, (None,), None))
            check(Case(x, w, bias, (Adapter((filled(kind, 3, K),), (filled(kind, 35, 3),), 0.7),), None))


@pytest.mark.parametrize("kind", KINDS)
def test_large_ranks_of_like_terms(level: str, kind: str) -> None:
    one = Adapter((filled(kind, 512, 16, value=0.3).contiguous(),), (filled(kind, 35, 512),), 1.0)
    for M in (1, 2, 40):
        x, weight = filled(kind, M, 16, value=1.1), torch.zeros(35, 16)
        check(Case(x, weight, None, (one,), None))
        check(Case(x, weight, None, (one,), torch.zeros(M, dtype=torch.int32)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "N"), [(4096, 24), (300, 24), (20, 4096), (2, 1024), (70_000, 3)])
def test_gradients_of_like_terms(level: str, kind: str, M: int, N: int) -> None:
    K = 40 if M < 10_000 else 2
    x, weight, dy = filled(kind, M, K, value=0.3), filled(kind, N, K), filled(kind, M, N, value=1.1)
    one = Adapter((filled(kind, 5, K),), (filled(kind, N, 5),), 0.7, "identity", torch.ones(5), torch.ones(N))
    check_gradients(Case(x, weight, None, (one,), None), 0.0, dy)
    check_gradients(Case(x, weight, None, (one,), None), 0.0, torch.ones(M, N))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_random_gradients(level: str, dropout_p: float) -> None:
    for seed in range(30_000, 30_060):
        case = random_case(seed, max_rows=150)
        try:
            check_gradients(case, dropout_p)
        except AssertionError as error:
            raise AssertionError(f"case {seed}: {case}: {error}") from error


def without_base(case: Case) -> Case:
    """Only the adapters' part, as the reference computes it."""
    return dataclasses.replace(case, weight=torch.zeros_like(case.weight), bias=None)


def positive(adapter: Adapter | None) -> Adapter | None:
    if adapter is None:
        return None
    pages_A, pages_B = (tuple(t.abs() for t in pages) for pages in (adapter.pages_A, adapter.pages_B))
    bias_A, bias_B = (None if t is None else t.abs() for t in (adapter.bias_A, adapter.bias_B))
    return Adapter(pages_A, pages_B, abs(adapter.scaling), "identity", bias_A, bias_B)


def adapters_magnitude(case: Case) -> Tensor:
    """|s|(|x||A|ᵀ + |a|)|B|ᵀ + |β|. There is no |x||W|ᵀ that covers the error of v, so v counts with its own terms."""
    adapters = tuple(positive(a) for a in case.adapters)
    return expected(dataclasses.replace(without_base(case), x=case.x.abs(), adapters=adapters))[0]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def linear_of(case: Case, dropout: Dropout | None = None, *, over_base: bool) -> _cpu.Linear:
    shape = (case.x.shape[0], *case.weight.shape)
    return cpu._linear_args(shape, case.x, case.x.dtype, case.weight, None, dropout, over_base=over_base)


def call_over_base(case: Case, y: Tensor) -> None:
    """Adds the adapters' part to y, in place."""
    linear = linear_of(case, over_base=True)
    out = {"y": y.data_ptr(), "y_stride": y.stride(0)}
    if case.ids is None:
        one = cpu._one_page(case.adapters[0])  # kept alive until the call returns
        _cpu.lora_linear(linear, cpu._adapter_args(one), **out)
    else:
        built = case.table()
        _cpu.lora_linear(linear, cpu._table_args(built), ids=case.ids.data_ptr(), **out)


def call_backward(
    case: Case,
    dy: Tensor,
    z: Tensor | None,
    dx: Tensor | None,
    grads: list[AdapterGrads | None],
    *,
    over_base: bool = False,
    dropout: Dropout | None = None,
) -> None:
    """Runs the backward into the given tensors. A gradient that is None is not computed."""
    linear = linear_of(case, dropout, over_base=over_base)
    out = {
        "dy": dy.data_ptr(),
        "dy_stride": dy.stride(0),
        "dy_dtype": DTYPE_CODES[dy.dtype],
        "dx": address(dx),
        "dx_stride": case.weight.shape[1],
        "z": address(z),
        "z_stride": 0 if z is None else z.stride(0),
    }
    addresses = [(0,) * 4 if g is None else tuple(address(t) for t in g) for g in grads]
    if case.ids is None:
        one = cpu._one_page(case.adapters[0])
        _cpu.lora_linear_backward(linear, cpu._adapter_args(one), **out, grads=[] if one is None else addresses[:1])
    else:
        built = case.table()
        _cpu.lora_linear_backward(linear, cpu._table_args(built), ids=case.ids.data_ptr(), **out, grads=addresses)


def over_base_cases() -> Iterator[tuple[str, Case]]:
    for seed in range(40_000, 40_060):
        case = random_case(seed, max_rows=150)
        yield f"case {seed}: {case}", dataclasses.replace(case, x=case.x.contiguous())
    for M, dtype in ((40, torch.bfloat16), (300, torch.float32), (600, torch.bfloat16)):
        x, weight, _ = base(M, 700, 64, dtype, dtype)
        adapters = tuple(adapter(700, 64, r, dtype) for r in (4, 16, 37))
        yield f"{M} rows", Case(x, weight, None, adapters, torch.randint(-1, 3, (M,), dtype=torch.int32))


def test_adapters_are_added_to_an_existing_base(level: str) -> None:
    for name, case in over_base_cases():
        whole = torch.randn(case.x.shape[0], case.weight.shape[0] + 3).to(case.x.dtype)
        held, beside = whole[:, :-3].clone(), whole[:, -3:].clone()
        y = whole[:, :-3]
        call_over_base(case, y)
        delta, _, terms = expected(without_base(case))
        try:
            numerics.check(y, held.double() + delta, held.double().abs() + adapters_magnitude(case), terms)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        assert torch.equal(whole[:, -3:], beside), name
        if case.ids is not None:
            assert torch.equal(y[case.ids == -1], held[case.ids == -1]), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_input_gradients_are_added_to_an_existing_base(level: str, dropout_p: float) -> None:
    kwargs = {"dropout": Dropout(dropout_p, torch.tensor([77])) if dropout_p else None}
    for name, case in over_base_cases():
        dy = torch.randn(case.x.shape[0], case.weight.shape[0]).to(case.x.dtype)
        _, z = forward(case, save_z=True, **kwargs)
        _, grads = backward(case, dy, z, **kwargs)
        held = torch.randn(case.x.shape).to(case.x.dtype)
        over, over_grads = held.clone(), [g and empty_like(g) for g in grads]
        call_backward(case, dy, z, over, over_grads, over_base=True, **kwargs)
        delta, _, magnitude, _, terms = expected_grads(without_base(case), dy, **kwargs)
        try:
            numerics.check(over, held.double() + delta, held.double().abs() + magnitude, terms)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        assert_same_grads(over_grads, grads, name)


def empty_like(grads: AdapterGrads) -> AdapterGrads:
    return AdapterGrads(*(None if t is None else torch.full_like(t, torch.nan) for t in grads))


def assert_same_grads(actual: list[AdapterGrads | None], wanted: list[AdapterGrads | None], name: str) -> None:
    for one, other in zip(actual, wanted, strict=True):
        for a, b in zip(one or (), other or (), strict=True):
            assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_unwanted_gradients_do_not_change_the_others(level: str, dropout_p: float) -> None:
    kwargs = {"dropout": Dropout(dropout_p, torch.tensor([77])) if dropout_p else None}
    rng = random.Random(5)
    for name, case in over_base_cases():
        dy = torch.randn(case.x.shape[0], case.weight.shape[0]).to(case.x.dtype)
        _, z = forward(case, save_z=True, **kwargs)
        dx, grads = backward(case, dy, z, **kwargs)
        for wants_dx in (False, False, True):
            some_dx = torch.full_like(dx, torch.nan) if wants_dx else None
            some = [g and AdapterGrads(*(t if rng.random() < 0.5 else None for t in empty_like(g))) for g in grads]
            call_backward(case, dy, z, some_dx, some, **kwargs)
            assert some_dx is None or torch.equal(some_dx, dx), name
            assert_same_grads(some, grads, name)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_masks_are_the_references(level: str, p: float) -> None:
    K, seed = 37, torch.tensor([-(2**62) + 12345])
    identity = Adapter((torch.eye(K),), (torch.eye(K),), 1.0)
    y, _ = cpu.lora_linear(torch.ones(50, K), torch.zeros(K, K), None, identity, dropout=Dropout(p, seed))
    assert torch.equal(y != 0, philox.keep_mask(50, K, p, seed))
    assert (y[y != 0] == torch.tensor(1 / (1 - p))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 7, 40, 600])
def test_bits_are_the_same_with_any_number_of_threads(level: str, threads: None, dtype: torch.dtype, M: int) -> None:
    x, weight, bias = base(M, 390, 333, dtype, dtype)
    adapters = tuple(adapter(390, 333, r, dtype) for r in (1, 16, 37))
    case = Case(x, weight, bias, adapters, torch.randint(-1, 3, (M,), dtype=torch.int32))
    dy, seed = torch.randn(M, 390).to(dtype), torch.tensor([5])
    results = []
    for count in (1, 2, 3, 5, 5):
        torch.set_num_threads(count)
        y, z = forward(case, save_z=True, dropout=Dropout(0.2, seed))
        dx, grads = backward(case, dy, z, dropout=Dropout(0.2, seed))
        results.append([y, z, dx, *(t for g in grads if g is not None for t in g if t is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even_with_subnormals_and_nan(level: str, dtype: torch.dtype) -> None:
    # A contraction of length 1, so that y is x rounded. The fp32 values are a bias, so that y may have 16 bits.
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65519.996, 65520.0, 2.0**-25, 1e-40])
    values = torch.cat([bits.view(torch.float32), special, torch.randn(1000) * 2.0**-24, torch.randn(1000) * 1e-38])
    x, weight = torch.zeros(1, 1, dtype=dtype), torch.zeros(values.numel(), 1, dtype=dtype)
    y, _ = cpu.lora_linear(x, weight, values, None)
    assert torch.equal(y[0].nan_to_num(7.0), values.to(dtype).nan_to_num(7.0))


@pytest.mark.parametrize(("M", "threads_"), [(241, 7), (513, 2), (517, 7)])
def test_blocks_of_few_rows_have_the_bits_of_high_ones(level: str, threads: None, M: int, threads_: int) -> None:
    """The last rows of a share, or those beyond 512, with W contiguous along its columns: equal rows stay equal."""
    N, K = 64, 1024
    x, weight = torch.randn(1, K).expand(M, K).contiguous(), torch.randn(K, N).t()
    torch.set_num_threads(1)
    alone = cpu.lora_linear(x, weight, None, None)[0]
    assert alone.eq(alone[0]).all()
    torch.set_num_threads(threads_)
    assert torch.equal(cpu.lora_linear(x, weight, None, None)[0], alone)
    assert torch.equal(cpu.lora_linear(x[:3].clone(), weight, None, None)[0], alone[:3])


def test_subnormals_count_whatever_the_callers_mode(threads: None) -> None:
    x, weight = torch.full((64, 64), 1e-30), torch.full((512, 64), 1e-10)
    torch.set_num_threads(4)
    expected_y, _ = cpu.lora_linear(x, weight, None, None)
    assert (expected_y != 0).all()
    torch.set_flush_denormal(True)
    try:
        y, _ = cpu.lora_linear(x, weight, None, None)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, expected_y)


def test_one_tenants_inf_stays_with_its_rows(level: str) -> None:
    x, weight, bias = base(40, 33, 50, torch.float32, torch.float32)
    good, bad = adapter(33, 50, 4), adapter(33, 50, 19)
    for tensor in (bad.pages_A[0], bad.pages_B[0], bad.bias_B):
        tensor.fill_(float("inf"))
    ids = torch.arange(40, dtype=torch.int32) % 3 - 1
    check_rows = ids != 1
    alone = Case(x, weight, bias, (good, None), torch.where(ids == 1, -1, ids))
    together = Case(x, weight, bias, (good, bad), ids)
    assert torch.equal(forward(together)[0][check_rows], forward(alone)[0][check_rows])
    assert not forward(together)[0][~check_rows].isfinite().any()


def test_ids_outside_the_table_raise_before_anything_is_written(level: str) -> None:
    x, weight, bias = base(4, 8, 8, torch.float32, torch.float32)
    adapters = (adapter(8, 8, 2), None)
    for bad, message in ((2, r"ids\[2\].*below 2, got 2"), (-2, "got -2"), (1, "got 1, an empty slot")):
        with pytest.raises(ValueError, match=message):
            forward(Case(x, weight, bias, adapters, torch.tensor([0, -1, bad, 0], dtype=torch.int32)))


def test_empty_contraction_gives_the_bias(level: str) -> None:
    y, _ = cpu.lora_linear(torch.zeros(20, 0), torch.zeros(7, 0), torch.arange(7.0), None)
    assert torch.equal(y, torch.arange(7.0).expand(20, 7))


def test_cannot_serve_names_the_reason() -> None:
    mixed = call(weight_dtype=torch.bfloat16, adapter_dtype=torch.float16)
    assert cpu.cannot_run(mixed) is None
    assert "weight is float64" in str(cpu.cannot_run(call(weight_dtype=torch.float64)))
    assert "not on cuda" in str(cpu.cannot_run(call(device="cuda")))


def test_describe_names_the_form(level: str, threads: None) -> None:
    torch.set_num_threads(2)
    half = torch.bfloat16
    form = {"dtype": half, "K": 1024, "N": 1024, "rank": 16}
    simd = f"{level} (bf16 pairs)" if level == "avx512_bf16" else level
    assert cpu.describe(call(**form)) == f"C++ lora_linear kernels: dot form, {simd}, 2 threads"
    many, transposed = ("panels", "panels") if level in ("avx2", "avx512") else ("lanes", "columns")
    assert f"{many} form" in cpu.describe(call(**form, M=64))
    assert f"{transposed} form" in cpu.describe(call("multi_lora_linear_backward", **form))
    widened = "panels" if level.startswith("avx") else "lanes"  # pairs need 16 bits on both sides
    assert f"{widened} form" in cpu.describe(call(**form | {"dtype": torch.float32}, M=72))
    assert f"dot form, {level}, 1 thread" in cpu.describe(call(**{**form, "K": 64}, x_dtype=torch.float32, M=1))
    assert "merge" in cpu.describe(call("merge", **form))


def test_simd_level_is_chosen_by_environment() -> None:
    # the module without torch, whose import takes seconds
    script = (
        f"import importlib.util as util; spec = util.spec_from_file_location('peftk._cpu', {_cpu.__file__!r}); "
        "module = util.module_from_spec(spec); spec.loader.exec_module(module); print(module.simd_level())"
    )
    for name in LEVELS:
        run = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PEFTK_SIMD": name}, capture_output=True)
        assert run.stdout.decode().strip() == name
    run = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PEFTK_SIMD": "mmx"}, capture_output=True)
    assert run.returncode != 0
    assert "PEFTK_SIMD: expected a SIMD level" in run.stderr.decode()
    assert "got 'mmx'" in run.stderr.decode()


def test_a_table_built_from_strided_pages(level: str) -> None:
    x, weight, bias = base(9, 20, 24, torch.float32, torch.float32)
    pool_A, pool_B = torch.randn(3, 16, 24), torch.randn(3, 16, 20)
    one = Adapter((pool_A[2], pool_A[0, :5]), (pool_B[2].t(), pool_B[0, :5].t()), 0.5)
    built = table.build((one,), dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.zeros(9, dtype=torch.int32)
    y, _ = cpu.multi_lora_linear(x, weight, bias, built, ids)
    numerics.check(y, *expected(Case(x, weight, bias, (one,), ids)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapters_only_row_has_the_bits_of_one_among_many(level: str, dtype: torch.dtype) -> None:
    """Such rows read the factors page by page, in a different loop; so do a bank's pages, contiguous along N."""
    for R in (5, 16, 17, 33, 64, 100):
        for N, K, M in ((50, 40, 3), (130, 64, 40)):
            x, weight, _ = base(M, N, K, dtype, dtype)
            one = adapter(N, K, R, dtype)
            turned = dataclasses.replace(one, pages_B=(one.pages_B[0].t().contiguous().t(),))
            ids = torch.ones(M, dtype=torch.int32)
            ids[M // 2] = 0
            for a in (one, turned):
                both = table.build((a, a), dtype=dtype, device=x.device)
                mixed, _ = cpu.multi_lora_linear(x, weight, None, both, ids)
                same, _ = cpu.multi_lora_linear(x, weight, None, both, torch.ones_like(ids))
                assert torch.equal(mixed, same), (R, N, K, M)


def test_every_machine_has_the_portable_level() -> None:
    assert LEVELS[0] == "portable"


NO_MEMORY = """
import resource
import torch
from peftk import functional
torch.set_num_threads(1)
K = 20_000_000
x, W, A = (torch.zeros(1, K, dtype=torch.bfloat16) for _ in range(3))
B = torch.zeros(1, 1, dtype=torch.bfloat16)
functional.lora_linear(x[:, :8], W[:, :8], None, A[:, :8], B, backend="cpu")
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**25, resource.RLIM_INFINITY))
try:
    functional.lora_linear(x, W, None, A, B, dropout_p=0.5, backend="cpu")  # copies x, in fp32
except MemoryError:
    print("refused")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_without_memory_for_a_copy_it_raises() -> None:
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "refused"), done.stderr[-2000:]
