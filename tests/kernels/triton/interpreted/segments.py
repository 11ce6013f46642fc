"""The segments kernels in the interpreter: exactly equal to the specification."""

from __future__ import annotations

import gc
import itertools
import pathlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk.adapters import route
from peftk.launch.segments import MOST_ADAPTERS, Segments
from peftk.system import lasting, streams
from peftk.triton_kernels import segments as kernels
from tests.support.segment_cases import I32, I64, PATTERNS, WILD, check_segments, random_ids
from tests.support.tiers import spread


def check(ids: Tensor, adapters: int) -> Segments:
    return check_segments(kernels.segments(ids, adapters), ids, adapters)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    """Uses tiles of 64 rows, so that many tiles take little time. The kernels are the same."""
    monkeypatch.setattr(kernels, "TILE", 64)
    return 64


@pytest.mark.parametrize(("pattern", "M"), spread(itertools.product(PATTERNS, (1, 40)), default=5))
def test_patterns_in_one_launch(pattern: str, M: int) -> None:
    check(PATTERNS[pattern](M, 41), 41)
    check(PATTERNS[pattern](M, 41).to(I32), 41)


@pytest.mark.parametrize(("pattern", "M"), spread(itertools.product(PATTERNS, (65, 150)), default=3, full=7))
def test_patterns_in_three_launches(pattern: str, M: int, small_tiles: int) -> None:
    check(PATTERNS[pattern](M, 41), 41)
    check(PATTERNS[pattern](M, 200).to(I32), 200)


@pytest.mark.parametrize(
    ("M", "adapters"), spread(itertools.product((0, 1, 2, 15, 16, 17, 63, 64), (0, 1, 5)), default=9)
)
def test_few_rows(M: int, adapters: int) -> None:
    check(random_ids(M, adapters), adapters)


@pytest.mark.parametrize("M", [256, *(pytest.param(M, marks=pytest.mark.full) for M in (255, 257, 1023, 1024))])
def test_heights_of_one_launch(M: int) -> None:
    check(random_ids(M, 20, dtype=I64), 20)


@pytest.mark.full
def test_three_launches_from_a_tile_on() -> None:
    check(random_ids(1025, 100), 100)


@pytest.mark.parametrize(("tiles", "more"), spread(itertools.product((2, 7), (-1, 0, 1)), default=2))
def test_tiles_that_are_full_or_not(tiles: int, more: int, small_tiles: int) -> None:
    check(random_ids(64 * tiles + more, 3), 3)
    check(random_ids(64 * tiles + more, 0), 0)


def test_more_tiles_than_a_scan_takes_at_once(small_tiles: int) -> None:
    check(random_ids(64 * 17 + 5, 7), 7)


@pytest.mark.parametrize("adapters", [63, 64, *(pytest.param(n, marks=pytest.mark.full) for n in (62, 5000))])
def test_chunks_of_adapters(adapters: int, small_tiles: int) -> None:
    """Here a tile processes 64 groups at a time; group 0 is the base layer's."""
    ids = random_ids(130, adapters, adapters)
    ids[:4] = torch.tensor([adapters - 1, 0, adapters - 2, adapters])
    check(ids, adapters)
    check(ids[:40], adapters)


@pytest.mark.full
def test_many_adapters_and_tiles() -> None:
    check(random_ids(1100, 1500, dtype=I64), 1500)


def test_as_many_adapters_as_a_key_holds() -> None:
    with pytest.raises(ValueError, match=r"adapters: expected at most 1048576, got 1048577"):
        kernels.segments(random_ids(3, 5), MOST_ADAPTERS + 1)
    assert (MOST_ADAPTERS + 1) * 1024 + 1023 < 2**31


@pytest.mark.parametrize("M", [12, 100])
def test_int64_ids_do_not_wrap(M: int, small_tiles: int) -> None:
    found = check(WILD.repeat(10)[:M], 3)
    assert int(found.ends[0]) == int((found.ids == -1).sum())


@pytest.mark.parametrize("dtype", spread([I64, I32], default=1))
def test_strides(dtype: torch.dtype, small_tiles: int) -> None:
    ids = random_ids(300, 9, dtype=dtype).reshape(100, 3)
    for strided in (ids[:, 1], ids[::7, 2], ids[:1, :1].reshape(1).expand(90), ids.flatten()[1:]):
        check(strided, 9)


def test_same_bits_every_time_and_ids_unchanged(small_tiles: int) -> None:
    for M in (50, 200):
        ids = random_ids(M, 11)
        before = ids.clone()
        first, second = kernels.segments(ids, 11), kernels.segments(ids, 11)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(ids, before)


def launch_log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """A list of all later launches: kernel and grid."""
    launches: list[tuple[str, tuple[int, ...]]] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append((self.name, grid))
            return self.kernel[grid]

    for name in ("segments_kernel", "sort_kernel", "scan_kernel", "scatter_kernel"):
        monkeypatch.setattr(kernels, name, Counted(name, getattr(kernels, name)))
    return launches


def test_launches_depend_on_the_numbers_of_rows_and_adapters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = launch_log(monkeypatch)
    monkeypatch.setattr(kernels, "TILE", 64)
    for M, adapters, expected in (
        (0, 4, [("segments_kernel", (1,))]),
        (64, 1000, [("segments_kernel", (1,))]),
        (65, 63, [("sort_kernel", (2,)), ("scan_kernel", (1,)), ("scatter_kernel", (2,))]),
        (190, 64, [("sort_kernel", (3,)), ("scan_kernel", (2,)), ("scatter_kernel", (3,))]),
    ):
        for pattern in ("a row each", "random"):
            launches.clear()
            kernels.segments(PATTERNS[pattern](M, adapters) if M else torch.empty(0, dtype=I32), adapters)
            assert launches == expected


