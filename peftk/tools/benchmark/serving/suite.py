"""`peftk bench --suite serving`: throughput beside others, popularity, arrivals, loads; checked before it is timed."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peftk.serve import AdapterStore, Engine
from peftk.system import extras
from peftk.tools import smollm2
from peftk.tools.benchmark.environment import busy
from peftk.tools.benchmark.peers import UnavailableError
from peftk.tools.benchmark.quiet import MOST, Watch, is_quiet
from peftk.tools.benchmark.serving import adapters, drive, llama_cpp_side, sides, targets, turns, vllm_side
from peftk.tools.benchmark.serving.check import Alone
from peftk.tools.benchmark.serving.sides import Side
from peftk.tools.benchmark.serving.targets import TARGETS, Target
from peftk.tools.benchmark.serving.traffic import (
    DISTINCT,
    POPULARITIES,
    UNIFORM,
    ZIPF,
    Job,
    arrivals,
    jobs,
    tokens,
    without_adapters,
)
from peftk.tools.benchmark.suite import COLOURS, NOT_MEASURED, NOT_QUIET, PASS, SHORT, WRONG
from peftk.tools.smollm2 import Language

RANKS = (4, 8, 16, 32)
MIN_SENSITIVITY = 2.0


@dataclasses.dataclass(frozen=True)
class Options:
    """quick: fewer adapters, tokens and rounds, in about two minutes. language: what to serve; None: SmolLM2 if it is
    there, else a small random Llama."""

    quick: bool = False
    language: Language | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        return (1, 8, 64) if self.quick else (1, 8, 64, 512)

    @property
    def rounds(self) -> int:
        return 1 if self.quick else 3

    def sizes(self, count: int) -> tuple[int, int]:
        """Tokens of a prompt, and new ones, in a batch of so many requests."""
        if self.quick:
            return (16, 8) if count <= 8 else (16, 4)
        return (53, 32) if count <= 8 else (26, 8)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """One side of a batch of jobs that come at once. Rates in tokens per second; None if it was not measured."""

    adapters: int
    side: str
    wall: float | None
    processor: float | None
    rounds: int
    error: float | None  # of the worst token, in multiples of what is allowed
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Load:
    """One kind of traffic. Times in ms: p50, p95, p99."""

    loop: str
    adapters: int
    popularity: str
    requests: int
    rate: float | None  # requests that come in a second, of an open loop
    tokens_per_second: float
    first_token_ms: dict[str, float]
    per_token_ms: dict[str, float]
    hits: int
    loads: int
    reads: int
    not_run: float | None


@dataclasses.dataclass(frozen=True)
class Switch:
    """Loads of rank-16 adapters from host memory into a full bank, and reads from disk. Times in ms."""

    loads: int
    p50_ms: float
    p99_ms: float
    read_p50_ms: float
    not_run: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """One target. value: how many times faster; for a load, ms."""

    adapters: int
    peer: str
    value: float | None
    processor: float | None  # the same in processor time
    target: float
    at_most: bool
    mark: str
    not_run: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    model: str
    throughput: list[Throughput]
    loads: list[Load]
    switch: Switch
    results: list[Result]
    seconds: float

    @property
    def all_correct(self) -> bool:
        """Whether every output was that of its adapter alone. A missed target is not an error."""
        return all(side.error is None or side.error <= 1 for side in self.throughput)


def run(console: Console, options: Options, env: dict[str, Any]) -> Outcome:
    """Measures one part after another, and prints each table when it is complete.

    Raises extras.MissingExtraError if transformers is not installed.
    """
    extras.require("serve", "--suite serving", ["transformers"])
    began = time.perf_counter()
    reason = None if options.language is not None else smollm2.why_not()
    language = options.language or (smollm2.random_llama() if reason else smollm2.load())
    console.print(
        f"[bold]peftk {env['peftk']}[/] on {language.name} · {env['cpu']}, {env['threads']} threads · "
        f"torch {env['torch']}, transformers {env['transformers']}",
        highlight=False,
    )
    if reason:
        console.print(f"[yellow]{reason}[/]", highlight=False)
    if warning := busy(env):
        console.print(f"[yellow]{warning}[/]", highlight=False)
    console.print(
        "[dim]Every token of a mix is first compared with its adapter alone, in fp32. Sides take turns; medians.\n"
        "In brackets: tokens per second of processor time, which other programs disturb less.[/]\n",
        highlight=False,
    )
    with tempfile.TemporaryDirectory(prefix="peftk-adapters-") as temporary, console.status("") as status:
        folder = Path(temporary)
        status.update("[dim]writing adapters")
        most = max(options.counts)
        # beyond 64 they are of the smallest rank: 512 of all ranks are 6 GB
        names = adapters.write(
            folder, language.model, [RANKS[n % len(RANKS)] if n < 64 else RANKS[0] for n in range(most)]
        )
        alone = Alone(language, folder, limit=8 if options.quick else 32)
        throughput, results = [], []
        for count in (8, 64):
            status.update(f"[dim]{count} adapters in one batch")
            measured, watched = _throughput(language, folder, names[:count], options, alone)
            console.print(_throughput_table(count, measured))
            throughput += measured
            results += _results(count, measured, watched)
        with sides.engine(language, folder, bank_slots=64) as engine:
            loads = _traffic(engine, names, options, language, status)
        console.print(_traffic_table(loads))
        status.update("[dim]loads into the bank")
        switch = _switch(language, Path(temporary, "r16"), 64 if options.quick else 256)
        results += [_load_result(target, switch) for target in TARGETS if target.peer == targets.LOAD]
    console.print(_results_table(results))
    for result in results:
        if result.note:
            console.print(f"[dim]{result.peer}: {result.note}[/]", highlight=False)
    outcome = Outcome(language.name, throughput, loads, switch, results, time.perf_counter() - began)
    console.print(_summary(outcome), highlight=False)
    return outcome


# ---- many adapters in one batch, beside others


def _throughput(
    language: Language, folder: Path, names: Sequence[str], options: Options, alone: Alone
) -> tuple[list[Throughput], float | None]:
    """All sides that are compared at this number of adapters, and the share of time in which a thread did not run."""
    prompt, new = options.sizes(len(names))
    vocabulary = language.model.config.vocab_size
    asked = jobs(names, len(names), popularity=DISTINCT, prompt=prompt, new=new, vocabulary=vocabulary)
    plain = without_adapters(asked)
    engine = sides.engine(language, folder, bank_slots=len(names))
    with_adapters = Side(targets.ENGINE, lambda jobs: sides.asked_of(engine, jobs), engine.close)
    made = [
        (with_adapters, asked),
        (Side(targets.NO_ADAPTERS, with_adapters.answer), plain),
    ]
    if not options.quick or len(names) <= 8:  # it may be many times slower than the others
        made.append((sides.continuous(targets.UNMODIFIED, language), plain))
    missing: list[Throughput] = []
    if len(names) <= 8:
        made.append((sides.padded(targets.PADDED, language, folder, names), asked))
        again = {
            targets.VLLM_PLUGIN: (targets.VLLM_PLUGIN_BASE, plain),
            targets.LLAMA_CPP: (targets.LLAMA_CPP_SAME, [job._replace(adapter=names[0]) for job in asked]),
        }
        no_vllm = vllm_side.why_not()
        for name, reason, make, jobs_of_side in (
            (targets.PEFT, None if extras.is_installed("peft") else "peft is not installed", sides.hf_peft, asked),
            (targets.VLLM, no_vllm, vllm_side.side, asked),
            (targets.VLLM_PLUGIN, no_vllm, vllm_side.with_plugin, asked),
            (targets.VLLM_PLAIN, no_vllm, vllm_side.without_adapters, plain),
            (targets.LLAMA_CPP, llama_cpp_side.why_not(language), llama_cpp_side.side, asked),
        ):
            try:
                if reason is not None:
                    raise UnavailableError(reason)
                made.append((make(name, language, folder, names), jobs_of_side))
            except UnavailableError as error:
                missing.append(Throughput(len(names), name, None, None, 0, None, str(error)))
            else:
                if name in again:  # the same process, asked for something else
                    other, jobs_of_side = again[name]
                    made.append((dataclasses.replace(made[-1][0], name=other, close=lambda: None), jobs_of_side))
    try:
        errors = {}
        for side, ask in made:
            answers = side.answer(ask)
            errors[side.name] = alone.error(ask, answers)
            if side is with_adapters and alone.sensitivity(ask, answers) < MIN_SENSITIVITY:
                raise AssertionError("the adapters change too little for a check")
        watch = Watch()
        correct = {
            side.name: turns.Timed(functools.partial(side.answer, ask), side.processor)
            for side, ask in made
            if errors[side.name] <= 1
        }
        found = turns.rates(correct, tokens(asked), options.rounds)
        not_run = watch.not_run()
    finally:
        for side, _ in made:
            side.close()
        engine.store.close()
    measured = []
    for side, _ in made:
        rate = turns.median(found[side.name]) if side.name in found else None
        measured.append(
            Throughput(
                len(names),
                side.name,
                rate and rate.wall,
                None if rate is None or not math.isfinite(rate.processor) else rate.processor,
                options.rounds,
                errors[side.name],
                "" if rate else "an output is not that of its adapter alone",
            )
        )
    return [*measured, *missing], not_run


def _results(count: int, measured: Sequence[Throughput], not_run: float | None) -> list[Result]:
    by_side = {side.side: side for side in measured}
    ours = by_side[targets.ENGINE]
    found = []
    for target in TARGETS:
        if target.adapters != count or target.peer == targets.LOAD:
            continue
        peer = by_side.get(target.peer)
        if target.peer == targets.FASTEST_WITHOUT:
            without = [side for side in measured if side.side in (targets.NO_ADAPTERS, targets.UNMODIFIED)]
            peer = max(without, key=lambda side: side.wall or 0.0)
        assert peer is not None
        blank = Result(count, target.peer, None, None, target.value, target.at_most, NOT_MEASURED, not_run, peer.note)
        if ours.wall is None or (peer.error is not None and peer.error > 1):
            found.append(dataclasses.replace(blank, mark=WRONG))
        elif peer.wall is None:
            found.append(blank)
        else:
            value = ours.wall / peer.wall
            processor = ours.processor / peer.processor if ours.processor and peer.processor else None
            found.append(
                dataclasses.replace(blank, value=value, processor=processor, mark=_mark(target, value, not_run))
            )
    return found


def _mark(target: Target, value: float, not_run: float | None) -> str:
    return NOT_QUIET if not is_quiet(not_run) else PASS if target.met(value) else SHORT


# ---- traffic


def _traffic(engine: Engine, names: Sequence[str], options: Options, language: Language, status: Any) -> list[Load]:
    """Closed loops over numbers of adapters and popularities, then open loops at 70 % of what these could do."""
    count, clients, prompt, new = (12, 6, 16, 6) if options.quick else (32, 16, 53, 16)
    kinds = [(1, UNIFORM)] + [(n, p) for n in options.counts if n > 1 for p in POPULARITIES]
    vocabulary = language.model.config.vocab_size
    asked = {
        (n, p): jobs(names[:n], count, popularity=p, prompt=prompt, new=new, vocabulary=vocabulary) for n, p in kinds
    }
    measured = []
    for n, popularity in kinds:
        status.update(f"[dim]closed loop, {n} adapters, {popularity}")
        measured.append(_load(engine, asked[n, popularity], n, popularity, clients=clients))
    for n, popularity in kinds:
        if popularity == DISTINCT or (options.quick and (n, popularity) != (64, ZIPF)):
            continue
        status.update(f"[dim]open loop, {n} adapters, {popularity}")
        could = next(m.tokens_per_second for m in measured if (m.adapters, m.popularity) == (n, popularity)) / new
        measured.append(_load(engine, asked[n, popularity], n, popularity, rate=0.7 * could))
    return measured


def _load(
    engine: Engine, asked: Sequence[Job], n: int, popularity: str, *, clients: int = 0, rate: float | None = None
) -> Load:
    before, watch = engine.store.stats(), Watch()
    if rate is None:
        served = drive.closed_loop(engine, asked, clients)
    else:
        served = drive.open_loop(engine, asked, arrivals(len(asked), rate))
    not_run, after = watch.not_run(), engine.store.stats()
    return Load(
        loop="closed" if rate is None else "open",
        adapters=n,
        popularity=popularity,
        requests=len(asked),
        rate=rate,
        tokens_per_second=served.tokens_per_second,
        first_token_ms=drive.percentiles(served.first_token),
        per_token_ms=drive.percentiles(served.between_tokens),
        hits=after.hits - before.hits,
        loads=after.loads - before.loads,
        reads=after.reads - before.reads,
        not_run=not_run,
    )


# ---- loads


def _switch(language: Language, folder: Path, count: int) -> Switch:
    """Pins 48 adapters of rank 16 in turn, in a bank for 32: every pin is a load from host memory that evicts one."""
    names = adapters.write(folder, language.model, [16] * 48)
    store = AdapterStore(sides.copied(language.model), folder, bank_slots=32)
    try:
        for name in names:
            store.pin(name).release()
        times = []
        watch = Watch()
        for number in range(count):
            with store.lease(names[number % len(names)]) as lease:
                lease.loaded.result()
                began = time.perf_counter()
                if not lease.pin():
                    raise AssertionError("an adapter in host memory has no place in a bank without pins")
                times.append(time.perf_counter() - began)
        not_run, found = watch.not_run(), drive.percentiles(times)
        return Switch(count, found["p50"], found["p99"], store.stats().read_p50_ms, not_run)
    finally:
        store.close()


def _load_result(target: Target, switch: Switch) -> Result:
    mark = _mark(target, switch.p99_ms, switch.not_run)
    return Result(target.adapters, target.peer, switch.p99_ms, None, target.value, target.at_most, mark, switch.not_run)


# ---- tables


def _table(title: str, *headers: str) -> Table:
    from rich import box

    made = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold", title_justify="left", pad_edge=False)
    for number, header in enumerate(headers):
        made.add_column(header, justify="left" if number == 0 else "right", no_wrap=True)
    return made


def _throughput_table(count: int, measured: Sequence[Throughput]) -> Table:
    made = _table(f"{count} requests at once, {count} adapters", "", "tokens/s", "(processor)", "of peftk's", "error")
    ours = measured[0]
    for side in measured:
        if side.wall is None:
            made.add_row(side.side, WRONG if side.error is not None else NOT_MEASURED, style="dim")
            continue
        processor = f"({side.processor:.1f})" if side.processor else ""
        ratio = f"{side.wall / ours.wall:.2f}" if ours.wall else ""
        made.add_row(side.side, f"{side.wall:.1f}", processor, ratio, f"{side.error:.2f}")
    return made


def _traffic_table(loads: Sequence[Load]) -> Table:
    made = _table(
        "Traffic", "loop", "adapters", "popularity", "requests/s", "tokens/s",
        *("first token p50", "p95", "p99 ms"), *("per token p50", "p95", "p99 ms"), "hits", "loads",
    )  # fmt: skip
    for load in loads:
        made.add_row(
            load.loop, str(load.adapters), load.popularity, "" if load.rate is None else f"{load.rate:.2f}",
            f"{load.tokens_per_second:.1f}", *(f"{value:,.0f}" for value in load.first_token_ms.values()),
            *(f"{value:,.0f}" for value in load.per_token_ms.values()), str(load.hits), str(load.loads),
        )  # fmt: skip
    return made


def _results_table(results: Sequence[Result]) -> Table:
    made = _table("Targets", "against", "adapters", "found", "(processor)", "target", "")
    for result in results:
        target = next(t for t in TARGETS if (t.adapters, t.peer) == (result.adapters, result.peer))
        mark = f"{result.mark} {result.not_run:.0%}" if result.mark == NOT_QUIET else result.mark
        made.add_row(
            result.peer,
            str(result.adapters),
            "–" if result.value is None else f"{result.value:.2f}",
            "" if result.processor is None else f"({result.processor:.2f})",
            str(target),
            f"[{COLOURS[result.mark]}]{mark}[/]",
        )
    return made


def _summary(outcome: Outcome) -> str:
    met = sum(result.mark == PASS for result in outcome.results)
    counts = {mark: sum(result.mark == mark for result in outcome.results) for mark in COLOURS}
    rest = "".join(f"; {counts[mark]} {mark}" for mark in (SHORT, NOT_QUIET, WRONG, NOT_MEASURED) if counts[mark])
    return (
        f"{met} of {len(outcome.results)} targets met{rest}. No verdict where a ready thread did not run for more than "
        f"{MOST:.0%} of the time. {outcome.seconds:.0f} s."
    )
