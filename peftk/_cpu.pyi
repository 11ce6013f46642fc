"""The C++ module of CPU kernels. Only `peftk.backends.cpu` and `blocking` call it, and the benchmark its two peaks.

An address is that of a tensor's first element, or 0 for no tensor. Strides and counts are in elements. Dtype codes: 0
float32, 1 bfloat16, 2 float16. Objects hold addresses, so their creator must keep the tensors alive until the last call
with them has returned. A missing or unknown argument, or one of the wrong type, raises a TypeError that names it; an
unknown dtype code raises ValueError.
"""

from collections.abc import Sequence

from numpy import int8, int16, int32
from numpy.typing import NDArray
from torch import Tensor

# ---- the module ------------------------------------------------------------------------------------------------------

def borrows_openmp() -> bool:
    """Whether jobs run on torch's OpenMP threads instead of peftk's own."""

def pool_workers() -> int:
    """Worker threads that this process has started."""

def simd_levels() -> list[str]:
    """The SIMD levels that this build and machine support, ascending."""

def simd_level() -> str:
    """The SIMD level in use."""

def use_simd_level(name: str) -> None:
    """Sets the SIMD level of the whole process. Raises ValueError if it is unknown or cannot run here."""

def blocking() -> tuple[int, int, int, int]:
    """How the product is cut (csrc/cpu/blocking.h): rows, l2_rows, steps, blocks."""

def use_blocking(rows: int, l2_rows: int, steps: int, blocks: int) -> None:
    """Sets how the product is cut, for the whole process; it changes no bit of a result.

    rows, l2_rows: multiples of 16 up to 4096; steps: a multiple of 256 up to 4096; blocks: 1 … 8. Raises ValueError for
    others.
    """

# ---- lora_linear -----------------------------------------------------------------------------------------------------

class Packing:
    """How the elements of a packed W are stored."""

    @staticmethod
    def of(
        codes: int,
        *,
        row_bytes: int,
        groups: int = 0,
        group_shift: int = 0,
        scales: int = 0,
        scale_dtype: int = 0,
        scale_factor: float,
        zeros: int = 0,
        table: int = 0,
    ) -> Packing:
        """codes: how a row lies in row_bytes bytes (`Codes` in csrc/cpu/lora_linear.h), in steps of 32 elements.

        A row has `groups` scales; element k has number k >> group_shift, times scale_factor where codes are bytes.
        scales and zeros [N, groups] are contiguous; without zeros, 4-bit codes have 8. table: 16 floats.
        """

class Linear:
    """The arguments that forward and backward share: x and the base layer."""

    @staticmethod
    def of(
        *,
        M: int,
        N: int,
        K: int,
        x: int,
        x_stride: int,
        x_dtype: int,
        weight: int,
        weight_n: int,
        weight_k: int,
        weight_dtype: int,
        packing: Packing | None = None,
        bias: int = 0,
        bias_dtype: int = 0,
        dropout_p: float = 0.0,
        seed: int = 0,
        batch_invariant: bool = False,
        threads: int,
    ) -> Linear:
        """x [M, K] with contiguous rows and row stride x_stride; weight [N, K] with strides weight_n and weight_k.

        One of weight_n and weight_k is 1. With `packing`, weight holds codes, weight_n = K, weight_k = 1 and
        weight_dtype is float32. bias [N] is contiguous. seed: 64 bits, read if dropout_p > 0.
        batch_invariant: a row's bits do not depend on the other rows. threads: the most threads to use.
        """

    @staticmethod
    def over_base(
        *,
        M: int,
        N: int,
        K: int,
        x: int,
        x_stride: int,
        x_dtype: int,
        dropout_p: float = 0.0,
        seed: int = 0,
        threads: int,
    ) -> Linear:
        """For a y or dx that already holds the base layer's part: the adapters' part is added in place."""

class Adapters:
    """The adapters that the ids of a call refer to, of one dtype."""

    @staticmethod
    def none(*, dtype: int) -> Adapters:
        """No adapters: only the base layer."""

    @staticmethod
    def one(
        *,
        A: int,
        stride_A: int,
        B: int,
        stride_Bn: int,
        stride_Br: int,
        bias_A: int,
        bias_B: int,
        rank: int,
        activation: int,
        scaling: float,
        dtype: int,
    ) -> Adapters:
        """A [rank, K] with contiguous rows, B [N, rank] with any strides, contiguous biases [rank] and [N].

        rank 0: no A and no B. activation: a code of `peftk.adapters.activations.CODES`.
        """

    @staticmethod
    def of_table(
        *,
        pages: int,
        rows: int,
        scaling: int,
        biases: int,
        slices: int = 0,
        slice_count: int,
        count: int,
        z_pages: int,
        dtype: int,
    ) -> Adapters:
        """The tensors of a `peftk.adapters.table.AdapterTable`.

        pages int64 [P, 5], rows int32 [slice_count · count, 4], scaling float32 [slice_count · count], biases int64
        [slice_count · count, 2], slices int32 [slice_count + 1, 2], or 0 for a single slice. count: the number of
        valid ids. z_pages: pages per row of z, over all slices.
        """

