"""The public operations. Each checks its arguments, lets `peftk.backends` choose who serves, and wires the gradients.

    y[m] = x[m] Wᵀ + bias + s_i · act(x̃[m] A_iᵀ + a_i) B_iᵀ + β_i

Every backend accumulates in fp32 and rounds once, to x's dtype; with u the unit roundoff of that dtype

    |y − y*| ≤ u·|y*| + c·√(K + R)·2⁻²⁴·(|x||W|ᵀ + |s||v||B|ᵀ + |bias| + |β|),   c = 2       (docs/numerics.md)

fp64 inputs are run by the reference, in fp64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from peftk.adapters import checks
from peftk.adapters.adapter import adapter_of
from peftk.adapters.bank import AdapterBank, PackedBank
from peftk.adapters.dropout import dropout_of
from peftk.adapters.table import AdapterTable
from peftk.ops import merge
from peftk.ops.dispatch import direct_lora_linear, recorded
from peftk.ops.layer_calls import (
    adapter_block_unchecked,
    lora_linear_unchecked,
    multi_adapter_block_unchecked,
    multi_lora_linear_unchecked,
)
from peftk.reference.merge import Factors, factors
from peftk.reference.receipt import MergeReceipt
from peftk.reference.receipt import check as check_receipt
from peftk.system.lasting import lasting

__all__ = [
    "MergeReceipt",
    "adapter_block",
    "lora_linear",
    "merge_",
    "merge_layers_",
    "multi_adapter_block",
    "multi_lora_linear",
    "remerge_",
    "remerge_layers_",
    "unmerge_",
    "unmerge_layers_",
]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    *,
    activation: str = "identity",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer and one adapter as one operation: `y = xWᵀ + bias + s·act(x̃Aᵀ + a)Bᵀ + β`.

    Args:
        x: [..., K]; weight: W [N, K], frozen; bias: [N].
        lora_A: A [R, K]; lora_B: B [N, R]; any R ≥ 1; both None for the base layer alone.
        scaling: s, dimensionless (lora_alpha / r).
        activation: identity, relu, gelu (erf), gelu_tanh or silu, on the R hidden values.
        bias_A: a [R]; bias_B: β [N].
        dropout_p: probability that the adapter does not see an element of x; the mask comes from `seed` by Philox, so
            it is never stored. seed: int64 tensor of one element on x's device; None draws one from torch's generator.
        backend: reference, cpu, triton or cuda; None lets the choice decide (see `peftk.explain`).

    Dtypes: x, W and bias fp32, bf16 or fp16 in any mixture, the adapter of one dtype of its own; or all fp64.

    Returns:
        y [..., N] in x's dtype: fp32 accumulation, one rounding; for the error bound see the module's docstring.
        Differentiable in x, bias and the adapter's four tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a weight that wants a gradient.
        BackendError: the forced backend cannot run this call.

    Source: Hu et al. 2021 (LoRA); He et al. 2021 (with an activation: parallel adapter).
    """
    checks.base(weight, bias)
    checks.adapter(weight, lora_A, lora_B, scaling, activation, bias_A, bias_B)
    scaling, dropout = float(scaling), dropout_of(dropout_p, seed, weight.device)
    if dropout is None and backend is None:
        y = direct_lora_linear(
            x, weight, bias, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B
        )
        if y is not None:
            return y
    adapter = adapter_of(lora_A, lora_B, scaling, activation, bias_A, bias_B)
    return lora_linear_unchecked(x, weight, bias, adapter, dropout=dropout, backend=backend)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: AdapterBank | PackedBank | AdapterTable,
    ids: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer with a different adapter for every row: row m takes adapter ids[m], or none where that is
    -1.

    Args:
        x: [..., K]; weight: W [N, K], frozen; bias: [N].
        bank: the adapters (`peftk.AdapterBank`, or an `AdapterTable` of tensors that lie elsewhere), of any ranks,
            activations and biases. A `peftk.PackedBank` for packed outputs: each slice of W's rows (query, key and
            value, say) has adapters of its own, and a row takes those of its id in every slice.
        ids: int32 or int64, of shape x.shape[:-1] (per token) or, where x has three or more dimensions, x.shape[:1]
            (per sequence); in any order.
        dropout_p, seed, backend: as in `lora_linear`.

    Returns:
        y [..., N] in x's dtype. Each row has the bound of `lora_linear` with its own adapter; rows do not influence
        each other (an inf in one adapter stays in its rows). Differentiable in x, bias and the adapters' tensors.

    Raises:
        TypeError, ValueError: as in `lora_linear`; and, on a CPU, an id that is neither -1 nor the number of an adapter
            that is still there. On a GPU such an id counts as -1, unless PEFTK_CHECK=1 asks to look (which
            synchronises).

    Source: Chen et al. 2023 (Punica) and Sheng et al. 2023 (S-LoRA) pose the problem.
    """
    checks.base(weight, bias)
    if not isinstance(bank, (AdapterBank, PackedBank, AdapterTable)):
        raise TypeError(f"bank: expected an AdapterBank, a PackedBank or an AdapterTable, got {type(bank).__name__}")
    bank = _as_it_lies(bank)
    _bank_fits(bank, *weight.shape)
    if bank.device != weight.device:
        raise ValueError(f"bank: expected on {weight.device} like weight, got {bank.device}")
    dropout = dropout_of(dropout_p, seed, weight.device)
    return multi_lora_linear_unchecked(x, weight, bias, bank, _slots(bank, ids), dropout=dropout, backend=backend)


def _as_it_lies(bank: Any) -> Any:
    """A table of a user's own, made anew where Parameters have moved since. (A bank looks after its own.)"""
    return bank.current() if isinstance(bank, AdapterTable) and not recorded() else bank


