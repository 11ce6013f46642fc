"""What a merge's receipt holds: the forms of its code, how many bytes per weight they take, and ways to keep it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from torch import Tensor

from peftk import functional
from peftk.backends import cpu
from peftk.backends import reference as reference_backend
from peftk.ops import merge
from peftk.reference import merge_code, receipt
from peftk.reference.merge import RAW, ZERO, factors
from peftk.reference.receipt import MergeReceipt
from tests.support.merge_cases import DTYPES, bits, check_receipt, merge_case


def sized(dtype: torch.dtype, N: int, K: int, r: int, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """W of size 1, and A and B with ΔW of size `ratio`, elementwise; in fp32."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(N, K, generator=generator).to(dtype)
    A = torch.randn(r, K, generator=generator) / r**0.5
    return W, A, torch.randn(N, r, generator=generator) * ratio


def held_per_weight(
    dtype: torch.dtype, N: int, K: int, r: int, ratio: float, backend: str = "cpu"
) -> tuple[float, MergeReceipt]:
    """Bytes a weight of a receipt, everything counted, after it has brought W back."""
    W, A, B = sized(dtype, N, K, r, ratio)
    before = W.clone()
    left = functional.merge_(W, A, B, backend=backend)
    tensors = (left.factors.lora_A, left.factors.lora_B, left.code, left.far, left.raw_values)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    assert sum(storages.values()) == left.nbytes, "more memory is kept alive than is said"
    functional.unmerge_(W, left, backend=backend)
    assert torch.equal(bits(W), bits(before))
    return left.nbytes / W.numel(), left


