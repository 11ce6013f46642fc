"""The CUDA module. Only `peftk.backends.cuda` calls it.

Addresses are in device memory, or 0 for no tensor. Strides and counts are in elements. Dtype codes: 0 float32, 1
bfloat16, 2 float16. A launch is enqueued on `stream` of `device` and returns at once, so the caller must keep the
tensors alive until it has run. Functions raise TypeError for a wrong or missing argument, ValueError for a call that no
kernel supports, and RuntimeError for a launch that CUDA refuses.
"""

from collections.abc import Callable

from torch import Tensor

device: str
"""The device type of the tensors: "cuda"; "cpu" in the module that tests compile for the host."""

# ---- lora_linear -----------------------------------------------------------------------------------------------------

most_rows: int
"""The largest M of `lora_linear`."""

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

class LoraLinearPlan:
    """How a call is divided into blocks, and the memory it needs."""

    @property
    def shrink_splits(self) -> int:
        """The number of ranges of K of a tile of z."""

    @property
    def expand_splits(self) -> int:
        """The number of ranges of K of a tile of y."""

    @property
    def shrink_tiles(self) -> int:
        """The number of shrink tiles, including splits."""

    @property
    def expand_tiles(self) -> int:
        """The number of expand tiles, including splits."""

    @property
    def partials(self) -> int:
        """The number of float32 of workspace, which may have any content."""

    @property
    def counters(self) -> int:
        """The number of int32 of workspace, which are zero before and after a launch."""

    @property
    def shared(self) -> int:
        """Bytes of shared memory per block."""

def plan_lora_linear(M: int, N: int, K: int, z_pages: int, processors: int) -> LoraLinearPlan:
    """The plan of a call, which depends only on these arguments. processors: multiprocessors of the device."""

def lora_linear(
    x: int,
    x_stride: int,
    weight: int,
    weight_stride: int,
    bias: int,
    bias_dtype: int,
    y: int,
    z: int,
    z_dense: bool,
    ids: int,
    adapters: Adapters,
    M: int,
    N: int,
    K: int,
    dtype: int,
    plan: LoraLinearPlan,
    partials: int,
    counters: int,
    device: int,
    stream: int,
) -> None:
    """Writes y in one launch. x [M, K], weight [N, K] and dense y [M, N] have the dtype `dtype`, bias [N] bias_dtype.

    Rows of x and weight start at multiples of 16 bytes. z float32 [M, 16 · z_pages]: for ranks that a row does not
    have, 0 if z_dense, else not written. ids int32 [M], contiguous; 0: every row uses the first adapter. A row whose id
    is no adapter's uses only the base layer.
    """

def plain_tensors(
    tensor: Tensor, parameter: Tensor, storage_bytes: int, storage_offset: int, device_type: int, is_neg: int, /
) -> None:
    """As that of `peftk._cpu`."""

def direct_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    activation: int,
    bias_A: Tensor | None,
    bias_B: Tensor | None,
    chosen: Callable[[int, int, int, int, tuple[bool, int, int, int, int]], bool],
    counters: Tensor | None,
    processors: int,
    stream: int,
    /,
) -> Tensor | None:
    """y [..., N] if all tensors are plain and dense on one GPU, as the kernel takes them, else None.

    chosen(M, N, K, dtype, about): whether this kernel is to run such a call. about: many, the adapters' dtype or -1 for
    none, the largest rank, the number of adapters, the number of slices. counters: int32, zero, of the stream.
    """

def direct_multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    adapters: Adapters,
    about: tuple[bool, int, int, int, int],
    chosen: Callable[[int, int, int, int, tuple[bool, int, int, int, int]], bool],
    counters: Tensor | None,
    processors: int,
    stream: int,
    /,
) -> Tensor | None:
    """The same for many adapters. ids: int32, contiguous, one per row of x. None if PEFTK_CHECK=1 is set."""

# ---- merge -----------------------------------------------------------------------------------------------------------
# All launches take the list of layers first: table int64 [layers, 15] with the FIELDS of peftk/launch/merge_layers.py;
# ends int32 and scaling float32 [adapters of all layers]; the number of layers, the number of tiles of all layers, the
# dtype of W, and that of A and B.

def merge_tile(dtype: int) -> tuple[int, int, int]:
    """(rows, columns) of a tile of W, and bytes of shared memory per block."""

def merge(
    table: int,
    ends: int,
    scaling: int,
    layers: int,
    tiles: int,
    dtype: int,
    adapter_dtype: int,
    merged: int,
    row_sums: int,
    refused: int,
    raw_count: int,
    raw_keys: int,
    raw_values: int,
    room: int,
    device: int,
    stream: int,
) -> None:
    """Merges every tile that is not merged, in place. See csrc/cuda/merge.h.

    merged int8 [tiles], row_sums uint32 [rows of all layers], refused int32 [layers], raw_count int32 [1], raw_keys
    int64 [room], raw_values [room] in W's dtype.
    """

def unmerge(
    table: int,
    ends: int,
    scaling: int,
    layers: int,
    tiles: int,
    dtype: int,
    adapter_dtype: int,
    merged: int,
    device: int,
    stream: int,
) -> None:
    """Unmerges every merged tile, in place. Raw weights are restored by merge_restore."""

def merge_restore(
    table: int,
    ends: int,
    scaling: int,
    layers: int,
    tiles: int,
    dtype: int,
    adapter_dtype: int,
    raw_keys: int,
    raw_values: int,
    count: int,
    device: int,
    stream: int,
) -> None:
    """Writes raw weights back to W. Keys below 0 are skipped."""

def merge_sum_rows(
    table: int,
    ends: int,
    scaling: int,
    layers: int,
    tiles: int,
    dtype: int,
    adapter_dtype: int,
    row_sums: int,
    device: int,
    stream: int,
) -> None:
    """Adds each weight to its row's sum in the checksum: row_sums uint32 [rows of all layers]."""

# ---- segments --------------------------------------------------------------------------------------------------------

def segments_workspace(M: int, adapters: int) -> int:
    """The number of int32 of workspace that a call needs."""

def segments_shared(M: int) -> int:
    """Bytes of shared memory per block, of the launch that needs the most."""

def segments(
    ids: int,
    stride: int,
    wide: bool,
    M: int,
    adapters: int,
    order: int,
    sorted_ids: int,
    ends: int,
    starts: int,
    owners: int,
    blocks: int,
    workspace: int,
    device: int,
    stream: int,
) -> None:
    """Sorts the rows by adapter. ids [M], int64 if wide, else int32. S = min(M, adapters + 1).

    order int64 [M]; int32: sorted_ids [M], ends [1 + adapters], starts [S + 1], owners [S + 1], blocks [⌈M / 16⌉].
    """