def _slots(bank: AdapterBank | PackedBank | AdapterTable, ids: Tensor) -> Tensor:
    """A user's ids, numbers of adapters, as the slots that kernels take. An AdapterTable has no others."""
    return ids if isinstance(bank, AdapterTable) else bank.slots_of(ids)


def _bank_fits(bank: AdapterBank | PackedBank | AdapterTable, N: int, K: int) -> None:
    """A bank has checked its adapters against its own shape, so those of many are not looked at in every call."""
    if isinstance(bank, AdapterTable) or bank.shape != (N, K):
        checks.bank(bank.adapters, bank.columns, N, K)


def adapter_block(
    x: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float = 1.0,
    *,
    activation: str = "relu",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A series adapter as one operation: skip, down, activation, up: `y = x + s·act(x̃Aᵀ + a)Bᵀ + β`.

    It is `lora_linear` with W = identity, which nobody multiplies with.

    Args:
        x: [..., K]; lora_A: A [R, K] (down); lora_B: B [K, R] (up); any R ≥ 1.
        scaling: s, dimensionless; activation; bias_A: a [R]; bias_B: β [K]; dropout_p, seed, backend: as in
            `lora_linear`.

    Returns:
        y [..., K] in x's dtype: fp32 accumulation, one rounding, so the error is at most
        u·|y*| + c·√(K + R)·2⁻²⁴·(|x| + |s|(|x̃||A|ᵀ + |a|)|B|ᵀ + |β|): there is no |x||W|ᵀ beside which v's own error is
        small. Differentiable in x and the adapter's four tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        BackendError: the forced backend cannot run this call.

    Source: Houlsby et al. 2019.
    """
    checks.block(x, lora_A, lora_B, scaling, activation, bias_A, bias_B)
    scaling, dropout = float(scaling), dropout_of(dropout_p, seed, x.device)
    if dropout is None and backend is None:
        y = direct_lora_linear(
            x, None, None, lora_A, lora_B, scaling, activation=activation, bias_A=bias_A, bias_B=bias_B
        )
        if y is not None:
            return y
    adapter = adapter_of(lora_A, lora_B, scaling, activation, bias_A, bias_B)
    return adapter_block_unchecked(x, adapter, dropout=dropout, backend=backend)


def multi_adapter_block(
    x: Tensor,
    bank: AdapterBank | AdapterTable,
    ids: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A series adapter with a different adapter for every row: `adapter_block` with adapter ids[m], or x where that is
    -1.

    Args:
        x: [..., K]; bank: adapters with N = K; ids, dropout_p, seed, backend: as in `multi_lora_linear`.

    Returns, Raises: as `adapter_block` and `multi_lora_linear`.
    """
    if not isinstance(bank, (AdapterBank, AdapterTable)) or bank.columns:
        raise TypeError(f"bank: expected an AdapterBank or an AdapterTable, got {type(bank).__name__}")
    bank = _as_it_lies(bank)
    checks.block_bank(x, bank.device, bank.dtype)
    _bank_fits(bank, x.shape[-1], x.shape[-1])
    dropout = dropout_of(dropout_p, seed, x.device)
    return multi_adapter_block_unchecked(x, bank, _slots(bank, ids), dropout=dropout, backend=backend)


def merge_(
    weight: Tensor,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
    *,
    backend: str | None = None,
) -> MergeReceipt:
    """W ← round(W + Σ s·BA), in place, and a receipt from which `unmerge_` gives back every bit of W.

    Each product is a chain of fp32 fma over ascending rank, then one product with s; those of several adapters are
    added in order, and one sum with W follows, each rounded once (`peftk.reference.merge`). Every backend gives the
    same bits, so a merge made on one can be undone on another.

    Args:
        weight: W [N, K], fp32, bf16 or fp16 (fp64: reference only), any strides that give each element its own place.
        lora_A: A [R, K]; lora_B: B [N, R]; copied into the receipt. scaling: s, dimensionless.
            Or sequences of one length, for several adapters of any ranks in one pass; one s may serve them all.

    Returns:
        MergeReceipt: about half a byte per weight where ΔW is not several times W, besides A and B (docs/merge.md).

    Raises:
        TypeError, ValueError: as in `lora_linear`; or W' would not be finite. W is unchanged then.
    """
    factors = _factors(weight, lora_A, lora_B, scaling)
    return merge.merge_(weight, factors, backend=backend)


def unmerge_(weight: Tensor, receipt: MergeReceipt, *, backend: str | None = None) -> None:
    """Gives `weight` back every bit that it had before `receipt = merge_(weight, ...)`, in place.

    Raises:
        TypeError: receipt is not a MergeReceipt.
        ValueError: weight is not what the merge left (shape, dtype or checksum). It is unchanged then.
    """
    _merged(weight, receipt)
    merge.unmerge_(weight, receipt, backend=backend)


def remerge_(
    weight: Tensor,
    receipt: MergeReceipt,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
    *,
    backend: str | None = None,
) -> MergeReceipt:
    """From one merge to another: `unmerge_(weight, receipt)` and `merge_(weight, lora_A, lora_B, scaling)`, to the bit.

    On a CPU it is one pass over W, in place, and no forward in between sees the base layer.

    Args: as in both.

    Returns:
        MergeReceipt: of the new merge; it goes back to the base layer, not to the merge before.

    Raises:
        TypeError, ValueError: as both. W is unchanged then: still merged, and `receipt` still undoes it.
    """
    factors = _factors(weight, lora_A, lora_B, scaling)
    _receipt(receipt)
    return merge.remerge_(weight, receipt, factors, backend=backend)


def merge_layers_(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor | Sequence[Tensor]],
    lora_B: Sequence[Tensor | Sequence[Tensor]],
    scaling: float | Sequence[float | Sequence[float]] = 1.0,
    *,
    backend: str | None = None,
) -> list[MergeReceipt]:
    """`merge_` of many layers, each of its own shape, adapters and ranks. All are merged, or none.

    That holds whatever is raised meanwhile; a Ctrl-C waits until the layers at work are whole. The CUDA C++ and Triton
    backends merge all layers of a device and pair of dtypes in one launch (of at most 2²⁸ weights), other backends one
    after another.

    Args:
        weights: of the layers; no two share memory. lora_A, lora_B: one entry a layer, as `merge_` takes them.
        scaling: one number for all, or one entry a layer, as `merge_` takes it.

    Returns:
        list[MergeReceipt]: one per layer. Each also serves `unmerge_` and `remerge_` alone.

    Raises:
        TypeError, ValueError: as in `merge_`, with the number of the layer. No weight has changed then.
    """
    return merge.merge_layers_(weights, _layers(weights, lora_A, lora_B, scaling), backend=backend)


