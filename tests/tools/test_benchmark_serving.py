"""`peftk bench --suite serving`: a run on a tiny model, what it finds wrong, and what is asked of a server."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json

import pytest
from click.testing import CliRunner
from rich.console import Console

pytest.importorskip("transformers", "5.24", reason="the engine is for transformers 5.24")

from peftk import cli
from peftk.tools import smollm2
from peftk.tools.benchmark.environment import environment
from peftk.tools.benchmark.serving import drive, plot, sides, suite, targets, traffic, turns, vllm_side
from peftk.tools.benchmark.suite import NOT_MEASURED, WRONG


@pytest.fixture(scope="module")
def tiny():
    return smollm2.random_llama(hidden=64, layers=2)


def run(language):
    text = io.StringIO()
    outcome = suite.run(Console(file=text, width=160), suite.Options(quick=True, language=language), environment())
    return outcome, text.getvalue()


def test_a_tiny_run(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv(vllm_side.PYTHON, raising=False)
    outcome, text = run(tiny)
    assert outcome.all_correct
    assert [(r.adapters, r.peer) for r in outcome.results] == [(t.adapters, t.peer) for t in sorted_targets()]
    measured = {(side.adapters, side.side) for side in outcome.throughput if side.wall}
    assert {(8, targets.ENGINE), (8, targets.UNMODIFIED), (8, targets.PADDED), (64, targets.ENGINE)} <= measured
    vllm_row = next(r for r in outcome.results if r.peer == targets.VLLM)
    assert vllm_row.mark == NOT_MEASURED
    assert vllm_side.PYTHON in vllm_row.note
    assert {(load.loop, load.adapters) for load in outcome.loads} == {("closed", n) for n in (1, 8, 64)} | {
        ("open", 64)
    }
    assert all(load.first_token_ms.keys() == {"p50", "p95", "p99"} for load in outcome.loads)
    assert 0 < outcome.switch.p50_ms <= outcome.switch.p99_ms
    assert "8 requests at once, 8 adapters" in text
    json.dumps(dataclasses.asdict(outcome))
    pytest.importorskip("matplotlib")
    plot.write(tmp_path / "plot.png", outcome, environment())
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def sorted_targets():
    loads = [t for t in targets.TARGETS if t.peer == targets.LOAD]
    return [t for n in (8, 64) for t in targets.TARGETS if t.adapters == n and t not in loads] + loads


def test_an_engine_that_mixes_up_adapters_is_wrong(tiny, monkeypatch):
    right = sides.asked_of

    def mixed_up(engine, jobs):
        others = [job.adapter for job in jobs]
        return right(
            engine, [job._replace(adapter=name) for job, name in zip(jobs, others[1:] + others[:1], strict=True)]
        )

    monkeypatch.setattr(sides, "asked_of", mixed_up)
    outcome, _ = run(tiny)
    assert not outcome.all_correct
    assert {r.mark for r in outcome.results if r.peer == targets.FASTEST_WITHOUT} == {WRONG}
    ours = [side for side in outcome.throughput if side.side == targets.ENGINE]
    assert all(side.wall is None and side.error > 1 for side in ours)


def test_popularities():
    names = [f"n{number}" for number in range(8)]
    asked = {p: traffic.jobs(names, 4000, popularity=p, prompt=3, new=2, vocabulary=64) for p in traffic.POPULARITIES}
    counts = {p: collections.Counter(job.adapter for job in found) for p, found in asked.items()}
    assert set(counts[traffic.DISTINCT].values()) == {500}
    assert 400 < min(counts[traffic.UNIFORM].values()) <= max(counts[traffic.UNIFORM].values()) < 600
    zipf = counts[traffic.ZIPF]
    assert zipf["n0"] / zipf["n1"] == pytest.approx(2, rel=0.15)
    assert zipf["n0"] / zipf["n3"] == pytest.approx(4, rel=0.2)
    assert traffic.tokens(asked[traffic.ZIPF]) == 8000
    assert {job.adapter for job in traffic.without_adapters(asked[traffic.UNIFORM])} == {None}
    assert all(4 <= token < 64 for job in asked[traffic.UNIFORM] for token in job.prompt)


def test_arrivals_are_a_poisson_process():
    times = traffic.arrivals(4000, 10.0)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.1, rel=0.05)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # 1/e of exponential gaps


def test_percentiles():
    assert drive.percentiles([0.001 * n for n in range(101)]) == pytest.approx({"p50": 50, "p95": 95, "p99": 99})
    assert drive.percentiles([0.5]) == {"p50": 500, "p95": 500, "p99": 500}
    assert drive.percentiles([]) == {}


def test_sides_take_turns():
    order = []
    found = turns.rates(
        {name: turns.Timed(lambda name=name: order.append(name)) for name in "abc"}, tokens=10, rounds=3
    )
    assert "".join(order) == "abcbcacab"
    assert all(len(rates) == 3 for rates in found.values())
    assert turns.median([turns.Rate(1, 4), turns.Rate(3, 5), turns.Rate(2, 9)]) == (2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick"], "--quick: only with --suite"),
        (["--suite", "cpu", "--quick"], "--quick: not with --suite cpu"),
        (["--suite", "serving", "--op", "merge"], "--op: not with --suite serving"),
        (["--suite", "serving", "--csv", "x.csv"], "--csv: not with --suite serving"),
        (["--suite", "serving", "--no-compile"], "--no-compile: not with --suite serving"),
    ],
)
def test_options_that_do_not_fit(options, message):
    result = CliRunner().invoke(cli.main, ["bench", *options])
    assert result.exit_code == 2
    assert message in result.output
