"""The C++ module of CPU kernels. Only `peftk.backends.cpu` calls the kernels, and only the benchmark `..._peak`.

An address is that of a tensor's first element, or 0 for no tensor. Strides and counts are in elements. Dtype codes: 0
float32, 1 bfloat16, 2 float16. Objects hold addresses: the caller keeps the tensors alive until the last call with the
object has returned. A wrong, missing or unknown argument raises TypeError and is named; an unknown code ValueError.
"""

from collections.abc import Sequence

from numpy import int8, int16, int32
from numpy.typing import NDArray
from torch import Tensor

# ---- the module ------------------------------------------------------------------------------------------------------

def borrows_openmp() -> bool:
    """Whether jobs run on torch's OpenMP threads instead of our own."""

def pool_workers() -> int:
    """The number of worker threads that this process has started."""

def simd_levels() -> list[str]:
    """The SIMD levels that both this build and this machine have, ascending."""

def simd_level() -> str:
    """The SIMD level in use."""

def use_simd_level(name: str) -> None:
    """Sets the SIMD level of the whole process. Raises ValueError for one that is unknown or cannot run here."""

# ---- lora_linear -----------------------------------------------------------------------------------------------------

class Linear:
    """The arguments that a forward and its backward share: x and the base layer."""

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
        bias: int = 0,
        bias_dtype: int = 0,
        dropout_p: float = 0.0,
        seed: int = 0,
        threads: int,
    ) -> Linear:
        """x [M, K], rows contiguous, x_stride from row to row; weight [N, K], its strides along N and K, one of them 1.

        bias [N], contiguous. seed: 64 bits, read if dropout_p > 0. threads: the maximum number of threads.
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
        """For a y, or dx, that already holds the base layer's part: the adapters' part is added to it in place."""

class Adapters:
    """The adapters of a call, of one dtype."""

    @staticmethod
    def none(*, dtype: int) -> Adapters:
        """The base layer alone."""

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
        """A [rank, K], rows contiguous, B [N, rank] with any strides, biases [rank] and [N], contiguous.

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
        [slice_count · count, 2], slices int32 [slice_count + 1, 2] or 0 for one slice. count: the number of adapters.
        z_pages: the pages of a row of z, over all slices.
        """

def plan(linear: Linear, *, backward: bool) -> tuple[str, bool, int]:
    """How a call runs: form of the product, whether with bf16 pair instructions, threads. Reads no tensor."""

def lora_linear(
    linear: Linear, adapters: Adapters, *, ids: int = 0, y: int, y_stride: int, z: int = 0, z_stride: int = 0
) -> None:
    """Writes y [M, N] in x's dtype and, unless its address is 0, z float32 [M, z_stride], for the ranks that a row has.

    ids: int32 [M], contiguous; 0: all rows use the first adapter. Raises ValueError for an id without an adapter.
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
    """Writes dx [M, K] in x's dtype, and for every adapter dA [R, K], dB [N, R], da [R], dβ [N], dense, in its dtype.

    An address of 0: not wanted. dy [M, N] and z [M, z_stride] of the forward have contiguous rows. x is read only for
    dA, the weight only for dx, the bias not at all. Raises ValueError as `lora_linear` does, and unless grads has one
    entry per adapter.
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
    /,
) -> Tensor | None:
    """y [..., N] if all are plain dense tensors on the CPU and M·N·K ≤ limit, else None. weight None: the identity."""

def direct_multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    limit: float,
    threads: int,
    pages: int,
    rows: int,
    scaling: int,
    biases: int,
    count: int,
    dtype: int,
    /,
) -> Tensor | None:
    """The same for a table of one slice; ids int32 or int64, one per row of x or per sequence."""

# ---- merge -----------------------------------------------------------------------------------------------------------

class MergeWeight:
    """The weight W of a merge, changed in place."""

    @staticmethod
    def of(*, weight: int, stride: int, N: int, K: int, dtype: int) -> MergeWeight:
        """weight [N, K], rows contiguous, stride from row to row."""

class MergeSide:
    """Adapters, concatenated, and the codes that undo their merge."""

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
        """lora_A [R, K], lora_B [N, R], dense; adapter t has the ranks ends[t - 1] … ends[t] - 1; scaling of each.

        halves uint8 [N, ⌈K / 2⌉]: two codes per byte. far int8 [far_count], raws [raw_count] in W's dtype: for the side
        that W comes from, the codes that need a whole byte, and the weights that no code can restore. Sequences: list
        or tuple. Raises ValueError if ends and scaling are empty or differ in length.
        """

def remerge(
    weight: MergeWeight, from_side: MergeSide | None, to_side: MergeSide | None, *, threads: int
) -> tuple[bool, int, NDArray[int8], NDArray[int16] | NDArray[int32]]:
    """Unmerges from_side exactly and merges to_side, in one pass over W; writes to_side's halves.

    Returns whether W would be finite (if not, W is unchanged), its checksum (0 without to_side), to_side's far, and the
    bits of its raws. Raises ValueError if from_side's codes are inconsistent.
    """

def checksum(weight: MergeWeight, *, threads: int) -> int:
    """The 64-bit checksum of W's bits: `peftk.reference.merge.checksum`."""

# ---- tensors, and the machine ----------------------------------------------------------------------------------------

def plain_tensors(tensor: Tensor, parameter: Tensor, storage_bytes: int, storage_offset: int, is_neg: int, /) -> None:
    """Sets how to recognise a plain tensor and a Parameter: examples, and addresses of torch's functions (tensor.h)."""

def dense(*tensors: object) -> bool:
    """Whether each is a plain dense tensor on one common device, or None."""

def fma_peak(multiply_adds: int, dtype: int, threads: int) -> None:
    """Executes this many multiply-adds of a dtype, as fast as possible."""

def read_peak(from_: int, bytes: int, threads: int) -> int:
    """Reads memory as fast as possible. Returns the sum of its 64-bit words modulo 2⁶⁴."""
