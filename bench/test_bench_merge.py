"""See peftk/tools/benchmark/merge.py."""

import common
import pytest


@pytest.mark.parametrize(("shape", "side"), common.sides("merge"))
def test_bench_merge(benchmark, shape, side):
    common.bench(benchmark, shape, side)


@pytest.mark.parametrize(("shape", "side"), common.sides("unmerge"))
def test_bench_unmerge(benchmark, shape, side):
    common.bench(benchmark, shape, side)
