"""Segments on a GPU: equal to the specification, and sorted again in every replay of a captured graph."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
import peftk
from peftk.backends import registry
from peftk.backends.call import BackendError
from peftk.backends.contract import require
from peftk.launch.segments import Segments
from tests.support.segment_cases import check_segments, random_ids
from tests.support.served_model import two_adapters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


Sort = Callable[[torch.Tensor, int], Segments]


@pytest.fixture(params=["triton", "cuda"])
def sort(request: pytest.FixtureRequest) -> Sort:
    try:
        return require(registry.backend(request.param).sort).segments
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("adapters", [0, 1, 64, 5000])
@pytest.mark.parametrize("M", [0, 1, 63, 64, 65, 256, 257, 1024, 1025, 2048, 4097, 20000, 131072])
def test_equal_to_the_specification(M: int, adapters: int, sort: Sort) -> None:
    for dtype in (torch.int32, torch.int64):
        ids = random_ids(M, adapters, M).to(dtype)
        check_segments(sort(ids.cuda(), adapters), ids, adapters)


@pytest.mark.parametrize("M", [40, 3000])
def test_a_graph_sorts_anew_in_every_replay(M: int, sort: Sort) -> None:
    ids = random_ids(M, 40, 0).cuda()
    sort(ids, 40)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sort(ids, 40)
    for seed in range(1, 4):
        ids.copy_(random_ids(M, 40, seed))
        graph.replay()
        check_segments(found, ids.cpu(), 40)


def served_model(tmp_path: pathlib.Path) -> tuple[torch.nn.Module, peftk.MultiAdapter]:
    model, server = two_adapters(tmp_path)
    return model.cuda(), server


@pytest.mark.parametrize("inside", [True, False], ids=["entered inside", "entered before"])
@torch.inference_mode()
def test_a_graph_follows_the_ids_of_its_route(tmp_path: pathlib.Path, inside: bool) -> None:
    model, server = served_model(tmp_path)
    x, ids = torch.randn(3, 16, device="cuda"), server.ids(["alice", None, "bob"]).cuda()
    with server.route(ids):
        model(x)  # compiles, and caches what a capture must not use
        graph = torch.cuda.CUDAGraph()
        if not inside:
            with torch.cuda.graph(graph):
                y = model(x)
    if inside:
        with torch.cuda.graph(graph), server.route(ids):
            y = model(x)
    for names in (["bob", "bob", None], [None, "alice", "alice"]):
        ids.copy_(server.ids(names))
        graph.replay()
        with server.route(names):
            torch.testing.assert_close(y, model(x))


@torch.inference_mode()
def test_names_are_constants_of_a_graph(tmp_path: pathlib.Path) -> None:
    model, server = served_model(tmp_path)
    x = torch.randn(3, 16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with server.route(["alice", None, "bob"]):
        expected = model(x)
        with torch.cuda.graph(graph):
            y = model(x)
    for _ in range(100):
        torch.full((3,), 1, dtype=torch.int32, device="cuda")  # would reuse the memory of ids that have been freed
    graph.replay()
    torch.testing.assert_close(y, expected)
