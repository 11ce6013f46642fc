"""A call as the GPU's tables see it: what the launcher would make of its tensors."""

from __future__ import annotations

import torch

from peftk.backends import gpu_shape
from tests.support.calls import call


def test_a_backward_has_its_sizes_swapped() -> None:
    shape = gpu_shape.of(call("lora_linear_backward", M=5, K=64, N=32, rank=8, dropout=True))
    assert (shape.M, shape.N, shape.K, shape.backward, shape.own_sums) == (5, 64, 32, True, True)
    shape = gpu_shape.of(call("lora_linear", M=5, K=64, N=32, rank=8, dropout=True))
    assert (shape.M, shape.N, shape.K, shape.backward, shape.own_sums) == (5, 32, 64, False, False)


def test_loads_of_16_bytes_need_aligned_rows() -> None:
    """Of x and W in a forward: K. In a backward also of dY: N."""
    assert gpu_shape.of(call(K=64, N=1000)).wide
    assert not gpu_shape.of(call("lora_linear_backward", K=64, N=1000)).wide
    assert not gpu_shape.of(call(K=100, N=64)).wide
    assert not gpu_shape.of(call(K=64, N=64, aligned=False)).wide


def test_every_slice_has_pages_of_its_own() -> None:
    assert gpu_shape.of(call("multi_lora_linear", rank=17, slices=3)).z_pages == 6
    assert gpu_shape.of(call(rank=0)).z_pages == 0


def test_a_series_adapter_is_the_identity() -> None:
    assert gpu_shape.of(call("adapter_block", dtype=torch.bfloat16)).identity
