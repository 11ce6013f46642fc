"""csrc/cuda/lora_linear.cu on the host, through peftk.backends.cuda, against the fp64 reference and its error bound."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import peftk
from peftk import _cuda, functional
from peftk.adapters import table
from peftk.adapters.adapter import Adapter
from peftk.backends import cuda as backend
from peftk.backends import reference
from peftk.backends.call import BackendError
from peftk.launch import workspace
from tests.support import numerics
from tests.support.calls import call
from tests.support.cases import Case, decode_adapter, decode_case, double, expected, normal
from tests.support.executor import Executor
from tests.support.tiers import FULL, spread

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def run(case: Case, *, save_z: bool = False) -> tuple[Tensor, Tensor | None]:
    assert case.weight is not None
    if case.ids is None:
        return backend.lora_linear(case.x, case.weight, case.bias, case.adapters[0], save_z=save_z)
    return backend.multi_lora_linear(case.x, case.weight, case.bias, case.table(), case.ids, save_z=save_z)


def check(case: Case, executor: Executor) -> None:
    executor.reset()
    y, _ = run(case)
    assert executor.statistics.launches == 1
    assert executor.statistics.bank_conflicts == 0
    try:
        numerics.check(y, *expected(case))
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error
    assert not any(counters.any() for counters in workspace._of_stream.values()), f"{case}: a counter was left"


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretends that the GPU has `count` processors: more processors give more splits."""
    return lambda count: monkeypatch.setattr(workspace, "processors", lambda device: count)


@pytest.mark.parametrize("seed", spread(range(60), default=30))
def test_random(executor: Executor, processors: Callable[[int], None], seed: int) -> None:
    executor.seed(seed)
    processors((1, 4, 30, 132)[seed % 4])
    check(decode_case(seed), executor)


@pytest.mark.parametrize("seed", spread(range(1000, 1300), default=0, full=60))
def test_random_more(executor: Executor, processors: Callable[[int], None], seed: int) -> None:
    executor.seed(seed)
    processors((1, 4, 30, 132)[seed % 4])
    check(decode_case(seed), executor)


BORDERS = {1, 2, *(M + step for M in (8, 16, 24, 32, 48, 56) for step in (-1, 0, 1)), 63, 64}


@pytest.mark.parametrize("M", [pytest.param(M, marks=() if M in BORDERS else FULL) for M in range(1, 65)])
def test_every_number_of_rows(executor: Executor, M: int) -> None:
    rng = random.Random(M)
    adapters = tuple(decode_adapter(rng, 66, 72, BF16, rank) for rank in (5, 0, 20))
    ids = torch.tensor([rng.choice([-1, 0, 1, 2]) for _ in range(M)], dtype=torch.int32)
    x, weight = normal(M, 72, dtype=BF16, seed=M), normal(66, 72, dtype=BF16, seed=0, scale=72**-0.5)
    check(Case(x, weight, None, adapters, ids), executor)
    check(Case(x, weight, None, adapters[:1], None), executor)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_saved_z(executor: Executor, processors: Callable[[int], None], dtype: torch.dtype, count: int) -> None:
    """z [M, 16 · pages] in the original order of rows, 0 where a row has no such rank, as a backward needs it."""
    processors(132)
    rng = random.Random(count)
    x, weight = normal(19, 264, dtype=dtype, seed=1), normal(40, 264, dtype=dtype, seed=2, scale=264**-0.5)
    adapters = tuple(decode_adapter(rng, 40, 264, dtype, rank) for rank in (21, 3, 40)[:count])
    ids = torch.tensor([i % (count + 1) - 1 for i in range(19)], dtype=torch.int32) if count > 1 else None
    case = Case(x, weight, None, adapters, ids)
    _, z = run(case, save_z=True)
    assert z is not None
    assert z.dtype == F32
    assert z.shape == (19, 48 if count > 1 else 21)
    wide = Case(x.double(), weight.double(), None, tuple(map(double, adapters)), ids)
    if ids is None:
        _, expected_z = reference.lora_linear(wide.x, wide.weight, None, wide.adapters[0], save_z=True)
    else:
        _, expected_z = reference.multi_lora_linear(wide.x, wide.weight, None, wide.table(), ids, save_z=True)
    assert expected_z is not None
    magnitude = torch.zeros_like(expected_z)
    for row, i in enumerate(case.all_ids().tolist()):
        if i >= 0:
            A, bias = adapters[i].lora_A, adapters[i].bias_A
            assert A is not None
            sums = x[row].double().abs() @ A.double().abs().t()
            magnitude[row, : A.shape[0]] = sums if bias is None else sums + bias.double().abs()
    numerics.check(z.double(), expected_z, magnitude, 264, dtype=F32)
    assert torch.equal(z == 0, expected_z == 0), "a place without a rank is not 0"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("adapter_dtype", [BF16, F32], ids=str)
