"""`--triage --full`: what `peftk selftest` checks on a GPU, in groups that survive what the triage's do.

They come after the triage's, in the order of their worth: results where kernels differ most from each other, then
behaviour, speed, and the rest. Every check of the selftest is in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from peftk.system.timing import cuda_events
from peftk.tools.selftest import behaviour, parity, speed
from peftk.tools.selftest.check import Check, Target
from peftk.tools.triage import prepare
from peftk.tools.triage.group import Group
from peftk.tools.triage.groups import GROUPS


def _behaviour(target: Target) -> Iterator[Check]:
    return behaviour.checks(target, behaviour.tools(target))


def _speed(target: Target) -> Iterator[Check]:
    return speed.checks(target, cuda_events() if target.device == "cuda" else None, {})


class Part(NamedTuple):
    """Some of the checks of a section of the selftest, for a group."""

    name: str
    title: str
    section: Callable[[Target], Iterator[Check]]
    has: Callable[[Check], bool]

    def checks(self, target: Target) -> Iterator[Check]:
        return filter(self.has, self.section(target))


def _of(*ops: str) -> Callable[[Check], bool]:
    return lambda check: check.op in ops and check.backend != "reference"


def _tiles(dtype: str) -> Callable[[Check], bool]:
    return lambda check: check.op == "every tile" and check.case.startswith(dtype)


def _not_of(*ops: str, backend: str) -> Callable[[Check], bool]:
    return lambda check: check.op not in ops and check.backend == backend


_SWEEPS = ("lora_linear", "backward", "multi_lora_linear", "merge")
_FORMS = ("random cases", "adapter_block", "multi_adapter_block", "packed outputs", "every way to launch")
_COMPILERS = ("torch.compile", "opcheck")
_FORWARD, _MIXED = "forward", "forward, adapters of mixed ranks"

PARTS = (
    Part("tiles-bf16", "every Triton tile, in bfloat16", parity.checks, _tiles("bfloat16")),
    Part("steps", "400 decode steps in CUDA C++", parity.checks, _of("random decode steps")),
    Part("sweeps", "every operation, dtype and shape", parity.checks, _of(*_SWEEPS)),
    Part("tiles-fp32", "every Triton tile, in float32", parity.checks, _tiles("float32")),
    Part("tiles-fp16", "every Triton tile, in float16", parity.checks, _tiles("float16")),
    Part("behaviour", "Triton: bits, counters, graphs, …", _behaviour, _not_of(*_COMPILERS, backend="triton")),
    Part("behaviour-cuda", "CUDA C++: bits, counters, graphs, …", _behaviour, _not_of(backend="cuda")),
    Part("compilers", "torch.compile and opcheck", _behaviour, _of(*_COMPILERS)),
    Part("speed", "one adapter: GPU time of all sides", _speed, _of(_FORWARD)),
    Part("speed-mixed", "many adapters: GPU time of all sides", _speed, _of(_MIXED)),
    Part("speed-rest", "training, merges, launches, host", _speed, lambda check: check.op not in (_FORWARD, _MIXED)),
    Part("cases", "random calls, every form of call and launch", parity.checks, _of(*_FORMS)),
    Part("sorts", "rows sorted by adapter", parity.checks, _of("segments")),
    Part("reference", "plain torch", parity.checks, _not_of(backend="reference")),
)
# Groups with many kernels to compile, which all cores do before the first of them.
_PREPARED = (("tiles-bf16", "sweeps", "tiles-fp32", "tiles-fp16"), ("cases",))


def _groups() -> Iterator[Group]:
    for part in PARTS:
        for prepared in _PREPARED:
            if part.name == prepared[0]:
                yield prepare.group(f"prepare-{part.name}", prepared, limit=600)
        yield Group(part.name, part.title, part.checks, limit=900, check_limit=120)


FULL = {group.name: group for group in _groups()}
EVERY = {**GROUPS, **FULL}
