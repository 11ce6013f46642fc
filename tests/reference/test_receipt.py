"""Merge receipts: the forms of the code, their bytes per weight, copying and pickling."""

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
from peftk.reference import merge_code
from peftk.reference.merge import RAW, ZERO, factors
from peftk.reference.receipt import MergeReceipt, code_as_bytes
from tests.support.merge_cases import DTYPES, bits, check_receipt, merge_case


def merge_inputs(dtype: torch.dtype, N: int, K: int, r: int, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """W with elements of size 1 in `dtype`; A and B in fp32, so that elements of ΔW have size `ratio`."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(N, K, generator=generator).to(dtype)
    A = torch.randn(r, K, generator=generator) / r**0.5
    return W, A, torch.randn(N, r, generator=generator) * ratio


def bytes_per_weight(
    dtype: torch.dtype, N: int, K: int, r: int, ratio: float, backend: str = "cpu"
) -> tuple[float, MergeReceipt]:
    """The size of a receipt in bytes per weight, A and B included, and the receipt. Also checks that it restores W."""
    W, A, B = merge_inputs(dtype, N, K, r, ratio)
    before = W.clone()
    receipt = functional.merge_(W, A, B, backend=backend)
    tensors = (receipt.factors.lora_A, receipt.factors.lora_B, receipt.code, receipt.far, receipt.raw_values)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    assert sum(storages.values()) == receipt.nbytes, "the receipt keeps more memory alive than nbytes says"
    functional.unmerge_(W, receipt, backend=backend)
    assert torch.equal(bits(W), bits(before))
    return receipt.nbytes / W.numel(), receipt


# docs/merge.md has the figures for 4096 x 4096; A and B take 0.03 bytes per weight there, and 0.06 at 2048 x 2048
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2048, pytest.param(4096, marks=pytest.mark.full)])
def test_bytes_per_weight(dtype: torch.dtype, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """At most 0.6 bytes if |ΔW| ≤ |W|/4, and 1 byte if ΔW is much larger."""
    lines = []
    for ratio, limit in ((0.025, 0.6), (0.25, 0.6), (2.5, 0.7), (10.0, 1.0)):
        per_weight, receipt = bytes_per_weight(dtype, size, size, 16, ratio)
        lines.append(
            f"  {dtype} {size}² |ΔW|/|W| {ratio:<5}: {per_weight:.3f} bytes per weight, far {len(receipt.far)}"
        )
        assert per_weight <= limit, lines[-1]
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_every_code_comes_back() -> None:
    """All 256 codes at even and odd columns, with widths around those of every SIMD register."""
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
    """+0 has its own code of four bits."""
    W, A, B = merge_inputs(torch.bfloat16, 256, 256, 4, 0.25)
    W[torch.rand(256, 256) < 0.9] = 0.0
    receipt = functional.merge_(W, A, B)
    assert receipt.code.nbytes == W.numel() // 2
    assert receipt.far.nbytes < W.numel() // 100


RATIOS = {None: 1.0, "bytes": 100.0, "weights": 1e5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", RATIOS, ids=str)
def test_the_smallest_form_on_every_backend(dtype: torch.dtype, form: str | None) -> None:
    """In each form, the backends write the same receipt, and any backend can unmerge and remerge with it."""
    form = form if form != "weights" or dtype != torch.float16 else "bytes"  # the largest fp16 number is 65504
    for K in (64, 65):
        W, A, B = merge_inputs(dtype, 40, K, 4, RATIOS[form])
        receipts = {}
        for name in ("cpu", "reference"):
            weight = W.clone()
            receipts[name] = functional.merge_(weight, A, B, backend=name)
        check_receipt(receipts["cpu"], receipts["reference"])
        receipt = receipts["cpu"]
        assert receipt.code.dtype == (torch.uint8 if form is None else torch.int8)
        assert (form == "weights") == (receipt.code.numel() == 0) == (len(receipt.raw_values) == W.numel())
        correction = receipt.nbytes - A.nbytes - B.nbytes
        assert correction <= min(W.numel() + receipt.raw_values.nbytes, W.nbytes)
        for first, second in itertools.product(("cpu", "reference"), repeat=2):
            merged = weight.clone()
            again = functional.remerge_(merged, receipts[first], A, B / RATIOS[form], 0.5, backend=second)
            functional.unmerge_(merged, again, backend=first)
            assert torch.equal(bits(merged), bits(W))
            merged = weight.clone()
            functional.unmerge_(merged, receipts[first], backend=second)
            assert torch.equal(bits(merged), bits(W))


def test_ways_to_keep_a_receipt() -> None:
    W, A, B = merge_inputs(torch.bfloat16, 40, 65, 4, 1.0)
    merged = W.clone()
    receipt = functional.merge_(merged, A, B)
    assert (receipt.shape, receipt.dtype, receipt.device) == (W.shape, W.dtype, W.device)
    for kept in (copy.deepcopy(receipt), pickle.loads(pickle.dumps(receipt)), receipt.to(torch.device("cpu"))):
        check_receipt(kept, receipt)
        assert kept.nbytes == receipt.nbytes
        back = merged.clone()
        functional.unmerge_(back, kept)
        assert torch.equal(bits(back), bits(W))


def test_inconsistent_receipts() -> None:
    W, A, B = merge_inputs(torch.float32, 60, 65, 4, 3.0)
    before = W.clone()
    receipt = functional.merge_(W, A, B)
    assert len(receipt.raw_values) > 5
    merged = W.clone()
    no_raw = receipt.far[receipt.far != RAW]
    for wrong in (
        dataclasses.replace(receipt, far=receipt.far[:-1]),
        dataclasses.replace(receipt, far=torch.cat([receipt.far, receipt.far[:1]])),
        dataclasses.replace(receipt, raw_values=receipt.raw_values[1:]),
        dataclasses.replace(receipt, far=torch.cat([no_raw, no_raw[: len(receipt.far) - len(no_raw)]])),
    ):
        for backend in ("cpu", "reference"):
            for call in (
                lambda: functional.unmerge_(W, wrong, backend=backend),  # noqa: B023
                lambda: functional.remerge_(W, wrong, A, B, backend=backend),  # noqa: B023
            ):
                with pytest.raises(ValueError, match="receipt: expected"):
                    call()
                assert torch.equal(bits(W), bits(merged))
    functional.unmerge_(W, receipt)
    assert torch.equal(bits(W), bits(before))


@pytest.mark.parametrize("form", ["bytes", "weights"])
def test_no_memory_for_the_smallest_form(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """W is already merged at that point, and is restored."""
    W, A, B = merge_inputs(torch.bfloat16, 40, 64, 4, RATIOS[form])
    before = W.clone()

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(merge, f"with_{form}", no_memory)
    with pytest.raises(MemoryError):
        functional.merge_(W, A, B)
    assert torch.equal(bits(W), bits(before))


def test_halves_of_the_kernels_are_the_references(level: str) -> None:
    """On weights with all corner cases, so that nearly all codes and raw weights occur."""
    seen: set[int] = set()
    for seed, dtype in itertools.product(range(3), DTYPES):
        case = merge_case(seed, 61, 330, 7, dtype, torch.float32, size=2.0, padding=seed)
        case.weight.clamp_(-1e4, 1e4)
        ours, theirs = case.weight.clone(), case.weight.clone()
        receipt = cpu.merge_(ours, case.factors)
        check_receipt(receipt, reference_backend.merge_(theirs, case.factors))
        code, raw_index = code_as_bytes(receipt)
        assert torch.equal(code.flatten()[raw_index], torch.full((len(raw_index),), RAW, dtype=torch.int8))
        seen |= set(code.unique().tolist())
    assert len(seen) > 200


def test_two_adapters_of_one_receipt() -> None:
    """The shape of W follows from A and B."""
    side = factors([torch.ones(1, 9), torch.ones(2, 9)], [torch.ones(4, 1), torch.ones(4, 2)], [1.0, 0.5])
    assert cpu.merge_(torch.ones(4, 9), side).shape == (4, 9)