def remerge_layers_(
    weights: Sequence[Tensor],
    receipts: Sequence[MergeReceipt | None],
    lora_A: Sequence[Tensor | Sequence[Tensor]],
    lora_B: Sequence[Tensor | Sequence[Tensor]],
    scaling: float | Sequence[float | Sequence[float]] = 1.0,
    *,
    backend: str | None = None,
) -> list[MergeReceipt]:
    """`remerge_` of many layers: each from what its receipt says it holds (None: the base layer) to these adapters.

    All change over, or none: whatever is raised, those that had changed go back to the merge before, to the bit, and
    `receipts` still undo it.

    Args: as in `merge_layers_` and `unmerge_layers_`.

    Raises:
        TypeError, ValueError: as both, with the number of the layer.
    """
    factors = _layers(weights, lora_A, lora_B, scaling)
    _sequences(weights=weights, receipts=receipts)
    for layer, (weight, receipt) in enumerate(zip(weights, receipts, strict=True)):
        if receipt is not None:
            with _numbered(layer):
                _merged(weight, receipt)
    return merge.remerge_layers_(weights, receipts, factors, backend=backend)


def unmerge_layers_(weights: Sequence[Tensor], receipts: Sequence[MergeReceipt], *, backend: str | None = None) -> None:
    """`unmerge_` of many layers. All are unmerged, or none.

    Raises:
        TypeError, ValueError: as in `unmerge_`, with the number of the layer. No weight has changed then.
    """
    _sequences(weights=weights, receipts=receipts)
    for layer, (weight, receipt) in enumerate(zip(weights, receipts, strict=True)):
        with _numbered(layer):
            _merged(weight, receipt)
    checks.separate_memory(weights)
    merge.unmerge_layers_(weights, receipts, backend=backend)


