"""Tests that rows are whole sequences in the order of the batch, or refused.

A routed model gives each sequence what its adapter gives alone, or raises ValueError; it never gives anything else.
"""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftk
from peftk.adapters import route as routes
from peftk.methods.inject import lora_layers
from tests.support import small_architectures, tiers

D = 8


@pytest.fixture(autouse=True)
def _few_threads(one_thread: None) -> None:
    pass


def make_server(base: nn.Module, folder: pathlib.Path, targets: Any = "all-linear") -> tuple[Any, list[nn.Module]]:
    """A server with adapters a and b, and for each a model that has only that one."""
    server, alone = peftk.MultiAdapter(copy.deepcopy(base.eval())), []
    for seed, name in enumerate("ab"):
        model = copy.deepcopy(base)
        peftk.inject(model, peftk.LoraConfig(r=2 + seed, target_modules=targets))
        torch.manual_seed(seed)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B, std=0.5)
        peftk.save_adapter(model, folder / name)
        server.load(name, folder / name)
        alone.append(model.eval())
    return server, alone


@torch.no_grad()
def outcome(server: Any, alone: list[nn.Module], x: Tensor, dim: int = 0, names: str = "ab", **route: Any) -> str:
    """`right`, or the text of the ValueError; dim: the dimension of y with the sequences. Anything else fails."""
    each = dict(zip("ab", [model(x) for model in alone], strict=True))
    expected = torch.stack([each[name].select(dim, n) for n, name in enumerate(names)], dim)
    try:
        with server.route(list(names), **route):
            y = server.model(x)
    except ValueError as error:
        return str(error)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*each.values())
    return "right"


