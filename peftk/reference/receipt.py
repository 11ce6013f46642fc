"""The receipt of a merge: everything needed to restore W."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from peftk.adapters import checks
from peftk.reference import merge_code
from peftk.reference.merge import RAW, Factors
from peftk.system.lasting import lasting


@dataclasses.dataclass(frozen=True)
class MergeReceipt:
    """Everything needed to restore W from W' bit for bit. Shares no memory with the tensors passed to the merge.

    Attributes:
        factors: copies of the adapters.
        code: for each weight, the distance between W and the result of plain subtraction, in the smallest of three
            forms: uint8 [N, ⌈K/2⌉], two weights per byte, with the codes that need a whole byte in `far`; int8 [N, K],
            one byte per weight; or int8 [0, 0] if raw_values holds all of W.
        far: int8 [number of far codes], in row-major order.
        raw_values: in W's dtype and row-major order, the weights whose distance does not fit in a byte.
        checksum: of W', 64 bits.
    """

    factors: Factors
    code: Tensor
    far: Tensor
    raw_values: Tensor
    checksum: int

    @property
    def shape(self) -> torch.Size:
        """The shape of W: [N, K]."""
        return torch.Size((self.factors.lora_B.shape[0], self.factors.lora_A.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self.raw_values.dtype

    @property
    def device(self) -> torch.device:
        """The device of W and of the receipt's tensors."""
        return self.code.device

    @property
    def nbytes(self) -> int:
        """The size of the receipt in bytes, including A and B."""
        tensors = (self.factors.lora_A, self.factors.lora_B, self.code, self.far, self.raw_values)
        return sum(tensor.nbytes for tensor in tensors)

    @lasting()
    def to(self, device: torch.device) -> MergeReceipt:
        """A copy of the receipt on `device`, for a weight that has moved there."""
        lora_A, lora_B = self.factors.lora_A.to(device), self.factors.lora_B.to(device)
        moved = {name: getattr(self, name).to(device) for name in ("code", "far", "raw_values")}
        return dataclasses.replace(self, factors=self.factors._replace(lora_A=lora_A, lora_B=lora_B), **moved)


class BiasReceipt(NamedTuple):
    """A bias [N] before and after a merge."""

    before: Tensor
    after: Tensor

    @lasting()
    def to(self, device: torch.device) -> BiasReceipt:
        return BiasReceipt(self.before.to(device), self.after.to(device))

    def check(self, bias: Tensor | None) -> None:
        """Raises ValueError if the bias has changed since the merge."""
        if bias is None or not same_bits(bias, self.after):
            raise ValueError("bias: expected the bits that the merge left, got others: changed since")


@lasting()
def merge_bias(bias: Tensor, terms: Iterable[tuple[Tensor, float]]) -> BiasReceipt:
    """bias + Σ s·b, rounded once to the bias's dtype; does not change `bias`. Raises ValueError if it is not finite."""
    after = _widen(bias)
    for lora_bias, scaling in terms:
        after = after + _widen(lora_bias) * scaling
    after = after.to(bias.dtype)
    if not bool(after.isfinite().all()):
        raise ValueError("bias: expected bias + s·b to be finite in every element, got inf or NaN; it is unchanged")
    return BiasReceipt(bias.detach().clone(), after)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether shape, dtype, device and every bit are equal: -0 differs from 0, and a NaN equals itself."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return torch.equal(one.detach().view(bits), other.detach().view(bits))


def pack_receipt(factors: Factors, code: Tensor, raw_values: Tensor, checksum: int) -> MergeReceipt:
    """A receipt with two weights per byte, from a code int8 [N, K] with one byte per weight."""
    return MergeReceipt(factors, *merge_code.pack(code), raw_values, checksum)


def code_as_halves(receipt: MergeReceipt) -> tuple[Tensor, Tensor]:
    """The code with two weights per byte, and the far codes, from a receipt of any form."""
    if receipt.code.dtype == torch.uint8:
        return receipt.code, receipt.far
    if receipt.code.numel():
        return merge_code.pack(receipt.code)
    (N, K), last = receipt.shape, receipt.shape[1] % 2
    both = merge_code.HALF_FAR | merge_code.HALF_FAR << 4
    code = receipt.code.new_full((N, (K + 1) // 2), both, dtype=torch.uint8)
    code[:, code.shape[1] - last :] = merge_code.HALF_FAR
    return code, receipt.far.new_full((N * K,), RAW)


def code_as_bytes(receipt: MergeReceipt) -> tuple[Tensor, Tensor]:
    """The code as int8 [N, K], and the indices of the raw values in the flattened W, int64; from a receipt of any form.

    Raises ValueError unless there are as many far codes and raw values as the code refers to.
    """
    code = receipt.code
    if code.dtype == torch.uint8 or not code.numel():
        code = merge_code.unpack(*code_as_halves(receipt), receipt.shape[1])
    raw_index = (code == RAW).flatten().nonzero().flatten()
    if len(raw_index) != len(receipt.raw_values):
        raise ValueError(
            f"receipt: expected {len(raw_index)} raw values, as many as its code refers to, "
            f"got {len(receipt.raw_values)}"
        )
    return code, raw_index


def smaller_form(receipt: MergeReceipt) -> str | None:
    """Which form is smaller than that of a receipt with two weights per byte: "bytes", "weights", or None."""
    weights, raw = receipt.shape.numel(), receipt.raw_values.nbytes
    sizes = {
        None: receipt.code.nbytes + receipt.far.nbytes + raw,
        "bytes": weights + raw,
        "weights": weights * receipt.dtype.itemsize,
    }
    return min(sizes, key=lambda form: sizes[form])


def with_bytes(receipt: MergeReceipt) -> MergeReceipt:
    """The same receipt with one byte per weight."""
    code, _ = code_as_bytes(receipt)
    return dataclasses.replace(receipt, code=code, far=receipt.far.new_empty(0))


def with_weights(receipt: MergeReceipt, base: Tensor) -> MergeReceipt:
    """The same receipt with W itself as raw_values. base: W; not copied."""
    empty = receipt.far.new_empty(0)
    return dataclasses.replace(receipt, code=empty.view(0, 0), far=empty, raw_values=base.reshape(-1))


def check(receipt: MergeReceipt) -> None:
    """Checks that the tensors are as a merge makes them, because kernels read them by address. Raises ValueError."""
    A, B = receipt.factors.lora_A, receipt.factors.lora_B
    parts = {"lora_A": A, "lora_B": B, "code": receipt.code, "far": receipt.far, "raw_values": receipt.raw_values}
    for name, tensor in parts.items():
        checks.dense(f"receipt.{name}", tensor)
    for name, tensor in parts.items():
        checks.same_device(f"receipt.{name}", tensor, receipt.device, "its code")
        if not tensor.is_contiguous():
            raise ValueError(f"receipt.{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    ranks, (N, K) = receipt.factors.ends[-1], receipt.shape
    kinds = {torch.uint8: (N, (K + 1) // 2), torch.int8: (N, K) if receipt.code.numel() else (0, 0)}
    for name, expected, got in (
        ("lora_A", (A.dtype, [ranks, K]), (A.dtype, list(A.shape))),
        ("lora_B", (A.dtype, [N, ranks]), (B.dtype, list(B.shape))),
        ("code", kinds.get(receipt.code.dtype, "uint8 or int8"), tuple(receipt.code.shape)),
        ("far", (torch.int8, 1), (receipt.far.dtype, receipt.far.dim())),
        ("raw_values", 1, receipt.raw_values.dim()),
    ):
        if got != expected:
            raise ValueError(f"receipt.{name}: expected {expected}, as the merge made it, got {got}")