def test_an_adapter_with_inf_or_nan_keeps_it_to_its_rows(value: float, adapter_dtype: torch.dtype) -> None:
    rng = random.Random(0)
    x, weight = normal(20, 64, dtype=BF16, seed=1), normal(70, 64, dtype=BF16, seed=2)
    good = [decode_adapter(rng, 70, 64, adapter_dtype, rank) for rank in (18, 5, 16)]
    ids = torch.tensor([i % 4 - 1 for i in range(20)], dtype=torch.int32)
    y, _ = run(Case(x, weight, None, tuple(good), ids))
    for name in ("pages_A", "pages_B"):
        (tensor,) = getattr(good[1], name)
        broken = dataclasses.replace(good[1], **{name: (tensor.clone().fill_(value),)})
        bad, _ = run(Case(x, weight, None, (good[0], broken, good[2]), ids))
        others = ids != 1
        assert torch.equal(bad[others], y[others]), name
        assert not bad[~others].isfinite().all(), name


def test_infinity_stays_infinity() -> None:
    """v = inf has inf in its first term and 0 in the others, so y is inf and not NaN."""
    x, weight = torch.ones(1, 8, dtype=BF16), torch.zeros(1, 8, dtype=BF16)
    A, B = torch.full((1, 8), float("inf"), dtype=BF16), torch.ones(1, 1, dtype=BF16)
    y, _ = run(Case(x, weight, None, (Adapter((A,), (B,), 1.0),), None))
    assert y.item() == float("inf")


@pytest.mark.parametrize("columns", [(0, 64, 128, 192), (0, 17, 30, 95)], ids=str)
def test_packed_outputs(executor: Executor, columns: tuple[int, ...]) -> None:
    """Slices of y's columns with their own adapters and pages of z."""
    rng = random.Random(columns[1])
    slices = [
        [decode_adapter(rng, to - start, 72, BF16, rank) for rank in ranks]
        for start, to, ranks in zip(columns, columns[1:], ((3, 20), (33, 0), (16, 16)), strict=False)
    ]
    x = normal(11, 72, dtype=BF16, seed=1)
    weight = normal(columns[-1], 72, dtype=BF16, seed=2, scale=72**-0.5)
    ids = torch.tensor([i % 3 - 1 for i in range(11)], dtype=torch.int32)
    case = Case(x, weight, normal(columns[-1], dtype=BF16, seed=3), tuple(a for s in slices for a in s), ids, columns)
    check(case, executor)


def test_an_infinite_slice_leaves_its_neighbour_alone() -> None:
    rng = random.Random(0)
    x, weight = normal(3, 64, dtype=BF16, seed=1), normal(40, 64, dtype=BF16, seed=2)
    good = [decode_adapter(rng, 17, 64, BF16, 4), decode_adapter(rng, 23, 64, BF16, 4)]
    ids = torch.zeros(3, dtype=torch.int32)
    y, _ = run(Case(x, weight, None, tuple(good), ids, (0, 17, 40)))
    infinite = dataclasses.replace(good[0], pages_A=(torch.full_like(good[0].pages_A[0], float("inf")),))
    bad, _ = run(Case(x, weight, None, (infinite, good[1]), ids, (0, 17, 40)))
    assert torch.equal(bad[:, 17:], y[:, 17:])


def test_pages_of_a_bank() -> None:
    """Pages of a bank: anywhere in the pool, B stored by ranks. Through the public layer."""
    layer = peftk.MultiLoRALinear.from_linear(torch.nn.Linear(64, 70, dtype=BF16), max_adapters=4)
    ranks = (3, 40, 16)
    for i, rank in enumerate(ranks):
        A, B = normal(rank, 64, dtype=BF16, seed=i, scale=0.1), normal(70, rank, dtype=BF16, seed=i + 9, scale=0.1)
        layer.add_adapter(f"{i}", A, B, scaling=2.0)
    x = normal(9, 64, dtype=BF16, seed=5)
    ids = torch.tensor([layer.adapter_id(f"{i % 3}") if i % 4 else -1 for i in range(9)])
    arguments = x, layer.weight, layer.bias, layer.bank, ids
    with torch.no_grad():
        ours = functional.multi_lora_linear(*arguments, backend="cuda")
        theirs = functional.multi_lora_linear(*arguments, backend="reference")
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("seed", range(3))
def test_same_bits_in_every_schedule(executor: Executor, processors: Callable[[int], None], seed: int) -> None:
    processors(132)
    case = decode_case(seed + 500, M=20 + seed)
    results = set()
    for resident in (1, 2, 0, 0, 0):
        executor.limit_resident(resident)
        executor.seed(len(results) + 17 * resident)
        y, z = run(case, save_z=True)
        results.add((y.view(torch.int16).numpy().tobytes(), b"" if z is None else z.contiguous().numpy().tobytes()))
    assert len(results) == 1