class Model(nn.Module):
    """A head on the result of a function of a linear and x."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call, self.fc, self.head = call, nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.fc, x))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


def last_tokens(fc: nn.Module, x: Tensor) -> Tensor:
    return fc(x[torch.arange(len(x)), torch.full((len(x),), -1)])[:, None].expand_as(x)


RIGHT: dict[str, Callable[..., Tensor]] = {
    "as it is": lambda fc, x: fc(x),
    "flattened": lambda fc, x: fc(x.reshape(-1, D)).view(x.shape),
    "heads": lambda fc, x: fc(x[:, None].expand(-1, 3, -1, -1)).mean(1),
    "pooled": lambda fc, x: fc(x.mean(1))[:, None].expand_as(x),
    "first tokens": lambda fc, x: fc(x[:, 0])[:, None].expand_as(x),
    "last tokens": last_tokens,
    "there and back": lambda fc, x: fc(x.transpose(0, 1).transpose(1, 0)),
    "einsum": lambda fc, x: fc(torch.einsum("btd,de->bte", x, torch.eye(D))),
    "twice": lambda fc, x: fc(fc(x).relu()),
    "a time at a time": lambda fc, x: torch.stack([fc(x[:, t]) for t in range(x.shape[1])], 1),
}


@pytest.mark.parametrize("call", RIGHT.values(), ids=RIGHT.keys())
def test_rows_in_order(call: Callable[..., Tensor], tmp_path: pathlib.Path) -> None:
    for first in (1, 2, 3):  # the order is checked in the first forwards
        server, alone = make_server(Model(call), tmp_path / str(first))
        for length in (first, first, 7, 2):
            assert outcome(server, alone, draw(2, length)) == "right"


def in_another_order(fc: nn.Module, x: Tensor) -> Tensor:
    order = x.reshape(-1, D)[:, 0].argsort()
    return fc(x.reshape(-1, D)[order])[order.argsort()].view(x.shape)


def flat_time_major(fc: nn.Module, x: Tensor) -> Tensor:
    return fc(x.transpose(0, 1).reshape(-1, D)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


WRONG: dict[str, Callable[..., Tensor]] = {
    "time-major": lambda fc, x: fc(x.transpose(0, 1)).transpose(0, 1),
    "time-major, contiguous": lambda fc, x: fc(x.permute(1, 0, 2).contiguous()).permute(1, 0, 2),
    "time-major, flattened": flat_time_major,
    "time-major by einsum": lambda fc, x: fc(torch.einsum("btd->tbd", x)).transpose(0, 1),
    "sorted": in_another_order,
    "reversed": lambda fc, x: fc(x.reshape(-1, D).flip(0)).flip(0).view(x.shape),
    "a sequence at a time": lambda fc, x: torch.stack([fc(sequence) for sequence in x]),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_rows_in_another_order(call: Callable[..., Tensor], tmp_path: pathlib.Path) -> None:
    """Even if the shape does not tell, as T = B."""
    for length in (2, 3, 4):
        server, alone = make_server(Model(call), tmp_path / str(length))
        for _ in range(3):
            assert outcome(server, alone, draw(2, length)).startswith("route: expected x")


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 6, 8])
def test_multiples_are_refused(rows: int, tmp_path: pathlib.Path) -> None:
    """There is no way to know which row belongs to which sequence."""
    server, _ = make_server(nn.Sequential(nn.Linear(D, D)), tmp_path)
    for shape in ((rows,), (rows, 5)):
        with server.route(["a", "b"]), pytest.raises(ValueError, match=r"route: expected x \[2, …, K\]"):
            server.model(draw(*shape))
    with server.route(["a"]), pytest.raises(ValueError, match=r"route: expected x \[1, …, K\]"):
        server.model(draw(rows + 2))


def test_empty_batches(tmp_path: pathlib.Path) -> None:
    server, _ = make_server(nn.Sequential(nn.Linear(D, D)), tmp_path)
    with server.route([]):
        for shape in ((0,), (0, 3), (0, 0)):
            assert server.model(draw(*shape)).shape == (*shape, D)
        with pytest.raises(ValueError, match=r"route: expected x \[0, …, K\]"):
            server.model(draw(2))
    with server.route(["a", None]):
        assert server.model(draw(2, 0)).shape == (2, 0, D)
    with server.route(torch.zeros(0, 4, dtype=torch.int32)):
        assert server.model(draw(0, 4)).shape == (0, 4, D)
    with server.route([], lengths=[]):
        assert server.model(draw(1, 0)).shape == (1, 0, D)


def test_a_batch_of_one_adapter_may_have_any_rows(tmp_path: pathlib.Path) -> None:
    for number, call in enumerate((*WRONG.values(), *RIGHT.values())):
        server, alone = make_server(Model(call), tmp_path / str(number))
        for batch, length in ((2, 2), (3, 4), (1, 3)):
            assert outcome(server, alone, draw(batch, length), names="a" * batch) == "right"


# ---------------------------------------------------------------------------------------------------------------------
# Time-major


def encoder(batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch_dim", [None, 1])
def test_the_batch_dimension_is_read_from_torchs_transformer(
    batch_first: bool, batch_dim: int | None, tmp_path: pathlib.Path
) -> None:
    for length in (1, 2, 5):
        server, alone = make_server(encoder(batch_first), tmp_path / str(length), ["linear1", "linear2"])
        x, dim = (draw(2, length), 0) if batch_first else (draw(length, 2), 1)
        for _ in range(2):
            assert outcome(server, alone, x, dim, batch_dim=batch_dim) == "right"


class Recurrent(nn.Module):
    """A model that is time-major [T, B, K] throughout, like torch's RNNs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rnn, self.last = nn.Linear(D, D), nn.GRU(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(self.first(x))[0])


@pytest.mark.parametrize("length", [2, 5])
def test_time_major_models_need_batch_dim(length: int, tmp_path: pathlib.Path) -> None:
    server, alone = make_server(Recurrent(), tmp_path)
    assert "batch_dim=1" in outcome(server, alone, draw(length, 2), dim=1)
    assert outcome(server, alone, draw(length, 2), dim=1, batch_dim=1) == "right"
    server, alone = make_server(Model(RIGHT["as it is"]), tmp_path / "other")
    assert outcome(server, alone, draw(2, 5), batch_dim=1).startswith("route: expected x [T, 2, …, K]")
    with pytest.raises(ValueError, match="batch_dim: expected 0, 1 or None, got 2"):
        server.route(["a", "b"], batch_dim=2)


def test_a_custom_module_with_batch_first_needs_batch_dim(tmp_path: pathlib.Path) -> None:
    class Own(Model):
        batch_first = False

    server, alone = make_server(Own(RIGHT["as it is"]), tmp_path)
    assert outcome(server, alone, draw(2, 2)).startswith("batch_dim: expected 0 or 1")
    assert outcome(server, alone, draw(2, 3), batch_dim=0) == "right"
    assert outcome(server, alone, draw(3, 2), dim=1, batch_dim=1) == "right"


