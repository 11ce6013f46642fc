"""Other libraries' launches for one linear, modelled from their published kernels.

SOURCES names the lines and commits. In case of doubt a model favours the peer: it has no launches for the host's
bookkeeping, no metadata (indices, pointers, ranks) and no biases, adapters are in the base layer's dtype, and each
block of a product reads only what its masks allow. All but LoRAFusion compute the base product separately from the
adapters; its tiles are 128 · 256 (64 · 64 for up to 64 rows) for every peer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench.counted.batch import Batch, Segment
from bench.counted.work import GPU, Launch, Traffic
from peftk.triton_kernels import waves

_FP32 = 4


class Source(NamedTuple):
    repository: str
    files: tuple[str, ...]  # each with commit, and lines or functions


_PUNICA = "591b59899f0a20760821785d06b331c8a2e5cb86"
_LORAFUSION = "c48d7fdb1b5458e9df00963a63df00436f89a059"
_PEFT = "5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40"
SOURCES = {
    "vLLM": Source(
        "vllm-project/vllm",
        (
            "vllm/lora/ops/triton_ops/lora_shrink_op.py@00bd1493b3e8 _lora_shrink_kernel, _lora_shrink",
            "vllm/lora/ops/triton_ops/lora_expand_op.py@4d7f5005e3fd _lora_expand_kernel, _lora_expand",
            "vllm/lora/ops/triton_ops/kernel_utils.py@a5cdcfaafbb3 mm_k, do_shrink_kernel, do_expand_kernel",
            "vllm/lora/ops/triton_ops/utils.py@d82043b74a4f (of xyang16/vllm) get_lora_op_configs, the defaults",
            "vllm/lora/punica_wrapper/punica_gpu.py@010c9386c45d add_lora_linear",
            "vllm/lora/layers/base_linear.py@01235a494f17 create_lora_weights, apply",
        ),
    ),
    "SGLang": Source(
        "sgl-project/sglang",
        (
            "python/sglang/srt/lora/triton_ops/chunked_sgmv_shrink.py@5a72a305dc84 whole",
            "python/sglang/srt/lora/triton_ops/chunked_sgmv_expand.py@dd780ab9de48 whole",
            "python/sglang/srt/lora/backend/chunked_backend.py@e714b89ba9d6 _determine_chunk_size, _get_segments_info",
            "python/sglang/srt/lora/layers.py@ed17a5773ca1 ColumnParallelLinearWithLoRA",
            "python/sglang/srt/server_args.py max_lora_chunk_size = 16, lora_backend = csgmv (read without a commit)",
        ),
    ),
    "Punica SGMV": Source(
        "punica-ai/punica",
        (
            f"src/punica/ops/__init__.py@{_PUNICA[:12]} lines 287-316",
            f"csrc/sgmv_flashinfer/sgmv_all.cu@{_PUNICA[:12]} lines 16-64",
            f"csrc/sgmv_flashinfer/sgmv_flashinfer.cuh@{_PUNICA[:12]} lines 47-336",
            f"csrc/sgmv/sgmv_cutlass.cuh@{_PUNICA[:12]} lines 30-127",
        ),
    ),
    "Punica BGMV": Source(
        "punica-ai/punica",
        (
            f"src/punica/ops/__init__.py@{_PUNICA[:12]} lines 194-228",
            f"csrc/bgmv/bgmv_impl.cuh@{_PUNICA[:12]} lines 13-207",
        ),
    ),
    "LoRAFusion": Source(
        "CentML/lorafusion",
        (
            f"lorafusion/ops/lora_v1.py@{_LORAFUSION[:12]} lines 98-166",
            f"lorafusion/ops/triton_ops/fused_lora_xw_sb.py@{_LORAFUSION[:12]} lines 140-206",
            f"lorafusion/ops/triton_ops/fused_lora_dys_dyb.py@{_LORAFUSION[:12]} lines 113-179, 249-291",
            f"lorafusion/ops/triton_ops/fused_lora_dyw_dsa.py@{_LORAFUSION[:12]} lines 141-181",
            f"lorafusion/ops/triton_ops/config.py@{_LORAFUSION[:12]} lines 80-90",
            f"lorafusion/ops/multi_lora.py@{_LORAFUSION[:12]} lines 501-536, 610-615",
        ),
    ),
    "HF PEFT": Source("huggingface/peft", (f"src/peft/tuners/lora/layer.py@{_PEFT[:12]} lines 816-860, 1049-1074",)),
}


class _Tensors:
    """The traffic of one launch. times: how often each byte is requested."""

    def __init__(self) -> None:
        self.traffic: dict[str, Traffic] = {}

    def read(self, name: str, distinct: int, times: float = 1.0) -> _Tensors:
        return self._add(name, Traffic(round(distinct * times), 0, distinct, 0))

    def write(self, name: str, distinct: int, times: float = 1.0) -> _Tensors:
        return self._add(name, Traffic(0, round(distinct * times), 0, distinct))

    def update(self, name: str, distinct: int, times: float = 1.0) -> _Tensors:
        """Reads and writes the tensor; also for atomic additions."""
        return self.read(name, distinct, times).write(name, distinct, times)

    def _add(self, name: str, traffic: Traffic) -> _Tensors:
        self.traffic[name] = self.traffic.get(name, Traffic()) + traffic
        return self

    def launch(
        self, kernel: str, flops: int = 0, vector_flops: int = 0, *, waves_us: float = 0.0, overlapped: bool = False
    ) -> Launch:
        return Launch(kernel, self.traffic, flops, {}, vector_flops, waves_us, overlapped)


def vllm(batch: Batch) -> list[Launch] | None:
    """Base GEMM; the fp32 buffer is zeroed; shrink adds to it by atomics (split K); expand reads and rewrites y.

    A and B are in stacks of the largest rank (base_linear.py:56-78), so smaller ranks are padded with zeros, which are
    read. Here the stack is as wide as the largest rank of the batch. Rows are grouped through an index, in any order.
    """
    M, K, N, e, rank = batch.M, batch.K, batch.N, batch.itemsize, max(batch.ranks)
    block_k, splits = (256, 64) if M < 128 else (32, 8)
    # with a short K, fewer splits have work
    splits = min(splits, _cdiv(K, block_k))
    padded = _round(rank, 16)  # columns beyond the rank wrap around
    shrink, expand = _Tensors(), _Tensors()
    shrink_flops = expand_flops = 0
    for s in batch.used:
        tall, taller = _round(s.rows, 32), _round(s.rows, 64)
        shrink.read("x", s.rows * K * e, tall / s.rows * padded / 16)
        shrink.read(f"lora_A[{s.id}]", rank * K * e, tall / 32 * padded / rank)
        shrink.update("v", s.rows * rank * _FP32, splits)
        shrink_flops += 2 * tall * padded * K
        expand.read("v", s.rows * rank * _FP32, taller / s.rows * _cdiv(N, 128))
        expand.read(f"lora_B[{s.id}]", rank * N * e, taller / 64)
        expand.update("y", s.rows * N * e)
        expand_flops += 2 * taller * _round(rank, 16) * _round(N, 128)
    if not batch.used:
        return [_base(batch)]
    return [
        _base(batch),
        _Tensors().write("v", M * rank * _FP32).launch("zero the buffer"),
        shrink.launch("lora_shrink", shrink_flops, overlapped=True),
        expand.launch("lora_expand", expand_flops, overlapped=True),
    ]


def sglang(batch: Batch) -> list[Launch] | None:
    """Base GEMM; shrink writes v in 16 bits; expand reads and rewrites y. Chunks of 16 rows, the default.

    Each chunk reads its adapter's A and B up to its own rank, but shrink's columns are launched for the largest.
    Rows are grouped through a permutation that the host makes once per batch, any order.
    """
    K, N, e = batch.K, batch.N, batch.itemsize
    columns = _cdiv(max(batch.ranks), 16)
    shrink, expand = _Tensors(), _Tensors()
    shrink_flops = expand_flops = 0
    for s in batch.used:
        rank, chunks = batch.rank(s.id), _cdiv(s.rows, 16)
        shrink.read("x", s.rows * K * e, columns)
        shrink.read(f"lora_A[{s.id}]", rank * K * e, chunks)
        shrink.write("v", s.rows * rank * e)
        shrink_flops += 2 * chunks * 16 * columns * 16 * K
        expand.read("v", s.rows * rank * e, _cdiv(N, 64))
        expand.read(f"lora_B[{s.id}]", rank * N * e, chunks)
        expand.update("y", s.rows * N * e)
        expand_flops += 2 * chunks * 16 * _round(rank, 16) * _round(N, 64)
    kernels = [shrink.launch("chunked_lora_shrink", shrink_flops), expand.launch("chunked_lora_expand", expand_flops)]
    return [_base(batch), *kernels]


def punica_sgmv(batch: Batch) -> list[Launch] | None:
    """Base GEMM; v zeroed; shrink (cooperative: fp32 parts of 256 of K); arguments of the grouped GEMM; that GEMM.

    What its LLaMA calls for prefill and decode. Rows come grouped by adapter; one rank for all, so smaller ranks are
    padded to the largest, and that to 16, 32 or a multiple of 32 (sgmv_config.h).
    """
    M, K, N, e = batch.M, batch.K, batch.N, batch.itemsize
    largest = max(batch.ranks)
    rank = 16 if largest <= 16 else _round(largest, 32)
    if rank > 128:
        return None
    problems, chunks = len(batch.used), _cdiv(K, 256)
    resident = GPU.processors * max((227 * 1024) // (8192 * (4 + rank // 16)), 1)
    cooperative = chunks * problems <= resident
    shrink, expand = _Tensors(), _Tensors()
    flops = 0
    for s in batch.used:
        steps = _cdiv(s.rows, 64)
        shrink.read("x", s.rows * K * e)
        shrink.read(f"lora_A[{s.id}]", rank * K * e, steps)
        shrink.update("v", s.rows * rank * e)
        if cooperative:
            # all blocks of a problem add up all parts; the memory of a step is used again by the next
            parts = chunks * 64 * rank * _FP32
            shrink._add("parts", Traffic(steps * parts * chunks, steps * parts, 0, parts))
        expand.read("v", s.rows * rank * e, _cdiv(N, 128))
        expand.read(f"lora_B[{s.id}]", rank * N * e, _cdiv(s.rows, 32))
        expand.update("y", s.rows * N * e)
        flops += 2 * rank * (steps * 64 * K + _round(s.rows, 32) * _round(N, 128))
    shrink_flops = sum(2 * rank * _round(s.rows, 64) * K for s in batch.used)
    return [
        _base(batch),
        _Tensors().write("v", M * rank * e).launch("zero v"),
        shrink.launch("sgmv_shrink", shrink_flops),
        _Tensors().launch("precompute_sgmv_args"),
        expand.launch("sgmv_cutlass", flops - shrink_flops),
    ]


def punica_bgmv(batch: Batch) -> list[Launch] | None:
    """Base GEMM; v zeroed; shrink and expand, every row by itself with its own adapter, no tensor cores. For decode.

    One rank for all: 8, 16, 32 or 64 (bgmv_config.h), smaller ones padded.
    """
    largest = max(batch.ranks)
    if batch.M > 64 or largest > 64:
        return None
    M, K, N, e = batch.M, batch.K, batch.N, batch.itemsize
    rank = next(narrow for narrow in (8, 16, 32, 64) if narrow >= largest)
    shrink, expand = _Tensors(), _Tensors()
    for s in batch.used:
        shrink.read("x", s.rows * K * e, rank)
        shrink.read(f"lora_A[{s.id}]", rank * K * e, s.rows)
        shrink.update("v", s.rows * rank * e)
        expand.read("v", s.rows * rank * e, N / (4 * 32 // (rank // 8)))
        expand.read(f"lora_B[{s.id}]", rank * N * e, s.rows)
        expand.update("y", s.rows * N * e)
    rows = sum(s.rows for s in batch.used)
    return [
        _base(batch),
        _Tensors().write("v", M * rank * e).launch("zero v"),
        shrink.launch("bgmv_shrink", 0, 2 * rows * rank * K),
        expand.launch("bgmv_expand", 0, 2 * rows * rank * N),
    ]


def lorafusion(batch: Batch) -> list[Launch] | None:
    """v = xAᵀ by cuBLAS in 16 bits, then base and expand in one kernel. One adapter.

    Its kernels for several take at most four (multi_lora.py:610-615), with rows grouped and padded to blocks of 128 by
    the caller: no model for 8 or 64.
    """
    if batch.many:
        return None
    M, K, N, e, rank = batch.M, batch.K, batch.N, batch.itemsize, batch.ranks[0]
    fused = _product("x", "weight", "y", M, K, N, e, 128, 256)
    fused.read("v", M * rank * e, _cdiv(N, 256)).read("lora_B", rank * N * e, _cdiv(M, 128))
    return [
        _gemm("v = x Aᵀ", "x", "lora_A", "v", M, K, rank, e),
        fused.launch("fused_lora_xw_sb", 2 * _round(M, 128) * _round(N, 256) * (K + rank), waves_us=_tiles_us(M, N, K)),
    ]


def peft(batch: Batch) -> list[Launch] | None:
    """Base; A; B; · scaling; +. Several adapters (`adapter_names`): for each, rows gathered and results put back.

    Indices of the rows are copied to the device thrice per adapter; these copies are not counted.
    """
    M, K, N, e = batch.M, batch.K, batch.N, batch.itemsize
    if not batch.many:
        rank = batch.ranks[0]
        return [
            _base(batch, "y0"),  # the adapter's part is added to it in a new tensor
            _gemm("v = x Aᵀ", "x", "lora_A", "v", M, K, rank, e),
            _gemm("v Bᵀ", "v", "lora_B", "delta", M, rank, N, e),
            _Tensors().read("delta", M * N * e).write("scaled", M * N * e).launch("· scaling"),
            _Tensors().read("y0", M * N * e).read("scaled", M * N * e).write("y", M * N * e).launch("+"),
        ]
    found = [_base(batch)]
    for s in batch.used:
        found += _peft_of(batch, s)
    return found


def _peft_of(batch: Batch, s: Segment) -> list[Launch]:
    K, N, e, m, i = batch.K, batch.N, batch.itemsize, s.rows, s.id
    rank, size = batch.rank(s.id), s.rows * batch.N * batch.itemsize
    return [
        _Tensors().read("x", m * K * e).write(f"rows[{i}]", m * K * e).launch("gather x"),
        _gemm("v = x Aᵀ", f"rows[{i}]", f"lora_A[{i}]", f"v[{i}]", m, K, rank, e),
        _gemm("v Bᵀ", f"v[{i}]", f"lora_B[{i}]", f"delta[{i}]", m, rank, N, e),
        _Tensors().read(f"delta[{i}]", size).write(f"scaled[{i}]", size).launch("· scaling"),
        _Tensors().read("y", size).write(f"gathered[{i}]", size).launch("gather y"),
        _Tensors().update(f"gathered[{i}]", size).read(f"scaled[{i}]", size).launch("+="),
        _Tensors().read(f"gathered[{i}]", size).write("y", size).launch("put y"),
    ]


def peft_backward(batch: Batch) -> list[Launch] | None:
    """What autograd runs for x, A and B of one adapter. A batch of several adapters is refused in training."""
    if batch.many:
        return None
    M, K, N, e, rank = batch.M, batch.K, batch.N, batch.itemsize, batch.ranks[0]
    return [
        _Tensors().read("dy", M * N * e).write("scaled", M * N * e).launch("· scaling"),
        _gemm("u = dY B", "scaled", "lora_B", "u", M, N, rank, e),
        _gemm("dB = dYᵀ v", "scaled", "z", "dB", N, M, rank, e),
        _gemm("u A", "u", "lora_A", "dx_adapter", M, rank, K, e),
        _gemm("dA = uᵀ x", "u", "x", "dA", rank, M, K, e),
        _gemm("dY W", "dy", "weight", "dx_base", M, N, K, e),
        _Tensors().read("dx_base", M * K * e).read("dx_adapter", M * K * e).write("dx", M * K * e).launch("+"),
    ]


def lorafusion_backward(batch: Batch) -> list[Launch] | None:
    """Two fp32 buffers zeroed; dB and u by one pass over dY, added by atomics; both to 16 bits; dA; dX. One adapter."""
    if batch.many:
        return None
    M, K, N, e, rank = batch.M, batch.K, batch.N, batch.itemsize, batch.ranks[0]
    rows, columns = _cdiv(M, 128), _cdiv(N, 128)
    both = _Tensors().read("dy", M * N * e).read("z", M * rank * e, columns).read("lora_B", N * rank * e, rows)
    both.update("dB fp32", N * rank * _FP32, rows).update("u fp32", M * rank * _FP32, columns)
    fused = _product("dy", "weight", "dx", M, N, K, e, 128, 256)
    fused.read("u", M * rank * e, _cdiv(K, 256)).read("lora_A", rank * K * e, rows)
    return [
        _Tensors().write("dB fp32", N * rank * _FP32).launch("zero dB"),
        _Tensors().write("u fp32", M * rank * _FP32).launch("zero u"),
        both.launch("fused_lora_dys_dyb", 4 * rows * columns * 128 * 128 * rank),
        _Tensors().read("dB fp32", N * rank * _FP32).write("dB", N * rank * e).launch("dB to 16 bits"),
        _Tensors().read("u fp32", M * rank * _FP32).write("u", M * rank * e).launch("u to 16 bits"),
        _gemm("dA = uᵀ x", "u", "x", "dA", rank, M, K, e),
        fused.launch(
            "fused_lora_dyw_dsa", 2 * _round(M, 128) * _round(K, 256) * (N + rank), waves_us=_tiles_us(M, K, N)
        ),
    ]


Model = Callable[[Batch], list[Launch] | None]
FORWARD: dict[str, Model] = {
    "vLLM": vllm,
    "SGLang": sglang,
    "Punica SGMV": punica_sgmv,
    "Punica BGMV": punica_bgmv,
    "LoRAFusion": lorafusion,
    "HF PEFT": peft,
}
BACKWARD: dict[str, Model] = {"LoRAFusion": lorafusion_backward, "HF PEFT": peft_backward}


def _base(batch: Batch, out: str = "y") -> Launch:
    return _gemm("base GEMM", "x", "weight", out, batch.M, batch.K, batch.N, batch.itemsize)


def _gemm(name: str, left: str, right: str, out: str, M: int, K: int, N: int, e: int) -> Launch:
    """out [M, N] = left [M, K] · right [K, N] by a library, which is given its best tiles and splits, whose parts are
    not counted."""
    tall, wide = (128, 256) if M > 64 else (64, 64)
    tall, wide = min(tall, _round(M, 16)), min(wide, _round(N, 16))
    us = waves.library_us(waves.Product(M, N, K), GPU)
    product = _product(left, right, out, M, K, N, e, tall, wide)
    return product.launch(name, 2 * _round(M, tall) * _round(N, wide) * K, waves_us=us)


def _product(left: str, right: str, out: str, M: int, K: int, N: int, e: int, tall: int, wide: int) -> _Tensors:
    found = _Tensors().read(left, M * K * e, _cdiv(N, wide)).read(right, N * K * e, _cdiv(M, tall))
    return found.write(out, M * N * e)


def _tiles_us(M: int, N: int, K: int) -> float:
    """A Triton product in tiles of 128 · 256 (64 · 64 for up to 64 rows)."""
    tiles = waves.Tiles(128, 256) if M > 64 else waves.Tiles(64, 64)
    return waves.triton_us(waves.Product(M, N, K), tiles, GPU)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _round(a: int, b: int) -> int:
    return _cdiv(a, b) * b
