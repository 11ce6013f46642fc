"""Runs Triton kernels with their programs interleaved, on a weak memory.

Triton's interpreter runs the programs of a launch one after another, on memory where every store is visible at once, so
it cannot show mistakes in a protocol between programs. Under `interleaved(schedule)` the same launchers run the same
kernels, but

- the programs of a launch are cooperative threads, which yield before and after every atomic and at every barrier. A
  seed determines which continues. At most `resident` programs are running, and they start in a permuted order, so
  waiting for a program that has not started may hang, as on a GPU.
- memory is weak (`tests.support.weak_memory`): another program is certain to see a store only after store, barrier,
  release there and acquire here. A load that is not ordered after the last store is a race: the trace records it, and
  the value it reads depends on `memory`.
- a launch in which programs only poll raises `HangError` with its schedule.
- two launches that overlap (programmatic dependent launch) run together: a launch whose argument OVERLAP is true is
  held back until the next one. If that has the option `launch_pdl`, its programs start as soon as all of the first have
  executed gdc_launch_dependents or ended; its gdc_wait returns, and shows all stores, when all of the first have ended.

`docs/protocol.md` says what this models and what it leaves out. It needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from .weak_memory import Clock, WeakMemory

POLICIES = ("random", "newest", "oldest", "priority")
MEMORIES = ("stale", "fresh", "mixed")

_run = InterpretedFunction.run
_load = InterpreterBuilder.create_masked_load
_store = InterpreterBuilder.create_masked_store
_rmw = InterpreterBuilder.create_atomic_rmw
_cas = InterpreterBuilder.create_atomic_cas

_ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_MAX_STEPS = 200_000


class Schedule(NamedTuple):
    """Everything that determines how a launch runs: the same schedule gives the same run.

    policy: which program continues. "random": any that does not merely poll; "newest", "oldest": the one that started
    last or first, until it has to wait; "priority": the one with the highest random priority, which is sometimes made
    the lowest. memory: what a racing load reads. "stale": the oldest possible value, which is junk if it is from before
    the launch; "fresh": the newest; "mixed": any, drawn for each element.
    """

    seed: int
    resident: int = 8
    policy: str = "random"
    memory: str = "stale"


def schedules(count: int) -> list[Schedule]:
    """Schedules over all policies and memories, from one program at a time to all at once."""
    kinds = list(itertools.product((3, 64, 1, 2, 8), POLICIES, MEMORIES))
    # the stride and the number of kinds are coprime, so that even a few schedules are of different kinds
    return [Schedule(seed, *kinds[seed * 23 % len(kinds)]) for seed in range(count)]


class Trace:
    """Records what happened in the launches under one `interleaved`."""

    def __init__(self) -> None:
        self.launches = 0
        self.programs = 0
        self.turns: list[int] = []  # the program of each step
        self.polls = 0  # atomics and volatile loads that changed nothing, and turns of a gdc_wait
        self.overlaps = 0  # programs that started while the launch before theirs was running
        self.races: set[str] = set()
        self.held: Callable[..., Any] | None = None

    def end(self) -> None:
        """Runs a launch that was held back, if there is one, alone."""
        if self.held is not None:
            self.held()


class HangError(Exception):
    """All running programs wait."""


@contextlib.contextmanager
def interleaved(schedule: Schedule) -> Iterator[Trace]:
    """Every Triton launch inside runs according to the schedule."""
    trace = Trace()

    def run(function: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        def with_others(*after: _Grid) -> None:
            """Runs this launch, together with those that overlap with it."""

            def all_programs(arguments: dict[str, Any]) -> tuple[int]:
                shape = tuple(grid(arguments) if callable(grid) else grid)
                own = _Grid(function.rewrite(), arguments, shape + (1,) * (3 - len(shape)))
                first, trace.held = trace.held if kwargs.get("launch_pdl") else None, None
                if first is None:
                    _Launch(schedule, trace, (own, *after)).run()
                else:
                    first(own)
                return (0,)  # none is left to triton's own loop

            # Triton calls a grid after converting the arguments and patching its language, which programs need
            _run(function, *args, grid=all_programs, warmup=warmup, **kwargs)

        if not kwargs.get("launch_pdl"):
            trace.end()
            if kwargs.get("OVERLAP"):
                trace.held = with_others
                return
        with_others()

    with mock.patch.object(InterpretedFunction, "run", run):
        yield trace
        trace.end()


class Outcome(NamedTuple):
    """The result of two launches in a row, as when a graph is replayed.

    verdict: "right" (the expected bits, all counters zero, and no race, which would make the bits a matter of luck),
    "wrong", "not reset", "race" or "hang".
    """

    verdict: str
    results: list[Sequence[Tensor]]
    turns: list[int]
    polls: int
    overlaps: int


def outcome(
    schedule: Schedule,
    launch: Callable[[], Sequence[Tensor]],
    expected: Sequence[Tensor],
    counters: Callable[[], Tensor],
) -> Outcome:
    results: list[Sequence[Tensor]] = []
    verdict = "right"
    with interleaved(schedule) as trace:
        while verdict == "right" and len(results) < 2:
            try:
                results.append(launch())
                trace.end()
            except HangError:
                verdict = "hang"
                break
            if not all(torch.equal(*pair) for pair in zip(results[-1], expected, strict=True)):
                verdict = "wrong"
            elif counters().any():
                verdict = "not reset"
            elif trace.races:
                verdict = "race"
    return Outcome(verdict, results, trace.turns, trace.polls, trace.overlaps)


class _Abandoned(BaseException):
    """Unwinds a program whose launch ends early. Not an Exception, since Triton wraps those."""


class _Grid(NamedTuple):
    """A launch as the host asked for it."""

    kernel: Callable[..., None]
    arguments: dict[str, Any]
    shape: tuple[int, ...]


class _Program:
    def __init__(self, number: int, place: tuple[int, ...], clock: Clock) -> None:
        self.number = number  # of its grid
        self.place = place
        self.clock = clock
        self.priority = 0.0
        self.last_run = 0
        self.polled_at = -1  # the number of changes of memory at its last poll
        self.waits_at: int | None = None  # the address it polled last; 0: the launch before
        self.lets_next_begin = False
        self.thread: threading.Thread | None = None
        self.go = threading.Semaphore(0)
        self.ended = False
        self.error: BaseException | None = None


class _Launch:
    """The programs of one launch, or of several that overlap, their turns, and the builder's operations on memory."""

    def __init__(self, schedule: Schedule, trace: Trace, grids: Sequence[_Grid]) -> None:
        self.schedule = schedule
        self.trace = trace
        self.grids = grids
        self.random = random.Random(schedule.seed)
        self.memory = WeakMemory(schedule.memory, self.random, trace.races, self.name)
        places = [(n, place) for n, grid in enumerate(grids) for place in itertools.product(*map(range, grid.shape))]
        self.programs = [_Program(*place, Clock(at, len(places))) for at, place in enumerate(places)]
        self.unstarted = list(self.programs)
        self.random.shuffle(self.unstarted)
        self.resident: list[_Program] = []
        self.current: _Program | None = None
        self.back = threading.Semaphore(0)
        self.abandoned = False
        self.changes = 0
        self.idle = 0  # polls since the last change

    def run(self) -> None:
        self.trace.launches += len(self.grids)
        self.trace.programs += len(self.programs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(InterpreterBuilder, **self.operations()))
            for module in [module for module in sys.modules.values() if "gdc_wait" in vars(module)]:
                if module.__name__.startswith("peftk."):  # and not Triton's own
                    for name in ("gdc_wait", "gdc_launch_dependents"):
                        stack.enter_context(mock.patch.object(module, name, getattr(self, name)))
            try:
                for step in range(_MAX_STEPS):
                    while len(self.resident) < self.schedule.resident and self.startable():
                        self.start(self.startable()[-1])
                    if not self.resident:
                        return
                    self.resume(self.choose(), step)
                    if self.idle > 64 + 16 * len(self.resident):
                        break
                raise HangError(self.description())
            finally:
                self.abandon()

    # Turns

    def startable(self) -> list[_Program]:
        """Programs of a later launch only when all of the one before have let them."""
        late = {p.number for p in self.programs if not (p.ended or p.lets_next_begin)}
        return [p for p in self.unstarted if p.number - 1 not in late]

    def before(self, program: _Program) -> list[_Program]:
        """The programs of the launch before."""
        return [other for other in self.programs if other.number == program.number - 1]

    def start(self, program: _Program) -> None:
        self.unstarted.remove(program)
        self.trace.overlaps += any(not other.ended for other in self.before(program))
        program.priority = self.random.random()
        self.resident.append(program)
        self.changed()

    def choose(self) -> _Program:
        """The program that continues. Polling again before anything has changed is no new interleaving.

        If all programs poll, they take turns, until the launch counts as hanging.
        """
        ready = [program for program in self.resident if program.polled_at != self.changes]
        if not ready:
            return min(self.resident, key=lambda program: program.last_run)
        match self.schedule.policy:
            case "newest":
                return ready[-1]
            case "oldest":
                return ready[0]
            case "priority":
                first = max(ready, key=lambda program: program.priority)
                if self.random.random() < 1 / 8:
                    first.priority = -self.random.random()
                return first
            case _:
                return self.random.choice(ready)

    def resume(self, program: _Program, step: int) -> None:
        self.trace.turns.append(program.clock.program)
        self.current = program
        program.last_run = step
        interpreter.interpreter_builder.set_grid_dim(*self.grids[program.number].shape)
        interpreter.interpreter_builder.set_grid_idx(*program.place)  # the builder's only state of a program
        if program.thread is None:
            program.thread = threading.Thread(target=self.body, args=(program,), daemon=True)
            program.thread.start()
        else:
            program.go.release()
        self.back.acquire()
        if program.ended:
            program.thread.join()
            self.resident.remove(program)
            self.changed()
            if program.error is not None:
                raise program.error

    def body(self, program: _Program) -> None:
        try:
            grid = self.grids[program.number]
            grid.kernel(**grid.arguments)
        except BaseException as error:
            program.error = error
        program.clock.barrier()  # what it stored is complete
        program.ended = True
        own = [p for p in self.programs if p.number == program.number]
        if all(p.ended for p in own) and not all(p.ended for p in self.before(program)):
            self.trace.races.add("a launch ended before the one that it overlaps with")
        self.back.release()

    def pause(self) -> _Program:
        """Called by a program: lets others run, and returns the program when it is its turn again."""
        program = self.current
        self.back.release()
        program.go.acquire()
        if self.abandoned:
            raise _Abandoned
        return program

    def abandon(self) -> None:
        self.abandoned = True
        for program in self.resident:
            if program.thread is not None and not program.ended:
                program.go.release()
                program.thread.join()

    def changed(self) -> None:
        self.changes += 1
        self.idle = 0

    def polled(self, program: _Program, address: int) -> None:
        self.trace.polls += 1
        self.idle += 1
        program.polled_at = self.changes
        program.waits_at = address

    def description(self) -> str:
        waits = [f"{p.place} polls {self.name(p.waits_at)}" for p in self.resident if p.waits_at is not None]
        return f"{self.schedule}: {', '.join(waits)}; {len(self.unstarted)} of {len(self.programs)} have not started"

    def name(self, address: int) -> str:
        """The pointer argument at or next below an address, for messages."""
        if address == 0:
            return "the launch before"
        below = {}
        for name, value in itertools.chain.from_iterable(grid.arguments.items() for grid in self.grids):
            base = int(value.handle.data.flat[0]) if getattr(value, "dtype", None) and value.dtype.is_ptr() else None
            if base is not None and base <= address:
                below[base] = f"{name}[{(address - base) * 8 // value.dtype.element_ty.primitive_bitwidth}]"
        return below[max(below)] if below else hex(address)

    # Launches that overlap

    def gdc_launch_dependents(self) -> None:
        self.pause().lets_next_begin = True
        self.changed()
        self.pause()

    def gdc_wait(self) -> None:
        program = self.pause()
        while not all(other.ended for other in self.before(program)):
            self.polled(program, 0)
            self.pause()
        for other in self.before(program):
            np.maximum(program.clock.knows, other.clock.knows, out=program.clock.knows)
        program.waits_at = None

    # The builder's operations

    def operations(self) -> dict[str, Callable[..., Any]]:
        """Replacements of InterpreterBuilder's methods. All its loads and stores end in the two masked ones."""

        def create_barrier(builder: Any) -> None:
            self.pause().clock.barrier()

        # Between the operands and is_volatile are cache options, which differ between Triton's versions.
        def create_masked_load(builder: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
            if not named.get("is_volatile", rest and rest[-1]):
                result = _load(builder, ptrs, mask, other, *rest, **named)
                self.memory.load(self.current.clock, ptrs.data, mask.data, result.data)
                return result
            program = self.pause()  # a relaxed read
            result = _load(builder, ptrs, mask, other, *rest, **named)
            self.polled(program, int(ptrs.data.flat[0]))
            self.pause()
            return result

        def create_masked_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> None:
            self.memory.store(self.current.clock, ptrs.data, mask.data, value.data)
            _store(builder, ptrs, value, mask, *rest, **named)

        def create_atomic_rmw(builder: Any, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
            atomic = functools.partial(_rmw, builder, op, ptr, val, mask, sem, scope)
            return self.atomic(atomic, ptr, mask.data.astype(bool), sem, scope, replaces=op == ir.ATOMIC_OP.XCHG)

        def create_atomic_cas(builder: Any, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
            atomic = functools.partial(_cas, builder, ptr, cmp, val, sem, scope)
            return self.atomic(atomic, ptr, np.ones(ptr.data.shape, bool), sem, scope, replaces=False)

        return {name: operation for name, operation in locals().items() if name.startswith("create_")}

    def atomic(
        self, atomic: Callable[[], Any], ptr: Any, mask: np.ndarray, sem: Any, scope: Any, *, replaces: bool
    ) -> Any:
        """Executes an atomic on real memory at once.

        One with scope cta orders nothing here, nor one on a block of addresses, since several threads execute it.
        """
        program = self.pause()
        orders = ptr.data.size == 1 and bool(mask.all()) and scope != ir.MEM_SYNC_SCOPE.CTA
        before = _read(ptr, mask)
        result = atomic()
        after = _read(ptr, mask)
        for i in np.flatnonzero(mask):
            self.memory.atomic(
                program.clock,
                int(ptr.data.flat[i]),
                before.flat[i : i + 1],
                after.flat[i : i + 1],
                acquires=orders and sem in _ACQUIRES,
                releases=orders and sem in _RELEASES,
                replaces=replaces,
            )
        if before.tobytes() == after.tobytes():
            self.polled(program, int(ptr.data.flat[0]))
        else:
            program.waits_at = None
            self.changed()
        self.pause()
        return result


def _read(ptr: Any, mask: np.ndarray) -> np.ndarray:
    dtype = interpreter._get_np_dtype(ptr.get_element_ty())
    return interpreter._interpreter.load(ptr.data, mask, np.zeros(ptr.data.shape, dtype), dtype)