Served = tuple[nn.Module, peftk.MultiAdapter]


@pytest.fixture
def served_model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A model of two linears with adapters, on the Triton backend."""
    monkeypatch.setenv("PEFTK_BACKEND", "triton")

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16)).eval()

    base = model()
    server = peftk.MultiAdapter(base, max_adapters=4)
    for name, r in (("alice", 2), ("bob", 3)):
        trained = model()
        peftk.inject(trained, peftk.LoraConfig(r=r, target_modules="all-linear"))
        for parameter in trained.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        peftk.save_adapter(trained, tmp_path / name)
        server.load(name, tmp_path / name)
    return base, server


def new_launches(launches: list[tuple[str, tuple[int, ...]]]) -> int:
    """The number of launches since the previous call of this function."""
    count = len(launches)
    launches.clear()
    return count


def test_one_launch_serves_every_layer_of_a_route(served_model: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    model, server = served_model
    launches = launch_log(monkeypatch)
    tokens = torch.randn(3, 5, 8, requires_grad=True)
    with server.route(["alice", None, "bob"]):
        y = model(tokens)
        assert new_launches(launches) == 1
        model(tokens)
        assert new_launches(launches) == 0
        model(tokens[:, 0])  # one token per sequence
        assert new_launches(launches) == 1
    for number, name in enumerate(("alice", None, "bob")):
        with server.route([name]):
            torch.testing.assert_close(model(tokens[number : number + 1])[0], y[number])
    assert new_launches(launches) == 3
    y.sum().backward()  # from the first route, which has ended
    assert new_launches(launches) == 0


def test_a_route_reads_its_ids_when_it_is_entered(served_model: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    model, server = served_model
    x = torch.randn(3, 8, requires_grad=True)
    with server.route(["alice", None, "bob"]):
        expected = model(x)
    for dtype in (I32, I64):
        ids = server.ids(["alice", None, "bob"]).to(dtype)
        with server.route(ids):
            first = model(x)
            ids.fill_(1)
            assert torch.equal(model(x), first)
        assert torch.equal(first, expected)
        with server.route(ids):
            assert not torch.equal(model(x), first)


def test_ids_that_a_user_passes_are_sorted_in_every_call(served_model: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have been changed in place, which cannot be detected in inference mode."""
    model, server = served_model
    launches = launch_log(monkeypatch)
    layer, x, ids = model[0], torch.randn(3, 8), server.ids(["alice", None, "bob"])
    first = layer(x, ids)
    with torch.inference_mode():
        frozen = ids.clone()
    second = layer(x, frozen)
    with torch.inference_mode():
        frozen.copy_(server.ids(["bob", None, "alice"]))
    third = layer(x, frozen)
    assert new_launches(launches) == 3
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_a_route_serves_inference_and_training(served_model: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    model, server = served_model
    launches = launch_log(monkeypatch)
    x = torch.randn(3, 8)
    with server.route(["alice", None, "bob"]):
        with torch.inference_mode():
            routed, _ = route.current_forward(server._key)
            assert routed is not None
            assert not routed.rows(x).is_inference()
        model(x.requires_grad_()).sum().backward()
    assert new_launches(launches) == 1


def test_what_was_sorted_ends_with_its_route(served_model: Served) -> None:
    model, server = served_model
    x = torch.randn(3, 8, requires_grad=True)
    with server.route(["alice", None, "bob"]):
        routed, _ = route.current_forward(server._key)
        assert routed is not None
        model(x)
        held = weakref.ref(route.flat(routed.rows(x)))
        assert held() is not None
        del routed
    gc.collect()
    assert held() is None


class Graph:
    """Stands in for a capture on a GPU. It only tells whether a capture is in progress."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing = False
        monkeypatch.setattr(streams, "capturing", lambda device: self.capturing)

    def __enter__(self) -> Graph:
        self.capturing = True
        return self

    def __exit__(self, *args: object) -> None:
        self.capturing = False


def test_nothing_crosses_the_border_of_a_capture(served_model: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    model, server = served_model
    launches = launch_log(monkeypatch)
    x, graph = torch.randn(3, 8, requires_grad=True), Graph(monkeypatch)
    ids = server.ids(["alice", None, "bob"])
    with server.route(ids):
        expected = model(x)
        assert new_launches(launches) == 1
        with graph:  # entered before the capture: each layer sorts, from the tensor that replays will read
            assert torch.equal(model(x), expected)
            assert new_launches(launches) == 2
            ids.copy_(server.ids(["bob", None, "alice"]))
            other = model(x)
            assert not torch.equal(other, expected)
            assert new_launches(launches) == 2
        assert torch.equal(model(x), expected)
        assert new_launches(launches) == 0
        assert any(kept[0] is ids for kept in lasting.read_by_graphs.values() if isinstance(kept, tuple))
    with graph, server.route(ids):  # entered inside the capture: one sort, part of the graph
        assert torch.equal(model(x), other)
        assert new_launches(launches) == 1
        graph.capturing = False
        assert torch.equal(model(x), other)
        assert new_launches(launches) == 2


@pytest.mark.full
@pytest.mark.parametrize("adapters", [1, 64, 1023, 5000])
@pytest.mark.parametrize("M", [33, 129, 513, 1025, 4097])
def test_at_length(M: int, adapters: int) -> None:
    check(random_ids(M, adapters, M, I64), adapters)
