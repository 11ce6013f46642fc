"""See peftk/tools/benchmark/lora_linear.py."""

import common
import pytest


@pytest.mark.parametrize(("shape", "side"), common.sides("lora_linear"))
def test_bench_lora_linear(benchmark, shape, side):
    common.bench(benchmark, shape, side)
