"""The speed section of `peftk selftest`: rows of `peftk bench` timed with CUDA events, and one launch against two.

Each side is checked against fp64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftk.backends.call import BackendError
from peftk.reference import bounds
from peftk.system.timing import Clock
from peftk.tools.benchmark import lora_linear, merge, multi_lora_linear, peers, train
from peftk.tools.benchmark.common import LINEAR, SCALING, Case, Record, Shape, Side, factors, layer, measure
from peftk.tools.selftest.check import Check, Found, NotRunError, Target
from peftk.tools.selftest.plans import override_plan, ways


class Group(NamedTuple):
    """Rows of one table. clock: None for wall time, which includes the host's launches."""

    title: str
    rows: list[tuple[Shape, Callable[[], Case]]]
    clock: Clock | None


class Sizes(NamedTuple):
    dtype: str
    dims: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    mixed_tokens: tuple[int, ...]
    mixed_ranks: tuple[int, ...]
    adapters: tuple[int, ...]
    trained: tuple[int, ...]


FULL = Sizes(
    "bf16", ((4096, 4096), (4096, 14336)), (1, 16, 64, 512, 4096), (8, 16, 64),
    mixed_tokens=(16, 64, 512), mixed_ranks=(8, 16, 64), adapters=(1, 8, 64), trained=(512, 4096),
)  # fmt: skip
TINY = Sizes("fp32", ((48, 40),), (3,), (2,), mixed_tokens=(3,), mixed_ranks=(2, 4), adapters=(2,), trained=(3,))


def groups(target: Target, clock: Clock | None) -> Iterator[Group]:
    """Everything to measure; on tiny shapes in the interpreter."""
    device, requested = target.device, ("triton",) if target.is_rehearsal else ()
    dtype, dims, tokens, ranks, mixed_tokens, mixed_ranks, adapters, trained = TINY if target.is_rehearsal else FULL
    square = dims[0]

    def rows(module: Any, shapes: list[Shape], *more: Any) -> list[tuple[Shape, Callable[[], Case]]]:
        return [(shape, lambda shape=shape: module.case(shape, device, requested, *more)) for shape in shapes]  # type: ignore[misc]

    for size in dims:
        yield Group("forward", rows(lora_linear, lora_linear.shapes(dtype, size, tokens, ranks)), clock)
    for size in dims:
        mixed = multi_lora_linear.shapes(dtype, size, mixed_tokens, mixed_ranks, adapters)
        yield Group("forward, adapters of mixed ranks", rows(multi_lora_linear, mixed, mixed_ranks), clock)
    yield Group("forward and backward", rows(train, train.shapes(dtype, square, trained, ranks[-1:])), clock)
    yield Group("merge, and its receipt", rows(merge, merge.shapes("merge", dtype, square, ranks[:1])), clock)
    plan_shapes = lora_linear.shapes(dtype, square, tokens, ranks[:1])
    yield Group("one launch or two", [(s, lambda s=s: plans_case(s, device)) for s in plan_shapes], clock)  # type: ignore[misc]
    host = lora_linear.shapes(dtype, square, tokens[:1], ranks[:1])
    yield Group("forward from the call to its end, including the host's work", rows(lora_linear, host), None)


def checks(target: Target, clock: Clock | None, tables: dict[str, list[list[Record]]]) -> Iterator[Check]:
    """A check per row. It adds its records to `tables`, by the title of their table."""
    seconds, repeats = (0.01, 1) if target.is_rehearsal else (0.4, 200)
    for group in groups(target, clock):
        for shape, build in group.rows:

            def run(group: Group = group, shape: Shape = shape, build: Callable[[], Case] = build) -> Found:
                try:
                    case = build()
                except BackendError as refused:
                    raise NotRunError(str(refused)) from refused
                records = measure(case, device=target.device, seconds=seconds, repeats=repeats, clock=group.clock)
                title = f"{group.title}: {shape.dtype} {shape.K} → {shape.N}, µs"
                tables.setdefault(title, []).append(records)
                # errors of other libraries are shown, but only ours make the check fail
                ours = [r for r in records if r.side.startswith("peftk")]
                wrong = [f"{r.side}: error {r.error:.2f}× the bound" for r in ours if not r.passed]
                figures = {"row": str(shape), "us": {r.side: r.times() for r in records}}
                return Found(0.0, figures, "; ".join(wrong) or None)

            yield Check("speed", ",".join(target.backends), group.title, str(shape), run)
    yield Check("speed", "HF PEFT", "compared with peftk", "all of the above", _check_peft_installed)


def _check_peft_installed() -> float:
    if not peers.has_peft():
        raise NotRunError("HF PEFT is not installed (pip install peftk[bench])")
    return 0.0


def plans_case(shape: Shape, device: str) -> Case:
    """One call, launched in each way that this GPU has."""
    dtype = shape.torch_dtype
    x, linear, base, base_magnitude = layer(shape.M, shape.K, shape.N, dtype, device)
    A, B = factors(shape.K, shape.N, shape.rank, dtype, device)
    expected = bounds.with_adapter(x, base, base_magnitude, A, B, SCALING)
    base_only = bounds.Expected(base, base_magnitude, shape.K, base, torch.zeros_like(base))
    ours = lora_linear.peftk_layer(linear, A, B, "triton", shape.M)

    def side(name: str, changes: dict[str, Any]) -> Side:
        def run() -> Tensor:
            with override_plan(**changes):
                return ours(x)

        return Side(f"peftk {name}", run, lambda: bounds.error(run(), expected, fused=True))

    sides = [Side(LINEAR, lambda: linear(x), lambda: bounds.error(linear(x), base_only, fused=False))]
    sides += [side(name, changes) for name, changes in ways(device).items()]
    return Case(shape, tuple(sides), bounds.sensitivity(expected, dtype))