def _layers(weights: Any, lora_A: Any, lora_B: Any, scaling: Any) -> list[Factors]:
    """The adapters of many layers' merges, checked and copied."""
    _sequences(weights=weights, lora_A=lora_A, lora_B=lora_B)
    each = [scaling] * len(weights) if isinstance(scaling, (int, float)) else scaling
    _sequences(weights=weights, scaling=each)
    factors = []
    for layer, arguments in enumerate(zip(weights, lora_A, lora_B, each, strict=True)):
        with _numbered(layer):
            factors.append(_factors(*arguments))
    checks.separate_memory(weights)
    return factors


@contextlib.contextmanager
def _numbered(layer: int) -> Iterator[None]:
    """An error says which layer it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {layer}: {error}") from None


def _sequences(**arguments: Any) -> None:
    """Lists or tuples of one length."""
    (first, layers), *_ = arguments.items()
    for name, values in arguments.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}: expected a list or tuple, one for each layer, got {type(values).__name__}")
        if len(values) != len(layers):
            raise ValueError(f"{name}: expected {len(layers)}, as many as {first}, got {len(values)}")


def _merged(weight: Tensor, receipt: MergeReceipt) -> None:
    """What unmerging looks at before it looks at values."""
    checks.dense("weight", weight)
    _receipt(receipt)
    checks.floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape {list(receipt.shape)} of the merge, got {list(weight.shape)}")
    checks.writable("weight", weight)


def _receipt(receipt: MergeReceipt) -> None:
    if not isinstance(receipt, MergeReceipt):
        raise TypeError(f"receipt: expected the MergeReceipt that merge_ returned, got {type(receipt).__name__}")
    check_receipt(receipt)


@lasting()
def _factors(weight: Tensor, lora_A: Any, lora_B: Any, scaling: Any) -> Factors:
    """The adapters of a merge, one or several, checked and copied side by side."""
    checks.dense("weight", weight)
    checks.base(weight.detach(), None)
    checks.writable("weight", weight)
    if not isinstance(lora_A, (list, tuple)) and not isinstance(lora_B, (list, tuple)):
        if lora_A is None:
            raise ValueError("lora_A: expected a tensor [R, K], got None")
        _factor(weight, lora_A, lora_B, scaling)
        return factors((lora_A,), (lora_B,), (float(scaling),))
    count = len(lora_A) if isinstance(lora_A, (list, tuple)) else len(lora_B)
    if isinstance(scaling, (int, float)):
        scaling = [scaling] * count
    for name, values in (("lora_A", lora_A), ("lora_B", lora_B), ("scaling", scaling)):
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}: expected a list or tuple, one for each adapter, got {type(values).__name__}")
        if len(values) != count or count == 0:
            raise ValueError(f"{name}: expected {count or '1 or more'}, one for each adapter, got {len(values)}")
    for number, (A, B, s) in enumerate(zip(lora_A, lora_B, scaling, strict=True)):
        if A is None:
            raise ValueError(f"adapter {number}: lora_A: expected a tensor [R, K], got None")
        try:
            _factor(weight, A, B, s)
        except (TypeError, ValueError) as error:
            raise type(error)(f"adapter {number}: {error}") from None
    return factors(lora_A, lora_B, [float(s) for s in scaling])


def _factor(weight: Tensor, lora_A: Any, lora_B: Any, scaling: Any) -> None:
    """One adapter of a merge."""
    checks.adapter(weight, lora_A, lora_B, scaling)
    checks.dense("lora_A", lora_A)
    checks.dense("lora_B", lora_B)