# ---------------------------------------------------------------------------------------------------------------------
# One after the other in one row


@pytest.mark.parametrize("lengths", [(2, 6), (1, 1), (5, 0), (4, 4)])
def test_sequences_one_after_the_other(lengths: tuple[int, int], tmp_path: pathlib.Path) -> None:
    total, message = sum(lengths), rf"route: expected x \[1, {sum(lengths)}, K\]"
    for name in ("as it is", "flattened"):
        server, alone = make_server(Model(RIGHT[name]), tmp_path / name)
        for x in (draw(total), draw(1, total)):
            expected = torch.cat([alone[0](x)[..., : lengths[0], :], alone[1](x)[..., lengths[0] :, :]], -2)
            ways: list[dict[str, Any]] = [{"lengths": each} for each in (lengths, list(lengths), torch.tensor(lengths))]
            ways += [{"cu_seqlens": each} for each in ((0, lengths[0], total), torch.tensor([0, lengths[0], total]))]
            for way in ways:
                with torch.no_grad(), server.route(["a", "b"], **way):
                    torch.testing.assert_close(server.model(x), expected)
        for x in (draw(1, total + 1), draw(2, total)):
            with server.route(["a", "b"], lengths=lengths), pytest.raises(ValueError, match=message):
                server.model(x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lengths": [1]}, ValueError, "lengths: expected 2 numbers for 2 sequences, got 1"),
        ({"lengths": [1, -1]}, ValueError, "lengths: expected no sequence of negative length, got -1"),
        ({"lengths": [1, 0.5]}, TypeError, "lengths: expected integers"),
        ({"lengths": [1, 2], "batch_dim": 1}, ValueError, "lengths: expected None, as batch_dim is given too"),
        (
            {"lengths": [1, 2], "cu_seqlens": [0, 1, 3]},
            ValueError,
            "cu_seqlens: expected None, as lengths is given too",
        ),
        ({"cu_seqlens": [0, 2]}, ValueError, "cu_seqlens: expected 3 numbers for 2 sequences, got 2"),
        ({"cu_seqlens": [1, 2, 3]}, ValueError, "cu_seqlens: expected to begin with 0, got 1"),
        ({"cu_seqlens": [0, 3, 2]}, ValueError, "cu_seqlens: expected no sequence of negative length, got -1"),
    ],
)
def test_bad_lengths(arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: pathlib.Path) -> None:
    server, _ = make_server(nn.Sequential(nn.Linear(D, D)), tmp_path)
    with pytest.raises(error, match=message), server.route(["a", "b"], **arguments):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Experts


class Experts(nn.Module):
    """A mixture of experts between two linears; `dispatch` says how rows get to an expert and back."""

    def __init__(self, dispatch: str, count: int, top: int, listed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dispatch, self.top, self.count = dispatch, top, count
        self.first, self.router, self.last = nn.Linear(D, D), nn.Linear(D, count), nn.Linear(D, D)
        made = [nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in range(count)]
        if listed:
            self.experts = nn.ModuleList(made)
        for n, expert in enumerate(() if listed else made):
            self.add_module(f"expert{n}", expert)

    def expert(self, n: int) -> nn.Module:
        return self.experts[n] if hasattr(self, "experts") else getattr(self, f"expert{n}")

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x).reshape(-1, D)
        weights, chosen = self.router(rows).softmax(-1).topk(self.top, -1)
        out = torch.zeros_like(rows)
        if self.dispatch == "mask":
            for k in range(self.top):
                for n in range(self.count):
                    mask = chosen[:, k] == n
                    if mask.any():
                        out[mask] += weights[mask, k, None] * self.expert(n)(rows[mask])
        elif self.dispatch == "where":
            for n in range(self.count):
                k, token = torch.where((chosen == n).t())
                y = self.expert(n)(rows[None, token].reshape(-1, D))
                out.index_add_(0, token, y * weights[token, k, None])
        else:
            order = chosen.reshape(-1).argsort(stable=True)
            parts = rows[order // self.top].split(chosen.reshape(-1).bincount(minlength=self.count).tolist())
            back = torch.cat([self.expert(n)(part) for n, part in enumerate(parts)])[order.argsort()]
            out = (back.view(len(rows), self.top, D) * weights[..., None]).sum(1)
        return self.last((rows + out).view(x.shape))


EXPERTS = [
    (dispatch, count, top, listed, shape)
    for dispatch in ("mask", "where", "sorted")
    for count, top in ((2, 1), (4, 2), (2, 2))
    for listed in (True, False)
    for shape in ((2, 1), (2, 2), (2, 3), (2,))
]


@pytest.mark.parametrize(("dispatch", "count", "top", "listed", "shape"), tiers.spread(EXPERTS, default=6, full=18))
def test_experts(
    dispatch: str, count: int, top: int, listed: bool, shape: tuple[int, ...], tmp_path: pathlib.Path
) -> None:
    """Over many batches, every result is right or refused. Some experts get as many rows as there are sequences."""
    model = Experts(dispatch, count, top, listed)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in names if "expert" in name]
    for number, targets in enumerate((names, inside, [name for name in inside if name.endswith("2")])):
        server, alone = make_server(model, tmp_path / str(number), targets)
        generator = torch.Generator().manual_seed(4)
        for _ in range(10):
            found = outcome(server, alone, torch.randn(*shape, D, generator=generator))
            assert found == "right" or found.startswith("route: expected")
        for _ in range(3):
            assert outcome(server, alone, torch.randn(*shape, D, generator=generator), names="bb") == "right"


