"""The search for a blocking of the CPU kernels (`peftk.backends.blocking`): one value after the other, in a minute."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peftk.backends import blocking
from peftk.backends.blocking import SHIPPED, Blocking
from peftk.system.timing import interleave

SECONDS = 60.0  # of the whole search; the comparison that has begun is finished
GAIN = 1.03  # a blocking must be this much faster than the best so far: smaller differences are noise
CHOICES = {"rows": (256, 512, 1024), "l2_rows": (48, 96, 144, 288), "steps": (256, 512), "blocks": (1, 2, 4)}
DIM = 2048
TOKENS = (64, 512)
DTYPES = (torch.float32, torch.bfloat16)

Product = Callable[[], object]


class Search(NamedTuple):
    """The best blocking, how many times as fast as the shipped one it was, and how many were compared."""

    best: Blocking
    gain: float
    compared: int


def search(progress: Callable[[str], None] = lambda _: None, *, seconds: float = SECONDS) -> Search:
    """Compares a dozen blockings with the shipped one, keeps the best for later processes, and uses it.

    Each value of `CHOICES` in turn is tried in place of the best one's so far. Both run the products of `TOKENS`
    tokens with a layer of `DIM` × `DIM` in fp32 and bf16, forward and dX, in turns; the geometric mean of the ratios of
    medians counts. Bits of results are the same with all of them.

    Raises OSError if the cache cannot be written; the blocking is then unchanged.
    """
    before, until = blocking.in_use(), time.monotonic() + seconds
    best, gain, compared = SHIPPED, 1.0, 0
    products = list(_products())
    try:
        with torch.inference_mode():
            for name, values in CHOICES.items():
                for value in values:
                    tried = best._replace(**{name: value})
                    if tried == best or time.monotonic() > until:
                        continue
                    progress(f"blocking {name}={value}")
                    faster = _gain(tried, best, products, seconds / 12)
                    compared += 1
                    if faster >= GAIN:
                        best, gain = tried, gain * faster
        blocking.save(best)
    except BaseException:
        blocking.use(before)
        raise
    blocking.use(best)
    return Search(best, gain, compared)


def _gain(tried: Blocking, best: Blocking, products: list[Product], seconds: float) -> float:
    """How many times as fast as `best`."""
    ratios = []
    for product in products:
        sides = {"best": _with(best, product), "tried": _with(tried, product)}
        times = interleave(sides, seconds=seconds / len(products))
        ratios.append(times["best"].median_us / times["tried"].median_us)
    return math.exp(statistics.fmean(map(math.log, ratios)))


def _with(chosen: Blocking, product: Product) -> Product:
    def run() -> None:
        blocking.use(chosen)
        product()

    return run


def _products() -> Iterator[Product]:
    from peftk.backends import cpu

    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        weight = torch.randn(DIM, DIM, generator=generator).mul_(DIM**-0.5).to(dtype)
        for M in TOKENS:
            x = torch.randn(M, DIM, generator=generator).to(dtype)
            for W in (weight, weight.t()):  # transposed: what dX reads
                yield _product(cpu.lora_linear, x, W)


def _product(lora_linear: Callable[..., object], x: Tensor, weight: Tensor) -> Product:
    return lambda: lora_linear(x, weight, None, None)
