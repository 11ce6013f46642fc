"""The C++ module of CPU kernels. Only `peftk.backends.cpu` calls its kernels, and the benchmark its two peaks.

Addresses are of a tensor's first element, 0 where there is none; strides and counts are in elements. Dtype codes: 0
float32, 1 bfloat16, 2 float16. An object holds addresses: whoever makes one keeps the tensors until the last call with
it is over. A wrong, missing or unknown argument raises TypeError and names it, an unknown code ValueError.
"""

from collections.abc import Sequence

from numpy import int8, int16, int32
from numpy.typing import NDArray
from torch import Tensor

# ---- the module ------------------------------------------------------------------------------------------------------

def borrows_openmp() -> bool:
    """Whether jobs run on torch's OpenMP threads, not on our own."""

def pool_workers() -> int:
    """Worker threads that this process has started."""

def simd_levels() -> list[str]:
    """The SIMD levels that this build and machine have, ascending."""

def simd_level() -> str:
    """The SIMD level in use."""

def use_simd_level(name: str) -> None:
    """Chooses a SIMD level for the whole process. Raises ValueError for one that is unknown or cannot run here."""

# ---- lora_linear -----------------------------------------------------------------------------------------------------

class Linear:
    """What a forward and its backward share: x and the base layer."""

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

        bias [N], contiguous. seed: 64 bits, read where dropout_p > 0. threads: at most so many.
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
        """Where y, or dx, holds the base layer's part already: the adapters' is added to it in place."""

class Adapters:
    """The adapters that a call's ids name, of one dtype."""

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
        [slice_count · count, 2], slices int32 [slice_count + 1, 2] or 0 for one slice. count: how many adapters an id
        may name. z_pages: pages of a row of z, over all slices.
        """

def plan(linear: Linear, *, backward: bool) -> tuple[str, bool, int]:
    """How a call is served: form of the product, whether it takes pairs of bf16, threads. Reads no tensor."""

def lora_linear(
    linear: Linear, adapters: Adapters, *, ids: int = 0, y: int, y_stride: int, z: int = 0, z_stride: int = 0
) -> None:
    """y [M, N] in x's dtype, and z float32 [M, z_stride] for the ranks that a row has, if it has an address.

    ids: int32 [M], contiguous; 0: every row takes the first adapter. Raises ValueError for an id of no adapter.
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
    """dx [M, K] in x's dtype, and for every adapter dA [R, K], dB [N, R], da [R], dβ [N], dense, in its dtype.

    An address of 0 is not wanted. dy [M, N] and z [M, z_stride], as the forward left it, have contiguous rows. linear's
    x is read for a dA only, its weight for dx only, its bias never. Raises ValueError as `lora_linear` does, and
    for grads that are not one for each adapter.
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
    """y [..., N] where all are plain dense tensors on the CPU and M·N·K ≤ limit, else None. weight None: y = x + …"""

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
    """The same for a table of one slice; ids int32 or int64, one for a row of x or for a sequence."""

# ---- merge -----------------------------------------------------------------------------------------------------------

class MergeWeight:
    """W, changed in place."""

    @staticmethod
    def of(*, weight: int, stride: int, N: int, K: int, dtype: int) -> MergeWeight:
        """weight [N, K], rows contiguous, stride from row to row."""

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
        """lora_A [R, K], lora_B [N, R], dense, ranks ends[t - 1] … ends[t] - 1 of adapter t; scaling of each.

        halves uint8 [N, ⌈K / 2⌉]: two codes a byte. far int8 [far_count], raws [raw_count] in W's dtype: of a side that
        W comes from, the codes that no half holds and the weights that no code gives back. Sequences: list or tuple.
        Raises ValueError where ends and scaling are empty or of two lengths.
        """

def remerge(
    weight: MergeWeight, from_side: MergeSide | None, to_side: MergeSide | None, *, threads: int
) -> tuple[bool, int, NDArray[int8], NDArray[int16] | NDArray[int32]]:
    """Takes from_side out of W, exactly, and puts to_side in, in one pass; writes to_side's halves.

    Whether W would be finite (if not, it is as it was), its checksum (0 without to_side), to_side's far and the bits of
    its raws. Raises ValueError where from_side's codes don't belong together.
    """

def checksum(weight: MergeWeight, *, threads: int) -> int:
    """Of all of W's bits: 64 bits."""

# ---- tensors, and the machine ----------------------------------------------------------------------------------------

def plain_tensors(tensor: Tensor, parameter: Tensor, storage_bytes: int, storage_offset: int, is_neg: int, /) -> None:
    """Says what a plain tensor and a Parameter are, and where what torch exports is (csrc/bindings/tensor.h)."""

def dense(*tensors: object) -> bool:
    """Whether all are plain dense tensors on one device, or None."""

def fma_peak(multiply_adds: int, dtype: int, threads: int) -> None:
    """So many multiply-adds of a dtype, as fast as they go."""

def read_peak(from_: int, bytes: int, threads: int) -> int:
    """Reads memory as fast as it goes; the sum of its 64-bit words modulo 2⁶⁴."""
