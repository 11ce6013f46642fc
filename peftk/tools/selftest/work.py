"""A call and its backward through the public functions, repeatable with new values in the same tensors."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import torch
from torch import Tensor

from peftk import functional
from peftk.adapters.adapter import Adapter, AdapterGrads
from peftk.adapters.dropout import dropout_from
from peftk.adapters.flat import flat_grads, flat_tensors
from peftk.backends import choice
from peftk.backends.call import Call, Op
from peftk.reference import bounds
from peftk.tools.selftest.cases import Case, expected, expected_grads
from peftk.tools.selftest.check import WrongError

Form = Literal["linear", "series", "packed"]


class Work:
    """A call on one backend. `run` returns y, dX and the adapters' gradients; `error` compares them with fp64.

    trains: if False, `run` returns only y.
    """

    def __init__(
        self, case: Case, backend: str, *, dropout_p: float = 0.0, need_dx: bool = True, trains: bool = True
    ) -> None:
        self.case, self.backend, self.dropout_p = case, backend, dropout_p
        x, need_dx = case.x, need_dx and trains
        x.requires_grad_(need_dx)
        self.trained = [t.requires_grad_() for t in flat_tensors(case.adapters)] if trains else []
        self.leaves = [x, *self.trained] if need_dx else self.trained
        self.table = None if case.ids is None else case.table()
        self.dy = torch.empty(x.shape[0], case.out_features, dtype=x.dtype, device=x.device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=x.device) if dropout_p else None
        _fill(self.dy, 0)
        if self.seed is not None:
            self.seed.fill_(0x123456789ABCDEF)

    def forward(self) -> Tensor:
        case = self.case
        rest: dict[str, Any] = {"dropout_p": self.dropout_p, "seed": self.seed, "backend": self.backend}
        if self.table is not None:
            assert case.ids is not None
            if case.weight is None:
                return functional.multi_adapter_block(case.x, self.table, case.ids, **rest)
            return functional.multi_lora_linear(case.x, case.weight, case.bias, self.table, case.ids, **rest)
        a = case.adapters[0] or Adapter((), (), 1.0)
        adapter = (a.lora_A, a.lora_B, a.scaling)
        rest |= {"activation": a.activation, "bias_A": a.bias_A, "bias_B": a.bias_B}
        if case.weight is None:
            return functional.adapter_block(case.x, *adapter, **rest)
        return functional.lora_linear(case.x, case.weight, case.bias, *adapter, **rest)

    def run(self) -> list[Tensor]:
        """y, dX if needed, and the gradients in the order of `peftk.adapters.flat.flat_tensors`."""
        y = self.forward()
        return [y.detach(), *(torch.autograd.grad(y, self.leaves, self.dy) if self.leaves else ())]

    def names(self) -> list[str]:
        """Names for the results of `run`, in their order."""
        tensors = [
            f"d{name} of adapter {i}"
            for i, a in enumerate(self.case.adapters)
            if a is not None
            for name in ["A", "B"] * len(a.pages_A) + ["a"] * (a.bias_A is not None) + ["β"] * (a.bias_B is not None)
        ]
        if not self.leaves:
            return ["y"]
        return ["y", *(["dX"] if self.case.x.requires_grad else []), *tensors]

    def refill(self, number: int) -> None:
        """Writes new values into x, dY, ids and seed, in place; the same values for the same number."""
        with torch.no_grad():
            _fill(self.case.x, 3 * number)
            _fill(self.dy, 3 * number + 1)
            if self.case.ids is not None:
                self.case.ids.copy_(_ids(self.case, torch.Generator().manual_seed(3 * number + 2)))
            if self.seed is not None:
                self.seed.fill_(7919 * number)

    def error(self, results: list[Tensor] | None = None) -> float:
        """The largest error of `results` (None: of a run), as a multiple of the bound. Raises WrongError above 1."""
        actual = self.run() if results is None else results
        dropout = dropout_from(self.dropout_p, self.seed)
        with torch.no_grad():
            y, y_terms, K = expected(self.case, dropout=dropout)
            base_y, base_dx = self._rounded_products()
            if not self.leaves:
                return self._worst(actual, [(y, y_terms, K, base_y)])
            dx, grads, dx_terms, grads_terms, terms = expected_grads(self.case, self.dy, dropout=dropout)
        exact = [(y, y_terms, K, base_y), *([(dx, dx_terms, terms, base_dx)] if self.case.x.requires_grad else [])]
        exact += [(g, t, terms, None) for g, t in zip(self._flat(grads), self._flat(grads_terms), strict=True)]
        return self._worst(actual, exact)

    def _rounded_products(self) -> tuple[Tensor | None, Tensor | None]:
        """xWᵀ + bias and dY W in fp64 if the backend rounds them before it adds the adapters, else None."""
        case = self.case
        if choice.rounds_once(self.backend) or case.weight is None:
            return None, None
        y, _ = bounds.linear(case.x, case.weight, case.bias)
        return y, self.dy.double() @ case.weight.double()

    def _worst(self, actual: list[Tensor], exact: list[tuple[Tensor, Tensor, int, Tensor | None]]) -> float:
        worst = 0.0
        for name, result, (value, magnitude, contraction, base) in zip(self.names(), actual, exact, strict=True):
            error = error_ratio(result, value, magnitude, contraction, base)
            if error > 1.0:
                raise WrongError(f"{name}: error {error:.2f}× the bound ({self.case})")
            worst = max(worst, error)
        return worst

    def _flat(self, grads: list[AdapterGrads | None]) -> list[Tensor]:
        return [g for g in flat_grads(self.case.adapters, grads) if g is not None]


def error_ratio(
    actual: Tensor, exact: Tensor, magnitude: Tensor, contraction: int, base: Tensor | None = None
) -> float:
    """The error of a result that was rounded once, as a multiple of the bounds by element and in the norm.

    base: the part that was rounded before, if one was; then only the bound by element holds, with that rounding.
    """
    if base is not None:
        return bounds.error(
            actual, bounds.Expected(exact, magnitude, contraction, base, torch.zeros_like(base)), fused=False
        )
    error = bounds.error(actual, bounds.Expected(exact, magnitude, contraction, exact, exact), fused=True)
    if actual.numel() >= bounds.NORM_FROM and error <= 1.0:
        norm = float((actual.double() - exact).norm() / exact.norm())
        error = max(error, norm / bounds.NORM[actual.dtype])
    return error


def build_case(
    shape: tuple[int, int, int],
    ranks: tuple[int | None, ...],
    dtype: torch.dtype,
    device: str,
    *,
    many: bool,
    form: Form = "linear",
    activation: str = "identity",
    biases: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> Case:
    """A random case. shape: M, K, N. ranks: None is an empty slot (or no adapter), 0 an adapter with only a bias.

    form: "series" has no W and N = K; "packed" has three slices, with the ranks rotated by one from slice to slice.
    """
    M, K, N = shape
    N = K if form == "series" else N
    generator = torch.Generator().manual_seed(M * K + N)

    def random(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    wide = adapter_dtype or dtype

    def adapter(rank: int | None, N: int) -> Adapter | None:
        if rank is None:
            return None
        bias_B = random(N, dtype=wide) if biases or not rank else None
        if not rank:
            return Adapter((), (), 1.0, "identity", None, bias_B)
        A = random(rank, K, dtype=wide, scale=K**-0.5)
        B = random(N, rank, dtype=wide, scale=rank**-0.5)
        return Adapter((A,), (B,), 0.5, activation, random(rank, dtype=wide) if biases else None, bias_B)

    columns = (0, N // 2, N - N // 4, N) if form == "packed" else ()
    sizes = [end - start for start, end in itertools.pairwise(columns)] or [N]
    adapters = tuple(adapter(r, size) for j, size in enumerate(sizes) for r in (*ranks[j:], *ranks[:j]))
    weight, bias = (None, None) if form == "series" else (random(N, K, scale=K**-0.5), random(N))
    case = Case(random(M, K), weight, bias, adapters, None, columns)
    if many:
        case.ids = _ids(case, generator).to(device)
    return case


def _ids(case: Case, generator: torch.Generator) -> Tensor:
    """int32 [M], drawn on the CPU from the valid ids."""
    valid_ids = torch.tensor(case.valid_ids(), dtype=torch.int32)
    return valid_ids[torch.randint(len(valid_ids), case.x.shape[:1], generator=generator)]


def can_run(backend: str, case: Case, device: str, dropout_p: float = 0.0) -> bool:
    """Whether the backend can run the forward and the backward of the case on the device."""
    M, K = case.x.shape
    slices = max(len(case.columns) - 1, 1)
    forward = Call(
        op=Op("adapter_block" if case.weight is None else "lora_linear", many=case.ids is not None),
        device=device,
        x_dtype=case.x.dtype,
        weight_dtype=case.weight_dtype(),
        adapter_dtype=case.adapter_dtype(),
        M=M,
        K=K,
        N=case.out_features,
        rank=max((a.rank for a in case.adapters if a is not None), default=0),
        adapters=len(case.adapters) // slices,
        dropout=dropout_p > 0.0,
        slices=slices,
    )
    backward = dataclasses.replace(forward, op=forward.op._replace(backward=True))
    return all(choice.cannot_run(backend, call) is None for call in (forward, backward))


def _fill(tensor: Tensor, seed: int) -> None:
    tensor.detach().copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