# measured at 4096 x 4096 in docs/merge.md; A and B are 0.03 bytes per weight there and 0.06 at 2048 x 2048
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2048, pytest.param(4096, marks=pytest.mark.full)])
def test_bytes_per_weight(dtype: torch.dtype, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """At most 0.6 where |ΔW| ≤ |W|/4, and 1 far beyond."""
    lines = []
    for ratio, most in ((0.025, 0.6), (0.25, 0.6), (2.5, 0.7), (10.0, 1.0)):
        held, left = held_per_weight(dtype, size, size, 16, ratio)
        lines.append(f"  {dtype} {size}² |ΔW|/|W| {ratio:<5}: {held:.3f} bytes per weight, far {len(left.far)}")
        assert held <= most, lines[-1]
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_every_code_comes_back() -> None:
    """All 256 codes at even and odd columns, widths around those of every register, by torch and by the kernels."""
    every = torch.arange(-128, 128).to(torch.int8)
    for K in (1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256):
        code = torch.stack([every.roll(shift)[torch.arange(K) % 256] for shift in range(0, 256, 3)])
        halves, far = merge_code.pack(code)
        assert halves.shape == (code.shape[0], (K + 1) // 2)
        assert halves.dtype == torch.uint8
        assert torch.equal(far, code[((code < -7) | (code > 6)) & (code != ZERO)])
        assert torch.equal(merge_code.unpack(halves, far, K), code)
        assert K % 2 == 0 or not bool((halves[:, -1] >> 4).any())
    with pytest.raises(ValueError, match=r"receipt: expected \d+ far codes"):
        merge_code.unpack(halves, far[1:], K)


def test_pruned_weights_take_half_a_byte() -> None:
    """+0 has a half of its own."""
    W, A, B = sized(torch.bfloat16, 256, 256, 4, 0.25)
    W[torch.rand(256, 256) < 0.9] = 0.0
    left = functional.merge_(W, A, B)
    assert left.code.nbytes == W.numel() // 2
    assert left.far.nbytes < W.numel() // 100


RATIOS = {None: 1.0, "bytes": 100.0, "weights": 1e5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", RATIOS, ids=str)
def test_the_smallest_form_on_every_backend(dtype: torch.dtype, form: str | None) -> None:
    """Whichever it is, receipts are the same and serve to unmerge and to merge anew, on any backend."""
    form = form if form != "weights" or dtype != torch.float16 else "bytes"  # fp16 ends at 65504
    for K in (64, 65):
        W, A, B = sized(dtype, 40, K, 4, RATIOS[form])
        left = {}
        for name in ("cpu", "reference"):
            weight = W.clone()
            left[name] = functional.merge_(weight, A, B, backend=name)
        check_receipt(left["cpu"], left["reference"])
        mine = left["cpu"]
        assert mine.code.dtype == (torch.uint8 if form is None else torch.int8)
        assert (form == "weights") == (mine.code.numel() == 0) == (len(mine.raw_values) == W.numel())
        correction = mine.nbytes - A.nbytes - B.nbytes
        assert correction <= min(W.numel() + mine.raw_values.nbytes, W.nbytes)
        for first, second in itertools.product(("cpu", "reference"), repeat=2):
            merged = weight.clone()
            again = functional.remerge_(merged, left[first], A, B / RATIOS[form], 0.5, backend=second)
            functional.unmerge_(merged, again, backend=first)
            assert torch.equal(bits(merged), bits(W))
            merged = weight.clone()
            functional.unmerge_(merged, left[first], backend=second)
            assert torch.equal(bits(merged), bits(W))


def test_ways_to_keep_a_receipt() -> None:
    W, A, B = sized(torch.bfloat16, 40, 65, 4, 1.0)
    merged = W.clone()
    left = functional.merge_(merged, A, B)
    assert (left.shape, left.dtype, left.device) == (W.shape, W.dtype, W.device)
    for kept in (copy.deepcopy(left), pickle.loads(pickle.dumps(left)), left.to(torch.device("cpu"))):
        check_receipt(kept, left)
        assert kept.nbytes == left.nbytes
        back = merged.clone()
        functional.unmerge_(back, kept)
        assert torch.equal(bits(back), bits(W))


def test_receipts_that_do_not_hold_together() -> None:
    W, A, B = sized(torch.float32, 60, 65, 4, 3.0)
    before = W.clone()
    left = functional.merge_(W, A, B)
    assert len(left.raw_values) > 5
    merged = W.clone()
    no_raw = left.far[left.far != RAW]
    for wrong in (
        dataclasses.replace(left, far=left.far[:-1]),
        dataclasses.replace(left, far=torch.cat([left.far, left.far[:1]])),
        dataclasses.replace(left, raw_values=left.raw_values[1:]),
        dataclasses.replace(left, far=torch.cat([no_raw, no_raw[: len(left.far) - len(no_raw)]])),
    ):
        for backend in ("cpu", "reference"):
            for call in (
                lambda: functional.unmerge_(W, wrong, backend=backend),  # noqa: B023
                lambda: functional.remerge_(W, wrong, A, B, backend=backend),  # noqa: B023
            ):
                with pytest.raises(ValueError, match="receipt: expected"):
                    call()
                assert torch.equal(bits(W), bits(merged))
    functional.unmerge_(W, left)
    assert torch.equal(bits(W), bits(before))


@pytest.mark.parametrize("form", ["bytes", "weights"])
def test_no_memory_for_the_smallest_form(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """W has been merged by then, and is brought back."""
    W, A, B = sized(torch.bfloat16, 40, 64, 4, RATIOS[form])
    before = W.clone()

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(merge, f"with_{form}", no_memory)
    with pytest.raises(MemoryError):
        functional.merge_(W, A, B)
    assert torch.equal(bits(W), bits(before))


def test_halves_of_the_kernels_are_the_references(level: str) -> None:
    """From weights with all corner cases, where every code and raw weights occur."""
    seen: set[int] = set()
    for seed, dtype in itertools.product(range(3), DTYPES):
        case = merge_case(seed, 61, 330, 7, dtype, torch.float32, size=2.0, padding=seed)
        case.weight.clamp_(-1e4, 1e4)
        ours, theirs = case.weight.clone(), case.weight.clone()
        left = cpu.merge_(ours, case.factors)
        check_receipt(left, reference_backend.merge_(theirs, case.factors))
        code, places = receipt.bytewise(left)
        assert torch.equal(code.flatten()[places], torch.full((len(places),), RAW, dtype=torch.int8))
        seen |= set(code.unique().tolist())
    assert len(seen) > 200


def test_two_adapters_of_one_receipt() -> None:
    """The shape of W is known from A and B alone."""
    side = factors([torch.ones(1, 9), torch.ones(2, 9)], [torch.ones(4, 1), torch.ones(4, 2)], [1.0, 0.5])
    assert cpu.merge_(torch.ones(4, 9), side).shape == (4, 9)
