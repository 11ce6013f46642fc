"""See peftk/tools/benchmark/multi_lora_linear.py."""

import common
import pytest


@pytest.mark.parametrize(("shape", "side"), common.sides("multi_lora_linear"))
def test_bench_multi_lora_linear(benchmark, shape, side):
    common.bench(benchmark, shape, side)