def plan(linear: Linear, *, backward: bool) -> tuple[str, bool, int]:
    """How a call is computed: (form of the product, whether it uses pairs of bf16, threads). Reads no tensor."""

def lora_linear(
    linear: Linear, adapters: Adapters, *, ids: int = 0, y: int, y_stride: int, z: int = 0, z_stride: int = 0
) -> None:
    """Writes y [M, N] in x's dtype and, unless its address is 0, z float32 [M, z_stride].

    z is written only for the ranks of a row's adapter. ids: int32 [M], contiguous; 0: every row uses the first adapter.
    Raises ValueError for an id without an adapter.
    """

def lora_linear_backward(
    linear: Linear,
    adapters: Adapters,
    *,
    ids: int = 0,
    dy: int,
    dy_stride: int,
    dy_dtype: int,
    dx: int = 0,
    dx_stride: int = 0,
    z: int = 0,
    z_stride: int = 0,
    grads: Sequence[tuple[int, int, int, int]],
) -> None:
    """Writes dx [M, K] in x's dtype and, for every adapter, dense dA [R, K], dB [N, R], da [R], dβ [N] in its dtype.

    A gradient with the address 0 is not computed. dy [M, N] and the forward's z [M, z_stride] have contiguous rows.
    linear's x is read only for dA, its weight only for dx, its bias not at all. Raises ValueError as `lora_linear`
    does, and if grads does not have one entry for each adapter.
    """

def direct_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: int,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
    limit: float,
    threads: int,
    batch_invariant: bool,
    /,
) -> Tensor | None:
    """y [..., N] if all tensors are plain and dense on the CPU and M·N·K ≤ limit, else None. weight None: y = x + …"""

def direct_multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    limit: float,
    threads: int,
    batch_invariant: bool,
    pages: int,
    rows: int,
    scaling: int,
    biases: int,
    count: int,
    dtype: int,
    /,
) -> Tensor | None:
    """The same for a table of one slice. ids: int32 or int64, one per row of x or one per sequence."""

# ---- merge -----------------------------------------------------------------------------------------------------------

class MergeWeight:
    """W, changed in place."""

    @staticmethod
    def of(*, weight: int, stride: int, N: int, K: int, dtype: int) -> MergeWeight:
        """weight [N, K] with contiguous rows and the row stride `stride`."""

class MergeSide:
    """Adapters side by side, and the codes that undo their merge."""

    @staticmethod
    def of(
        *,
        lora_A: int,
        lora_B: int,
        ends: Sequence[int],
        scaling: Sequence[float],
        dtype: int,
        halves: int,
        far: int = 0,
        far_count: int = 0,
        raws: int = 0,
        raw_count: int = 0,
    ) -> MergeSide:
        """Dense lora_A [R, K] and lora_B [N, R]. Adapter t has ranks ends[t - 1] … ends[t] - 1 and scaling[t].

        halves uint8 [N, ⌈K / 2⌉]: two codes per byte. For from_side only: far int8 [far_count], the codes that do not
        fit into a half, and raws [raw_count] in W's dtype, the weights that have no code. Sequences are lists or
        tuples. Raises ValueError if ends and scaling are empty or differ in length.
        """

def remerge(
    weight: MergeWeight, from_side: MergeSide | None, to_side: MergeSide | None, *, threads: int
) -> tuple[bool, int, NDArray[int8], NDArray[int16] | NDArray[int32]]:
    """Unmerges from_side exactly and merges to_side, in one pass over W; writes to_side's halves.

    Returns (finite, checksum, far, raws): whether the new W is finite (if not, W is unchanged), its checksum (0 without
    to_side), to_side's far codes and the bits of its raw weights. Raises ValueError if from_side's codes do not match.
    """

def checksum(weight: MergeWeight, *, threads: int) -> int:
    """The checksum of all bits of W, a 64-bit number."""

# ---- tensors, and the machine ----------------------------------------------------------------------------------------

def plain_tensors(
    tensor: Tensor, parameter: Tensor, storage_bytes: int, storage_offset: int, device_type: int, is_neg: int, /
) -> None:
    """Registers the types of plain tensors, and the addresses of functions of torch (csrc/bindings/tensor.h)."""

def dense(*tensors: object) -> bool:
    """Whether all arguments are None or plain dense tensors on one device."""

def fma_peak(multiply_adds: int, dtype: int, threads: int) -> None:
    """Runs that many multiply-adds of a dtype, as fast as the machine can."""

def read_peak(from_: int, bytes: int, threads: int) -> int:
    """Reads memory as fast as the machine can. Returns the sum of its 64-bit words modulo 2⁶⁴."""