def test_ids_outside_mean_the_base_layer() -> None:
    """On a GPU ids are not checked before the launch; an invalid id must not access memory."""
    rng = random.Random(1)
    case = Case(
        normal(6, 64, dtype=BF16, seed=1),
        normal(40, 64, dtype=BF16, seed=2),
        None,
        (decode_adapter(rng, 40, 64, BF16, 5), None),
        torch.tensor([0, 2, -7, 2**31 - 1, -(2**31), 1], dtype=torch.int32),
    )
    y, _ = run(case)
    inside = dataclasses.replace(case, ids=torch.tensor([0, -1, -1, -1, -1, -1], dtype=torch.int32))
    assert torch.equal(y, run(inside)[0])


def with_gaps(tensor: Tensor) -> Tensor:
    """The same values, with other values between them."""
    return torch.stack([tensor, torch.full_like(tensor, 99.0)], dim=-1)[..., 0]


def test_tensors_with_gaps_are_copied() -> None:
    """Tensors that the kernel needs dense: the same bits as from dense tensors."""
    weight = normal(40, 64, dtype=BF16, seed=1, scale=0.1)
    dense = [normal(5, 64, dtype=BF16, seed=2, scale=0.1), normal(40, 5, dtype=BF16, seed=3)]
    biases = [normal(5, dtype=BF16, seed=4), normal(40, dtype=BF16, seed=5)]
    bias, x = normal(40, dtype=BF16, seed=6), normal(4, 64, dtype=BF16, seed=7)
    expected, _ = run(Case(x, weight, bias, (Adapter((dense[0],), (dense[1],), 1.5, "relu", *biases),), None))
    A, B, a, b = map(with_gaps, (*dense, *biases))
    y, _ = run(Case(x, weight, with_gaps(bias), (Adapter((A,), (B,), 1.5, "relu", a, b),), None))
    assert torch.equal(y, expected)


def test_any_strides_and_addresses_of_x() -> None:
    """Gaps between columns or rows, rows at addresses that are not multiples of 16, one row expanded."""
    weight, row = normal(40, 64, dtype=BF16, seed=1, scale=0.1), normal(1, 64, dtype=BF16, seed=2)
    wide = normal(4, 68, dtype=BF16, seed=3)
    for x in (
        wide[:, :64],
        wide[:, 1:65],
        wide[:, :64].t().contiguous().t(),
        with_gaps(wide[:, :64]),
        row.expand(4, 64),
    ):
        expected, _ = run(Case(x.contiguous(), weight, None, (None,), None))
        assert torch.equal(run(Case(x, weight, None, (None,), None))[0], expected)


def with_layout(tensor: Tensor, rows_apart: int, columns_apart: int, first: int) -> Tensor:
    """The same values with these strides, from element `first` of a heap block that ends with the last value."""
    rows, columns = tensor.shape
    block = torch.full((first + (rows - 1) * rows_apart + (columns - 1) * columns_apart + 1,), 99.0, dtype=tensor.dtype)
    return block[first:].as_strided(tensor.shape, (rows_apart, columns_apart)).copy_(tensor)


def layouts(rows: int, columns: int) -> list[tuple[int, int, int]]:
    """Dense rows, rows with even and odd gaps, transposed, gaps between columns; at odd addresses."""
    by_rows = [(columns + more, 1) for more in (0, 1, 2, 3, 4, 7, 8, 12)]
    strides = [*by_rows, (1, rows), (1, rows + 3), (2 * columns + 1, 2)]
    return [(*two, first) for two in strides for first in (0, 1, 4)]


