"""Tests that every layer behaves in torch's autograd graph as the same computation in plain torch does."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tests.support.every_layer import LAYERS, Entry, Made, agree, by_name, gradients
from tests.support.tiers import FULL, spread

pytestmark = pytest.mark.usefixtures("one_thread")


def case_id(value: object) -> str:
    """The id of a test's argument."""
    return str(getattr(value, "name", getattr(value, "__name__", value)))


every_layer = pytest.mark.parametrize("entry", LAYERS, ids=lambda entry: entry.name)


def change_in_place(y: Tensor) -> Tensor:
    """Changes y in place in the ways that models do."""
    y.mul_(1.5)
    y[..., :2].add_(1.0)
    y += 0.25
    return nn.functional.relu(y, inplace=True)


def run_in(mode: str, layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that runs the layer in a mode, then `change_in_place`."""

    def run(x: Tensor) -> Tensor:
        return change_in_place(layer(x))

    if mode in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        return torch.compile(run, backend=mode)
    if mode.startswith("checkpoint"):
        reentrant = mode == "checkpoint reentrant"
        return lambda x: change_in_place(checkpoint(layer, x, use_reentrant=reentrant))
    return run


def check_in_place(entry: Entry, made: Made, mode: str) -> None:
    run = run_in(mode, made.layer)
    for x in [*entry.inputs(), *entry.inputs(empty=True)]:
        for wants in (True, False):
            if mode == "checkpoint reentrant" and not wants:
                continue  # torch gives no gradients then
            x.requires_grad_(wants)
            agree(gradients(run, made, x), gradients(lambda x: change_in_place(made.plain(x)), made, x))


@pytest.mark.parametrize(
    ("entry", "frozen", "mode"),
    [
        *((entry, False, "eager") for entry in LAYERS),
        *spread(itertools.product(LAYERS, [True], ["eager"]), default=6, full=12),
        *spread(itertools.product(LAYERS, [False, True], ["checkpoint reentrant", "checkpoint"]), default=12, full=24),
    ],
    ids=case_id,
)
def test_an_output_changed_in_place_trains(entry: Entry, mode: str, frozen: bool) -> None:
    if entry.by_linear and mode == "checkpoint reentrant":
        pytest.skip("torch refuses it for nn.Linear too")
    check_in_place(entry, entry.make(frozen=frozen), mode)


@pytest.mark.parametrize(
    ("entry", "mode", "frozen"),
    [
        *spread(itertools.product(LAYERS, ["aot_eager"], [False, True]), default=1, full=10),
        pytest.param(by_name("lora plain"), "inductor", False, marks=FULL),
        pytest.param(by_name("multi trained"), "inductor", False, marks=FULL),
    ],
    ids=case_id,
)
def test_an_output_changed_in_place_trains_compiled(entry: Entry, mode: str, frozen: bool) -> None:
    check_in_place(entry, entry.make(frozen=frozen), mode)


@pytest.mark.parametrize(
    ("entry", "backend"),
    spread(itertools.product(LAYERS, ["reference", "gemm", "cpu"]), default=10, full=20),
    ids=case_id,
)
def test_an_output_changed_in_place_trains_on_each_backend(
    entry: Entry, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "gemm" and entry.name.startswith(("series", "functional adapter_block")):
        pytest.skip("gemm has no series adapters")
    made = entry.make()
    monkeypatch.setenv("PEFTK_BACKEND", backend)
    check_in_place(entry, made, "eager")


@every_layer
def test_autocast(entry: Entry) -> None:
    """Outputs and gradients are those of plain torch up to bf16's roundings, and gradients have their leaf's dtype.

    Behind a relu they may differ more: a rounding decides whether a hidden value near zero has a gradient.
    """
    made = entry.make()
    activations = {getattr(module, "activation", "identity") for module in made.module.modules()}
    has_relu = "relu" in activations or entry.name.startswith("functional")

    def within(run: Callable[[Tensor], Tensor], outputs: list[Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(run(x))
        return outputs[-1].float()

    for x in entry.inputs():
        x.requires_grad_()
        outputs: list[Tensor] = []
        ours, plain = (gradients(functools.partial(within, run, outputs), made, x) for run in (made.layer, made.plain))
        assert ours.keys() == plain.keys()
        leaves = {"x": x, **made.trained}
        for name, wanted in {**plain, "y": outputs[1].float()}.items():
            got = {**ours, "y": outputs[0].float()}[name]
            if wanted is None or got is None:
                assert all(grad is None or not grad.any() for grad in (wanted, got)), name
            else:
                assert name == "y" or got.dtype == leaves[name].dtype, name
                assert got.isfinite().all(), name
                if name == "y" or not has_relu:
                    assert (got - wanted).norm() <= 0.02 * wanted.norm() + 0.02, name


GRAD_MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize(
    ("entry", "mode"), spread(itertools.product(LAYERS, GRAD_MODES), default=20, full=30), ids=case_id
)
def test_an_output_has_memory_of_its_own(entry: Entry, mode: str) -> None:
    """Even if its values are the input's: changing it changes neither the input nor a Parameter."""
    made = entry.make()
    for x in entry.inputs():
        for wants in (True, False):
            x = x.detach().clone().requires_grad_(wants)
            with GRAD_MODES[mode]():
                y = made.layer(x)
            owned = {t.untyped_storage().data_ptr() for t in (x, *made.module.parameters(), *made.module.buffers())}
            assert y.untyped_storage().data_ptr() not in owned
            assert y.is_leaf or y.requires_grad
            before = made.layer(x)
            with torch.no_grad() if mode == "grad" else GRAD_MODES[mode]():
                y.fill_(7.0)
            assert torch.equal(made.layer(x), before)


@every_layer
def test_an_output_of_no_grad_may_be_multiplied_in_place_by_a_tensor_with_a_gradient(entry: Entry) -> None:
    """An output made under no_grad is not a view that remembers no_grad."""
    if entry.by_linear:
        pytest.skip("torch refuses it for nn.Linear too")
    made, w = entry.make(), torch.tensor(2.0, requires_grad=True)
    for x in entry.inputs():
        with torch.no_grad():
            y = made.layer(x)
        expected = y.sum()
        y.mul_(w).sum().backward()
        torch.testing.assert_close(w.grad, expected)
        w.grad = None


@every_layer
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_an_input_changed_in_place_is_noticed_where_plain_torch_notices(entry: Entry, frozen: bool) -> None:
    """If a gradient reads x, x is saved with its version."""
    made = entry.make(frozen=frozen)

    def late(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x * 1.0
        y = run(x)
        x.mul_(3.0)
        return y

    for x in entry.inputs():
        for wants in (True, False):
            x.requires_grad_(wants)
            try:
                plain = gradients(functools.partial(late, made.plain), made, x)
            except RuntimeError:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    gradients(functools.partial(late, made.layer), made, x)
            else:
                agree(gradients(functools.partial(late, made.layer), made, x), plain)


@every_layer
def test_changing_an_output_that_a_backward_reads_is_refused(entry: Entry) -> None:
    made = entry.make()
    for x in entry.inputs():
        y = made.layer(x.requires_grad_())
        loss = (y * y).sum()
        y.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# what is saved


@contextlib.contextmanager
def saved() -> Iterator[list[Tensor]]:
    """The tensors that torch saves for the backward within the `with`."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        yield found


def nbytes(made: Made, run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """Bytes that run(x) saves for the backward: in the module's own memory, and elsewhere."""
    tensors = [*made.module.parameters(), *made.module.buffers()]
    for module in made.module.modules():
        if hasattr(module, "bank"):
            tensors += [part for chunk in module.bank.pool.chunks for part in chunk]
    own = {t.untyped_storage().data_ptr() for t in tensors}
    with saved() as found:
        y = run(x)
    places = {t.untyped_storage().data_ptr(): t for t in found}
    y.sum().backward() if y.requires_grad else None
    return (
        sum(t.nbytes for at, t in places.items() if at in own),
        sum(t.nbytes for at, t in places.items() if at not in own),
    )


BASE_ALONE = [
    "frozen",
    "lora merged",
    "lora merged bias",
    "bitfit",
    "multi without ids",
    "accelerated merged",
    "accelerated disabled",
    "functional lora_linear bias alone",
]


@pytest.mark.parametrize("name", BASE_ALONE)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_layer_without_an_adapter_saves_what_linear_saves(name: str, frozen: bool) -> None:
    """W if x needs a gradient, and nothing if only a bias does: the same number of bytes."""
    entry = by_name(name)
    made = entry.make(frozen=frozen)
    width = made.plain(entry.inputs()[0]).shape[-1]
    linear = nn.Linear(entry.inputs()[0].shape[-1], width)
    linear.weight.requires_grad_(False)
    for x in entry.inputs():
        for wants in (True, False):
            x = x.detach().clone().requires_grad_(wants)
            assert nbytes(made, made.layer, x) == nbytes(Made(linear, linear, linear), linear, x)


def bytes_for_ids_and_z(entry: Entry, x: Tensor, *, z: bool) -> int:
    """What a layer with many adapters also saves: int32 ids, and if z is read, fp32 z of at most two pages of ranks."""
    many = entry.name.startswith(("multi", "accelerated_mixed"))
    return x[..., 0].numel() * (4 + (4 * 32 if z else 0)) if many else 0


def bytes_of_copies(entry: Entry, made: Made) -> int:
    """PEFT adapters that are active together are copied side by side, in fp32."""
    lora = sum(p.nbytes for name, p in made.module.named_parameters() if "lora" in name)
    return lora if entry.name == "accelerated several" else 0


@every_layer
def test_a_frozen_layer_saves_no_more_than_its_own_parameters(entry: Entry) -> None:
    """If only x needs a gradient, x itself is not saved, and neither is z if the activation is the identity."""
    made = entry.make(frozen=True)
    for x in entry.inputs():
        x.requires_grad_()
        _, ours = nbytes(made, made.layer, x)
        _, plain = nbytes(made, made.plain, x)
        extra = bytes_for_ids_and_z(entry, x, z=entry.name == "multi activations") + bytes_of_copies(entry, made)
        assert ours <= plain + extra


@every_layer
def test_a_trained_layer_saves_no_more_than_plain_torch(entry: Entry) -> None:
    made = entry.make()
    for x in entry.inputs():
        for wants in (True, False):
            x = x.detach().clone().requires_grad_(wants)
            _, ours = nbytes(made, made.layer, x)
            _, plain = nbytes(made, made.plain, x)
            extra = bytes_for_ids_and_z(entry, x, z=True) + bytes_of_copies(entry, made)
            assert ours <= plain + extra, (list(x.shape), wants)


# which Parameter the gradients reach


def owners(made: Made) -> list[tuple[nn.Module, str]]:
    """The modules that hold trainable Parameters, each with the name of one."""
    return [
        (module, name)
        for module in list(made.module.modules())
        for name, p in list(module._parameters.items())
        if p is not None and p.requires_grad
    ]


def assigned(made: Made) -> None:
    made.module.load_state_dict(made.module.state_dict(), assign=True)
    for module, name in owners(made):
        assert module._parameters[name].requires_grad


def new_values(made: Made) -> None:
    for module, name in owners(made):
        module._parameters[name].data = torch.randn_like(module._parameters[name])


def other_strides(made: Made) -> None:
    """Matrices with contiguous columns instead of rows; vectors with stride 2."""
    for module, name in owners(made):
        p = module._parameters[name]
        p.data = torch.stack([p.data, p.data], dim=-1)[..., 0] if p.dim() == 1 else p.data.t().contiguous().t()


def set_anew(made: Made) -> None:
    for module, name in owners(made):
        setattr(module, name, nn.Parameter(getattr(module, name)))


def put_in_the_dict(made: Made) -> None:
    """As FSDP and offloading do: without __setattr__, in the same memory."""
    for module, name in owners(made):
        module._parameters[name] = nn.Parameter(module._parameters[name].detach())


def swapped(made: Made) -> None:
    for module, name in owners(made):
        p = module._parameters[name]
        torch.utils.swap_tensors(p, nn.Parameter(torch.randn_like(p)))


def overwritten(made: Made) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        made.module.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


class _Twice(nn.Module):
    def forward(self, p: Tensor) -> Tensor:
        return p * 2.0


def computed(made: Made) -> None:
    for module, name in owners(made):
        parametrize.register_parametrization(module, name, _Twice())


REPLACE = [assigned, new_values, other_strides, set_anew, put_in_the_dict, swapped, overwritten, computed]


@pytest.mark.parametrize(
    ("entry", "replace"), spread(itertools.product(LAYERS, REPLACE), default=25, full=40), ids=case_id
)
def test_gradients_reach_the_parameters_that_the_module_has_now(entry: Entry, replace: Callable[[Made], None]) -> None:
    """Nothing that a layer kept from earlier calls is used instead."""
    if replace is assigned and entry.name.startswith("lora merged"):
        pytest.skip("a merged LoRALinear refuses to load")
    for x in entry.inputs():
        made = entry.make()
        with torch.no_grad():
            made.layer(x)
        gradients(made.layer, made, x)
        before = made.trained
        replace(made)
        if replace in (assigned, set_anew, put_in_the_dict):
            assert all(p is not before[name] for name, p in made.trained.items())
        agree(gradients(made.layer, made, x), gradients(made.plain, made, x))
        with torch.no_grad():
            torch.testing.assert_close(made.layer(x), made.plain(x))
