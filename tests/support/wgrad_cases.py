"""Inputs of a backward's second launch, as the first launch leaves them, for small cases."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from peftk.adapters import activations, table
from peftk.adapters.adapter import PAGE, Adapter, Wanted
from peftk.adapters.dropout import Dropout
from peftk.backends import reference
from tests.support.cases import Case, double, normal


@dataclasses.dataclass
class Inputs:
    """Inputs of a backward's second launch, as the first launch leaves them."""

    case: Case
    dy: Tensor
    z: Tensor
    u: Tensor
    dropout: Dropout | None


def inputs(case: Case, *, dropout_p: float = 0.0) -> Inputs:
    M, N = case.x.shape[0], case.weight.shape[0]
    dy = normal(M, N, dtype=case.x.dtype, seed=77)
    dropout = Dropout(dropout_p, torch.tensor([0x123456789ABCDEF])) if dropout_p else None
    width = -(-max((a.rank for a in case.adapters if a is not None), default=0) // PAGE) * PAGE
    ids = torch.zeros(M, dtype=torch.int32) if case.ids is None else case.ids
    full = table.build(tuple(double(a) for a in case.adapters), dtype=torch.float64, device=case.x.device)
    _, z = reference.multi_lora_linear(
        case.x.double(), case.weight.double(), None, full, ids, dropout=dropout, save_z=True
    )
    u = torch.zeros(M, width, dtype=torch.float64)
    for index, a in enumerate(full.adapters):
        rows = (ids == index).nonzero().flatten()
        if a is not None and a.rank:
            slope = activations.derivative(a.activation, z[rows, : a.rank])
            u[rows, : a.rank] = (dy[rows].double() @ a.lora_B) * slope
    return Inputs(case, dy, z.float(), u.float(), dropout)


def all_wanted(a: Adapter | None) -> Wanted:
    if a is None:
        return Wanted(False, False, False, False)
    return Wanted(a.rank > 0, a.rank > 0, a.bias_A is not None, a.bias_B is not None)
