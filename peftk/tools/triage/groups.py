"""All groups of the triage, in the order in which they run: what would break first, then what is worth most."""

from __future__ import annotations

import functools

from peftk.tools.triage import correctness, environment, prepare, timing
from peftk.tools.triage.group import Group
from peftk.tools.triage.timing import Series


def _timing(name: str, series: Series) -> Group:
    title = f"GPU time, N={series.N}, r={series.rank}, factors in {series.factors}"
    return Group(name, title, functools.partial(timing.gpu_time, series=series), compiles=True)


_ONE, _MANY = (functools.partial(correctness.repeats, many=many) for many in (False, True))
_TESTED = (
    Group("one", "one adapter: y, dX, gradients", _ONE, compiles=True),
    Group("many", "many adapters: y, dX, gradients", _MANY, compiles=True),
    Group("decode", "decode steps in CUDA C++", correctness.decode, limit=90),
    Group("merge", "merge, and back to every bit", correctness.merge, limit=90, compiles=True),
    Group("graphs", "CUDA graphs: other ids, other adapters", correctness.graphs, compiles=True),
    Group(
        "compile",
        'torch.compile(mode="reduce-overhead")',
        correctness.reduce_overhead,
        limit=240,
        check_limit=120,
        compiles=True,
    ),
    Group("streams", "four streams at once", correctness.streams, limit=90),
)
_TIMED = (
    _timing("time-r16", Series(N=4096, rank=16)),
    _timing("time-r64", Series(N=4096, rank=64)),
    _timing("time-fp32", Series(N=4096, rank=16, factors="fp32")),
    Group("host", "what the host does for a call", timing.host_time, limit=90, compiles=True),
    _timing("time-r16-wide", Series(N=14336, rank=16)),
    _timing("time-r64-wide", Series(N=14336, rank=64)),
    _timing("time-fp32-wide", Series(N=14336, rank=16, factors="fp32")),
)
COMPILED = tuple(group.name for group in (*_TESTED, *_TIMED) if group.compiles)
_FIRST = (
    Group("environment", "the machine, and a compile that is cached", environment.checks, limit=120),
    prepare.group("prepare", COMPILED, limit=180),
)
GROUPS = {group.name: group for group in (*_FIRST, *_TESTED, *_TIMED)}
