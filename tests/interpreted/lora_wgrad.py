"""All gradients in one Triton launch, in the interpreter, against the fp64 reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from peftk import activations, reference, table
from peftk.backends import triton as backend
from peftk.reference import AdapterGrads, Wanted
from peftk.table import PAGE, Adapter
from peftk.triton_kernels import config, workspace
from peftk.triton_kernels import lora_wgrad as kernels
from peftk.triton_kernels.segments import segments
from tests import numerics
from tests.cases import Case, double, expected_grads, random_case
from tests.interpreted.lora_linear import normal

GRADS = AdapterGrads._fields


@dataclasses.dataclass
class Inputs:
    """What the first launch of a backward leaves for the second."""

    case: Case
    dy: Tensor
    z: Tensor
    u: Tensor
    dropout_p: float
    seed: Tensor | None


def inputs(case: Case, *, dropout_p: float = 0.0) -> Inputs:
    M, N = case.x.shape[0], case.weight.shape[0]
    dy = normal(M, N, dtype=case.x.dtype, seed=77)
    seed = torch.tensor([0x123456789ABCDEF]) if dropout_p else None
    width = -(-max((a.rank for a in case.adapters if a is not None), default=0) // PAGE) * PAGE
    ids = torch.zeros(M, dtype=torch.int32) if case.ids is None else case.ids
    full = table.build(tuple(double(a) for a in case.adapters), dtype=torch.float64, device=case.x.device)
    _, z = reference.multi_lora_linear(
        case.x.double(), case.weight.double(), None, full, ids, dropout_p=dropout_p, seed=seed, save_z=True
    )
    u = torch.zeros(M, width, dtype=torch.float64)
    for index, a in enumerate(full.adapters):
        rows = (ids == index).nonzero().flatten()
        if a is not None and a.rank:
            slope = activations.derivative(a.activation, z[rows, : a.rank])
            u[rows, : a.rank] = (dy[rows].double() @ a.lora_B) * slope
    return Inputs(case, dy, z.float(), u.float(), dropout_p, seed)


def everything(a: Adapter | None) -> Wanted:
    if a is None:
        return Wanted(False, False, False, False)
    return Wanted(a.rank > 0, a.rank > 0, a.bias_A is not None, a.bias_B is not None)


def run(given: Inputs, wanted: list[Wanted] | None = None) -> list[AdapterGrads | None]:
    case = given.case
    if case.ids is None:
        adapters, _ = backend._one(case.adapters[0])
        order = None
    else:
        adapters, order = backend._many(case.table()), segments(case.ids, len(case.adapters))
    ranks = [None if a is None else a.rank for a in case.adapters]
    wanted = wanted or [everything(a) for a in case.adapters]
    plan = kernels.plan(ranks, wanted, case.x.dtype, case.x.device, many=case.ids is not None)
    grads = kernels.wgrad(
        given.dy, case.x, given.z, given.u, adapters, order, plan,
        dropout_p=given.dropout_p, seed=given.seed,
    )  # fmt: skip
    assert not any(counters.any() for counters in workspace._of_stream.values()), "a counter was left"
    return grads


def check(case: Case, *, dropout_p: float = 0.0) -> list[AdapterGrads | None]:
    given = inputs(case, dropout_p=dropout_p)
    grads = run(given)
    _, expected, _, magnitudes, terms = expected_grads(case, given.dy, dropout_p=dropout_p, seed=given.seed)
    assert len(grads) == len(case.adapters)
    for index, a in enumerate(case.adapters):
        if a is None:
            assert grads[index] is None
            continue
        for name, wants in zip(GRADS, everything(a), strict=True):
            actual = getattr(grads[index], name)
            assert (actual is not None) == wants, f"{case}: {name} of adapter {index}"
            if not wants:
                continue
            assert actual.dtype == case.adapter_dtype()
            assert actual.is_contiguous()
            try:
                numerics.check(actual, getattr(expected[index], name), getattr(magnitudes[index], name), terms)
            except AssertionError as error:
                raise AssertionError(f"{case}: {name} of adapter {index}: {error}") from error
    return grads


@pytest.fixture(params=[False, True], ids=["whole", "ranges"])
def ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments as they are, and cut into ranges of 16 rows."""
    if request.param:
        monkeypatch.setattr(config, "wgrad_range", lambda *_: 16)


@pytest.mark.parametrize("seed", range(16))
def test_random(seed: int, ranges: None) -> None:
    check(random_case(20_000 + seed, max_rows=40, max_width=80), dropout_p=0.25 if seed % 4 == 0 else 0.0)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(400))
def test_random_more(seed: int, ranges: None) -> None:
    check(random_case(30_000 + seed), dropout_p=0.25 if seed % 4 == 0 else 0.0)