@pytest.mark.parametrize("many", [False, True])
def test_any_layout(many: bool) -> None:
    """The public functions give the bits of a dense tensor or, for W, say what is wrong."""
    shapes = {"x": (3, 64), "weight": (40, 64), "A": (5, 64), "B": (40, 5)}
    dense = {name: normal(*shape, dtype=BF16, seed=i, scale=0.1) for i, (name, shape) in enumerate(shapes.items())}

    def served(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        with torch.no_grad():
            if not many:
                return functional.lora_linear(x, weight, None, A, B, 2.0, backend="cuda")
            made = table.build((Adapter((A,), (B,), 2.0),), dtype=BF16, device=x.device)
            return functional.multi_lora_linear(x, weight, None, made, torch.tensor([0, -1, 0]), backend="cuda")

    expected = served(**dense)
    for name, tensor in dense.items():
        for layout in layouts(*tensor.shape):
            moved = with_layout(tensor, *layout)
            if name == "A" and many and moved.stride(1) != 1:  # which no table can have
                continue
            if name == "weight" and (moved.stride(1) != 1 or moved.stride(0) % 8 or moved.data_ptr() % 16):
                with pytest.raises(BackendError, match="start at multiples of 16 bytes"):
                    served(**{**dense, name: moved})
            else:
                assert torch.equal(served(**{**dense, name: moved}), expected), (name, layout)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_of_either_dtype_and_any_stride(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    adapters = tuple(decode_adapter(rng, 40, 64, BF16, rank) for rank in (5, 16, 9))
    x, weight = normal(5, 64, dtype=BF16, seed=1), normal(40, 64, dtype=BF16, seed=2, scale=0.1)
    ids = torch.tensor([2, 0, -1, 1, 0], dtype=torch.int32)
    expected, _ = run(Case(x, weight, None, adapters, ids))
    assert torch.equal(run(Case(x, weight, None, adapters, with_gaps(ids.to(dtype))))[0], expected)


@pytest.mark.parametrize("M", [8, 16, 32, 64])
def test_splits_at_every_height(executor: Executor, processors: Callable[[int], None], M: int) -> None:
    """Two tiles of each kind, so that their parts are side by side."""
    processors(132)
    K = 64 * M
    plan = _cuda.plan_lora_linear(M, 70, K, 2, 132)
    assert plan.expand_splits == 2
    assert plan.shrink_splits > 1
    x, weight = normal(M, K, dtype=BF16, seed=1), normal(70, K, dtype=BF16, seed=2, scale=K**-0.5)
    adapters = tuple(decode_adapter(random.Random(M), 70, K, BF16, rank) for rank in (20, 3))
    ids = torch.tensor([m % 3 - 1 for m in range(M)], dtype=torch.int32)
    check(Case(x, weight, None, adapters, ids), executor)


def test_long_sums_of_one_sign(executor: Executor, processors: Callable[[int], None]) -> None:
    """Truncation errors of tensor cores add up there. A bias that cancels nearly all of y makes them visible."""
    processors(1)
    K = 65536
    x, weight, A = (normal(rows, K, dtype=BF16, seed=rows).abs() for rows in (1, 2, 3))
    exact = (x.double() @ weight.double().t())[0]
    check(Case(x, weight, -exact.float(), (None,), None), executor)
    for adapter_dtype in (BF16, F32):
        B = torch.zeros(2, 3, dtype=adapter_dtype)
        _, z = run(Case(x, weight, None, (Adapter((A.to(adapter_dtype),), (B,), 1.0),), None), save_z=True)
        assert z is not None
        expected_z = x.double() @ A.double().t()
        numerics.check(z.double(), expected_z, expected_z, K, dtype=F32)


def test_more_counters_than_a_stream_begins_with(executor: Executor) -> None:
    N = 64 * 1024
    x, weight = normal(1, 8, dtype=BF16, seed=1), normal(N, 8, dtype=BF16, seed=2)
    workspace.forget(x.device)
    A, B = normal(1, 8, dtype=BF16, seed=3), normal(N, 1, dtype=BF16, seed=4)
    check(Case(x, weight, None, (Adapter((A,), (B,), 1.0),), None), executor)


def test_through_the_public_functions() -> None:
    x, weight = normal(2, 3, 64, dtype=BF16, seed=1), normal(40, 64, dtype=BF16, seed=2, scale=0.1)
    A, B = normal(8, 64, dtype=BF16, seed=3, scale=0.1), normal(40, 8, dtype=BF16, seed=4, scale=0.1)
    ours = functional.lora_linear(x, weight, None, A, B, 2.0, backend="cuda")
    theirs = functional.lora_linear(x, weight, None, A, B, 2.0, backend="reference")
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"M": 65}, "1 to 64 rows, got 65"),
        ({"M": 0}, "1 to 64 rows, got 0"),
        ({"K": 60}, "multiple of 8"),
        ({"aligned": False}, "multiples of 16 bytes"),
        ({"dropout": True}, "no dropout"),
        ({"x_dtype": F32}, "both bfloat16 or both float16"),
        ({"adapter_dtype": F16}, "needs adapters in"),
        ({"op": "adapter_block"}, "no CUDA C"),
        ({"device": "cuda"}, "runs on cpu tensors"),
    ],
)
def test_unsupported_calls_are_explained(change: dict[str, object], reason: str) -> None:
    made = {"dtype": BF16, "rank": 16}
    assert backend.cannot_run(call(**made)) is None
    assert "1 launch" in backend.describe(call(**made))
    assert reason in str(backend.cannot_run(call(**{**made, **change})))


