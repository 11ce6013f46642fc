"""All groups of the triage, in the order in which they run: what would break first, then what is worth most."""

from __future__ import annotations

import functools

from peftk.tools.triage import correctness, environment, timing
from peftk.tools.triage.group import Group
from peftk.tools.triage.timing import Series


def _timing(name: str, series: Series, seconds: tuple[int, int]) -> Group:
    title = f"GPU time, N={series.N}, r={series.rank}, factors in {series.factors}"
    return Group(name, title, functools.partial(timing.gpu_time, series=series), seconds, limit=240)


_ALL = (
    Group("environment", "the machine, and a compile that is cached", environment.checks, (25, 30)),
    Group("one", "one adapter: y, dX, gradients", functools.partial(correctness.repeats, many=False), (15, 45)),
    Group("many", "many adapters: y, dX, gradients", functools.partial(correctness.repeats, many=True), (15, 60)),
    Group("decode", "decode steps in CUDA C++", correctness.decode, (12, 12), limit=90),
    Group("merge", "merge, and back to every bit", correctness.merge, (10, 20), limit=90),
    Group("graphs", "CUDA graphs: other ids, other adapters", correctness.graphs, (20, 50)),
    Group("compile", 'torch.compile(mode="reduce-overhead")', correctness.reduce_overhead, (40, 60), limit=240),
    Group("streams", "four streams at once", correctness.streams, (15, 15), limit=90),
    _timing("time-r16", Series(N=4096, rank=16), (18, 80)),
    _timing("time-r64", Series(N=4096, rank=64), (18, 20)),
    _timing("time-fp32", Series(N=4096, rank=16, factors="fp32"), (18, 70)),
    Group("host", "what the host does for a call", timing.host_time, (12, 20), limit=90),
    _timing("time-r16-wide", Series(N=14336, rank=16), (22, 25)),
    _timing("time-r64-wide", Series(N=14336, rank=64), (22, 25)),
    _timing("time-fp32-wide", Series(N=14336, rank=16, factors="fp32"), (22, 25)),
)
GROUPS = {group.name: group for group in _ALL}