def test_layers_around_experts_may_have_adapters(tmp_path: pathlib.Path) -> None:
    for dispatch in ("mask", "where", "sorted"):
        server, alone = make_server(Experts(dispatch, 4, 2, True), tmp_path / dispatch, ["first", "last", "router"])
        for shape in ((2, 2), (2, 5), (2, 1)):
            assert outcome(server, alone, draw(*shape)) == "right"


# ---------------------------------------------------------------------------------------------------------------------
# Architectures of transformers


def architecture(name: str, folder: pathlib.Path) -> list[str] | None:
    """The outcomes of a mixed route for texts of some lengths; None if the model cannot be tried."""
    base = small_architectures.build(name)
    try:
        assert base is not None
        with torch.no_grad():
            assert len(small_architectures.output(base(**small_architectures.inputs(base, 5)))) == 2
        server, alone = make_server(base, folder)
    except Exception:  # it needs other inputs, or has linears that cannot be adapted
        return None
    found = []
    for length in (2, 5, 2):
        inputs = small_architectures.inputs(base, length)
        try:
            with torch.no_grad():
                each = [small_architectures.output(model(**inputs)) for model in alone]
        except RuntimeError:  # the text is too short for it
            continue
        try:
            with torch.no_grad(), server.route(["a", "b"]):
                y = small_architectures.output(server.model(**inputs))
        except ValueError as error:
            if not str(error).startswith("route: expected"):
                raise
            found.append("refused")
            continue
        torch.testing.assert_close(y, torch.stack([each[0][0], each[1][1]]), rtol=1e-3, atol=1e-3, msg=name)
        found.append("right")
    return found


@pytest.mark.parametrize(
    ("name", "found"), [("bert", "right"), ("gpt2", "right"), ("llama", "right"), ("xlnet", "refused")]
)
def test_common_architectures(name: str, found: str, tmp_path: pathlib.Path) -> None:
    assert architecture(name, tmp_path) == [found] * 3  # XLNet is time-major inside


@pytest.mark.long
def test_some_architectures(tmp_path: pathlib.Path) -> None:
    found = [architecture(name, tmp_path / name) for name in small_architectures.NAMES[::12]]
    assert sum(outcomes is not None for outcomes in found) >= 10


@pytest.mark.long
def test_every_architecture(tmp_path: pathlib.Path) -> None:
    found = [architecture(name, tmp_path / name) for name in small_architectures.NAMES]
    assert sum(outcomes is not None and "right" in outcomes for outcomes in found) >= 100


def test_a_linear_that_is_added_later_is_checked_too(tmp_path: pathlib.Path) -> None:
    """After some forwards row order is no longer checked, until an adapter adds a layer."""
    model = Model(lambda fc, x: fc(x))
    server, alone = make_server(model, tmp_path, ["fc"])
    make_server(model, tmp_path / "later", ["head"])
    for _ in range(2 * routes.ORDER_CHECKS):
        assert outcome(server, alone, draw(2, 3)) == "right"
    assert server._key.checks_left == 0
    server.load("later", tmp_path / "later/a")
    assert server._key.checks_left == routes.ORDER_CHECKS
