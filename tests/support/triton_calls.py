"""Compiles what the Triton backend launches for a call, for a GPU that need not be present, and checks its limits."""

from __future__ import annotations

from typing import Any

import torch

from peftk.adapters.adapter import Wanted
from peftk.launch.segments import Segments
from peftk.triton_kernels import config, lora_wgrad
from peftk.triton_kernels import lora_linear as kernels
from tests.support.triton_aot import Compiled, compiling

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Mix = tuple[torch.dtype, torch.dtype, torch.dtype]  # of x, W and the adapters
MIXES: list[Mix] = [(BF16, BF16, BF16), (F16, F16, F16), (F32, F32, F32)]
TARGETS: list[int | str] = [80, 90, 100, 120]
MORE_TARGETS: list[int | str] = [86, 89, "gfx942"]
TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma", 100: "tcgen05.mma", 120: "mma.sync"}
TENSOR_MEMORY = 512  # columns
FORMS: dict[str, dict[str, Any]] = {
    "one": {"many": False},
    "many": {"many": True},
    "packed": {"many": True, "packed": True},
    "identity": {"many": True, "identity": True},
    "one, backward": {"many": False, "backward": True},
    "many, backward": {"many": True, "backward": True},
    "packed, backward": {"many": True, "packed": True, "backward": True},
    "identity, backward": {"many": True, "identity": True, "backward": True},
    "one, backward, dropout": {"many": False, "backward": True, "dropout_p": 0.1},
    "many, backward, dropout": {"many": True, "backward": True, "dropout_p": 0.1},
}
# Over a product that a library has made.
OVER_BASE: dict[str, dict[str, Any]] = {
    f"{form}, over a product": {**keywords, "over_base": True}
    for form, keywords in FORMS.items()
    if "identity" not in form
}


def compile_call(target: int | str, M: int, mix: Mix, *, plan: config.Plan | None = None, **form: Any) -> Compiled:
    """The last launch of `compile_launches`: the only one, or the expand."""
    launches = compile_launches(target, M, mix, plan=plan, **form)
    assert plan is None or not plan.once or len(launches) == 1
    return launches[-1]


def compile_launches(
    target: int | str,
    M: int,
    mix: Mix,
    *,
    many: bool,
    backward: bool = False,
    packed: bool = False,
    identity: bool = False,
    over_base: bool = False,
    dropout_p: float = 0.0,
    aligned: bool = True,
    K: int = 4096,
    N: int = 4096,
    rank: int = 16,
    plan: config.Plan | None = None,
) -> list[Compiled]:
    """Compiles the launches of a forward, or of a backward's dX, for a target."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight, bias = empty(M, K, dtype=mix[0]), empty(N, K, dtype=mix[1]), empty(N, dtype=mix[1])
    if identity or over_base:
        weight, bias = None, None
    base = empty(M, K if backward else N, dtype=mix[0]) if over_base else None
    source: kernels.AdapterArgs | kernels.ManyAdapters
    source = kernels.AdapterArgs(1 << 40, K, 1 << 40, rank, 1, 0, 0, rank, 0, 1.0)
    segments = None
    if many:
        i32, i64 = torch.int32, torch.int64
        slices = empty(4, 2, dtype=i32) if packed else None
        source = kernels.ManyAdapters(
            empty(64, 5, dtype=i64), empty(8, 4, dtype=i32), empty(8, dtype=F32), empty(8, 2, dtype=i64),
            slices, 8, 3 if packed else 1, 16 if packed else 0,
        )  # fmt: skip
        starts, owners, blocks = empty(10, dtype=i32), empty(10, dtype=i32), empty(-(-M // 16), dtype=i32)
        segments = Segments(empty(M, dtype=i64), empty(M, dtype=i32), empty(9, dtype=i32), starts, owners, blocks)
    seed = empty(1, dtype=torch.int64) if dropout_p else None
    A, B = ("k16", "r16") if aligned else ("k", "any")
    z_width = -(-rank // 16) * 16 * (3 if packed else 1)
    adapters = kernels.Adapters(source, mix[2], z_width, A, "any" if many else B)
    with compiling(target, kernels, ("lora_linear_kernel",)) as compiled:
        if backward:
            dy, z = empty(M, N, dtype=mix[0]), empty(M, z_width, dtype=F32)
            kernels.backward(dy, weight, K, adapters, segments, z, base=base, dropout_p=dropout_p, seed=seed, plan=plan)
        else:
            kernels.forward(x, weight, bias, adapters, segments, base=base, dropout_p=dropout_p, seed=seed, plan=plan)
    return list(compiled)


def check_fits(c: Compiled, target: int | str) -> None:
    """No spills, and no more registers, shared memory and tensor memory than the target has."""
    assert c.spilled == 0, f"{c.kernel}: {c.spilled} bytes of registers spilled, {c.registers} registers"
    assert c.registers <= (512 if isinstance(target, str) else 255), f"{c.kernel}: {c.registers} registers"
    limit = config.shared_memory("hip" if isinstance(target, str) else target)
    assert c.shared <= limit, f"{c.kernel}: {c.shared} bytes of shared memory, {limit} at most"
    assert c.tensor_memory <= TENSOR_MEMORY, f"{c.kernel}: {c.tensor_memory} columns of tensor memory"


def compile_wgrad(
    target: int | str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    rank: int,
    *,
    many: bool,
    dropout_p: float = 0.0,
    block: config.Wgrad | None = None,
    M: int = 4096,
    K: int = 4096,
    N: int = 4096,
    adapters: int = 8,
) -> Compiled:
    """Compiles the launch of a backward for the adapters' gradients, for a target."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    i32, i64 = torch.int32, torch.int64
    source: kernels.AdapterArgs | kernels.ManyAdapters = kernels.AdapterArgs(0, K, 0, rank, 1, 0, 0, rank, 0, 1.0)
    segments = None
    if many:
        shapes = ((64, 5), i64), ((adapters, 4), i32), ((adapters,), F32), ((adapters, 2), i64)
        source = kernels.ManyAdapters(*(empty(*shape, dtype=kind) for shape, kind in shapes), None, adapters)
        few = empty(min(M, adapters + 1) + 1, dtype=i32)
        segments = Segments(empty(M, dtype=i64), empty(M, dtype=i32), empty(adapters + 1, dtype=i32), few, few, few)
    seed = empty(1, dtype=i64) if dropout_p else None
    z = empty(M, -(-rank // 16) * 16, dtype=F32)
    dy, x = empty(M, N, dtype=dtype), empty(M, K, dtype=dtype)
    with compiling(target, lora_wgrad, ("wgrad_kernel",)) as compiled:
        of_call = kernels.Adapters(source, adapter_dtype, z.shape[1], "k16", "r16")
        count = adapters if many else 1
        plan = lora_wgrad.plan([rank] * count, [Wanted()] * count, (0, N), dtype, x.device, many=many)
        lora_wgrad.wgrad(dy, x, z, z, of_call, segments, plan, dropout_p=dropout_p, seed=seed, block=block)
    assert len(compiled) == 1
    return compiled[0]