@pytest.mark.parametrize("op", ["lora_linear", "multi_lora_linear", "merge", "unmerge", "segments"])
def test_older_gpus_are_unsupported(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """No kernel is built for them: a launch would fail, while another backend can compute the call."""
    monkeypatch.setattr(_cuda, "device", "cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = call(op, device="cuda", dtype=BF16, rank=16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert backend.cannot_run(asked) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0" in str(backend.cannot_run(asked))


def test_the_launcher_refuses_what_no_kernel_is_built_for() -> None:
    def launch(
        M: int = 4,
        K: int = 64,
        dtype: torch.dtype = BF16,
        low: torch.dtype = BF16,
        shifts: tuple[int, int] = (0, 0),
        gaps: tuple[int, int] = (0, 0),
    ) -> None:
        x, weight = (torch.zeros(8 * (K + 4) + 1, dtype=dtype)[shift:] for shift in shifts)
        x_stride, weight_stride = (K + more for more in gaps)
        plan = _cuda.plan_lora_linear(M, 8, K, 0, 4)
        none = _cuda.Adapters.none(dtype=backend.DTYPES[low])
        y = torch.full((M, 8), 3.0, dtype=dtype)
        code = backend.DTYPES[dtype]
        counters = torch.zeros(plan.counters, dtype=torch.int32)
        addresses = x.data_ptr(), x_stride, weight.data_ptr(), weight_stride, 0, 0, y.data_ptr(), 0, False, 0
        try:
            _cuda.lora_linear(*addresses, none, M, 8, K, code, plan, 0, counters.data_ptr(), 0, 0)
        finally:
            right = (M, K, dtype, low) == (4, 64, BF16, BF16) and not any((*shifts, *gaps))
            assert (y == (0 if right else 3)).all()

    launch()
    for arguments, message in (
        ({"M": 65}, "M: expected 1 ... 64 rows"),
        ({"K": 60}, "K: expected a multiple of 8"),
        ({"dtype": F32}, "dtype: expected a combination"),
        ({"low": F16}, "dtype: expected a combination"),
        *(
            ({name: pair}, "rows that start at multiples of 16 bytes")
            for name, one in (("shifts", 1), ("gaps", 4))
            for pair in ((one, 0), (0, one))
        ),
    ):
        with pytest.raises(ValueError, match=message):
            launch(**arguments)  # type: ignore[arg-type]


def test_plans_leave_no_split_empty_and_parts_small() -> None:
    for M, N, K, pages, processors in itertools.product(
        (1, 8, 9, 64), (0, 1, 64, 1000, 4096, 28672), (8, 64, 136, 1000, 4096, 14336), (0, 1, 4, 32), (1, 132)
    ):
        plan = _cuda.plan_lora_linear(M, N, K, pages, processors)
        groups, tiles, rows = -(-M // 8) * pages, -(-N // 64), 8 if M <= 8 else 16 if M <= 16 else 64
        for steps, splits, step in ((-(-K // 128), plan.shrink_splits, 128), (-(-K // 64), plan.expand_splits, 64)):
            each = -(-steps // splits)
            assert (splits - 1) * each < steps, (M, N, K, pages, step)
        assert plan.shrink_tiles == groups * plan.shrink_splits
        assert plan.expand_tiles == tiles * plan.expand_splits
        assert plan.counters == 3 + groups + tiles
        shrink_parts = plan.shrink_tiles * 128 if plan.shrink_splits > 1 else 0
        expand_parts = plan.expand_tiles * rows * 64 if plan.expand_splits > 1 else 0
        assert plan.partials == shrink_parts + expand_parts
        assert expand_parts * 4 <= tiles * 64 * K * 2 / 16


def test_what_is_copied(executor: Executor) -> None:
    """W is copied once, in 16-byte copies; x once for each tile of 64 columns."""
    x, weight = normal(5, 256, dtype=BF16, seed=1), normal(192, 256, dtype=BF16, seed=2)
    run(Case(x, weight, None, (None,), None))
    assert executor.statistics.copies == 192 * 256 // 8 + 3 * 8 * 256 // 8
