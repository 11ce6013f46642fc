"""See peftk/tools/benchmark/train.py."""

import common
import pytest


@pytest.mark.parametrize(("shape", "side"), common.sides("train"))
def test_bench_train(benchmark, shape, side):
    common.bench(benchmark, shape, side)
