"""peftk.precision("field") in the interpreter: v and fp32 factors are rounded once to x's dtype, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

import peftk
from peftk import functional
from peftk.adapters.adapter import Adapter
from peftk.backends import triton as backend
from peftk.system import precision
from tests.support import numerics
from tests.support.cases import Case, expected, normal
from tests.support.cases import run as run_on
from tests.support.tiers import spread
from tests.support.triton_cases import BF16, F16, F32, adapter, make

UNIT = {BF16: 2.0**-8, F16: 2.0**-11}
MIXES = [(BF16, BF16, BF16), (BF16, BF16, F32), (F16, F16, F16), (F16, F16, F32)]


def run(case: Case) -> Tensor:
    return run_on(case, "triton")


def rounded(one: Adapter | None, dtype: torch.dtype) -> Adapter | None:
    """The adapter with fp32 factors rounded to dtype."""
    if one is None:
        return None
    pages = [tuple(page.to(dtype).to(page.dtype) for page in side) for side in (one.pages_A, one.pages_B)]
    return dataclasses.replace(one, pages_A=pages[0], pages_B=pages[1])


@pytest.mark.parametrize(("mix", "many"), spread(itertools.product(MIXES, (False, True)), default=2, full=6))
def test_rounded_once(mix: tuple[torch.dtype, torch.dtype, torch.dtype], many: bool) -> None:
    """Within the bound of the rounded factors and one rounding of v; outside the bound of exact products."""
    adapters = tuple(adapter(rank, 70, 37, mix[2], "identity", 9 * i, biases=False) for i, rank in enumerate((40, 20)))
    case = make(mix, adapters if many else adapters[:1], [0] * 9 + [1] * 10 if many else None)
    with peftk.precision("field"):
        y = run(case)
    seen = dataclasses.replace(case, adapters=tuple(rounded(each, mix[0]) for each in case.adapters))
    y_star, magnitude, terms = expected(seen)
    _, base_magnitude, _ = expected(dataclasses.replace(seen, adapters=(None,) * len(seen.adapters)))
    allowed = UNIT[mix[0]] * (magnitude - base_magnitude)  # |s v||B|
    error = (y.double() - y_star).abs()
    exact = UNIT[mix[0]] * y_star.abs() + 2 * terms**0.5 * 2.0**-24 * magnitude
    assert bool((error <= exact + allowed).all())
    assert bool((error > exact).any())
    numerics.check(run(case), *expected(case))


def test_z_is_of_rounded_factors() -> None:
    """z itself is a sum in fp32."""
    x, weight = normal(40, 32, dtype=BF16, seed=1), normal(24, 32, dtype=BF16, seed=2)
    one = Adapter((normal(5, 32, dtype=F32, seed=4),), (normal(24, 5, dtype=F32, seed=5),), 0.5)
    with peftk.precision("field"):
        _, z = backend.lora_linear(x, weight, None, one, save_z=True)
    A = one.pages_A[0].to(BF16).double()
    numerics.check(z, x.double() @ A.t(), x.double().abs() @ A.abs().t(), 32)


def test_gradients_of_B_are_of_a_rounded_v() -> None:
    x, weight, dy = (normal(*shape, dtype=BF16, seed=i) for i, shape in enumerate(((40, 32), (24, 32), (40, 24))))
    one = Adapter((normal(5, 32, dtype=F32, seed=4),), (normal(24, 5, dtype=F32, seed=5),), 0.5)
    with peftk.precision("field"):
        _, z = backend.lora_linear(x, weight, None, one, save_z=True)
        _, grads = backend.lora_linear_backward(dy, x, weight, one, z)
    v = z.to(BF16).double()
    numerics.check(grads.lora_B, 0.5 * dy.double().t() @ v, 0.5 * dy.double().abs().t() @ v.abs(), 40)


def test_gradients_are_rounded_once_too() -> None:
    x, weight, dy = (
        normal(40, 32, dtype=BF16, seed=1),
        normal(24, 32, dtype=BF16, seed=2),
        normal(40, 24, dtype=BF16, seed=3),
    )
    A, B = normal(5, 32, dtype=F32, seed=4), normal(24, 5, dtype=F32, seed=5)

    def gradients(name: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        with peftk.precision(name):
            y = functional.lora_linear(leaves[0], weight, None, leaves[1], leaves[2], 0.5, backend="triton")
            y.backward(dy)
        return [leaf.grad.double() for leaf in leaves]

    for exact, field in zip(gradients("exact"), gradients("field"), strict=True):
        assert not torch.equal(exact, field)
        assert float((exact - field).norm() / exact.norm()) < 2.0**-7


def test_fp32_calls_stay_exact() -> None:
    case = make((F32, F32, F32), (adapter(5, 70, 37, F32, "identity", 0),), None)
    exact = run(case)
    with peftk.precision("field"):
        assert torch.equal(run(case), exact)


def test_setting_and_block() -> None:
    assert not precision.field()
    with peftk.precision("field"):
        assert precision.field()
        with pytest.raises(ValueError, match=r"precision: expected 'exact' or 'field', got 'fast'"):
            peftk.precision("fast")
        assert precision.field()
    assert not precision.field()
    peftk.precision("field")
    with peftk.precision("exact"):
        assert not precision.field()
    assert precision.field()
    peftk.precision("exact")
    assert not precision.field()
