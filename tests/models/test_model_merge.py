"""Tests of merging, switching and unmerging a whole model: all layers or none, bit for bit, even if interrupted."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import peftk
from peftk import functional
from peftk.backends import cpu
from peftk.checkpoints.peft import LoadedAdapter
from peftk.methods.inject import lora_layers
from peftk.nn import LoRALinear
from peftk.ops import merge
from peftk.system import interrupts
from tests.support.merge_cases import DTYPES, bits
from tests.support.tiers import spread

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

SIZES = ((24, 40), (40, 33), (33, 24))


def model_of(dtype: torch.dtype = torch.float32, sizes: tuple[tuple[int, int], ...] = SIZES, r: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(K, N, dtype=dtype) for K, N in sizes))
    peftk.inject(model, peftk.LoraConfig(r=r, lora_alpha=2 * r))
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(std=0.1)
    return model


def adapters_of(model: nn.Module, seed: int, r: int = 3) -> dict[str, LoadedAdapter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoadedAdapter(
            torch.randn(r, layer.in_features, generator=generator),
            torch.randn(layer.out_features, r, generator=generator) / 8,
            float(r),
            False,
        )
        for name, layer in lora_layers(model)
    }


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.weight.detach().clone() for _, layer in lora_layers(model)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True))


def layers_of(model: nn.Module) -> list[LoRALinear]:
    return [layer for _, layer in lora_layers(model)]


# ---- merged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_inside_and_the_same_bits_outside(dtype: torch.dtype) -> None:
    model = model_of(dtype)
    before, x = weights(model), torch.randn(5, 24, dtype=dtype)
    y = model(x)
    with peftk.merged(model) as inside:
        assert inside is model
        assert all(layer.merged for layer in layers_of(model))
        torch.testing.assert_close(model(x), y, rtol=0.05, atol=0.05)
        merged = weights(model)
        with peftk.merged(model):  # nests
            assert same(weights(model), merged)
        assert same(weights(model), merged)
    assert same(weights(model), before)
    assert not any(layer.merged for layer in layers_of(model))


def test_merged_ends_at_an_exception_and_leaves_earlier_merges() -> None:
    model = model_of()
    before = weights(model)
    first, second, third = layers_of(model)
    first.merge()
    kept = first.weight.clone()
    with pytest.raises(KeyError, match="inside"), peftk.merged(model):  # noqa: PT012
        second.unmerge()  # by other code
        raise KeyError("inside")
    assert (first.merged, second.merged, third.merged) == (True, False, False)
    assert torch.equal(first.weight, kept)
    first.unmerge()
    assert same(weights(model), before)


def test_merged_refuses_what_cannot_be_merged_or_has_changed() -> None:
    model = model_of()
    before = weights(model)
    last = layers_of(model)[-1]
    with torch.no_grad():
        B = last.lora_B.clone()
        last.lora_B[0, 0] = float("inf")
        with pytest.raises(ValueError, match=r"^2: weight: expected W"), peftk.merged(model):
            pytest.fail("it was merged")
        assert same(weights(model), before)
        last.lora_B.copy_(B)
        with pytest.raises(ValueError, match=r"^2: weight: expected the bits"), peftk.merged(model):  # noqa: PT012
            kept = last.weight[0, 0].clone()
            last.weight[0, 0] += 1
        assert all(layer.merged for layer in layers_of(model))
        last.weight[0, 0] = kept
    peftk.unmerge_adapter(model)
    assert same(weights(model), before)


# ---- switch_adapter -------------------------------------------------------------------------------------------------


def test_switched_to_other_adapters_of_any_rank() -> None:
    """W equals the base with the new adapters merged, and the layers hold these."""
    model, x = model_of(), torch.randn(4, 24)
    before = weights(model)
    parameters = [layer.lora_A for layer in layers_of(model)]
    for seed, r in ((1, 3), (2, 5), (3, 1)):
        adapters = adapters_of(model, seed, r)
        peftk.switch_adapter(model, adapters)
        for W, (name, layer) in zip(before, lora_layers(model), strict=True):
            expected, new = W.clone(), adapters[name]
            functional.merge_(expected, new.lora_A, new.lora_B, new.scaling)
            assert torch.equal(bits(layer.weight.detach()), bits(expected))
            assert (layer.r, layer.scaling, layer.merged) == (r, 1.0, True)
            assert torch.equal(layer.lora_A, new.lora_A)
            assert layer.lora_A is not new.lora_A
        y = model(x)
        with torch.no_grad():
            peftk.unmerge_adapter(model)
        assert same(weights(model), before)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
        assert [layer.lora_A for layer in layers_of(model)] == parameters or seed > 3
    model(x).sum().backward()
    assert all(layer.lora_A.grad.shape == layer.lora_A.shape for layer in layers_of(model))


def test_switched_from_and_to_checkpoints(tmp_path: Path) -> None:
    model = model_of(torch.bfloat16)
    before = weights(model)
    peftk.save_adapter(model, tmp_path / "one")
    peftk.switch_adapter(model, adapters_of(model, 1))
    merged = weights(model)
    peftk.switch_adapter(model, tmp_path / "one")
    assert not same(weights(model), merged)
    mixed = peftk.combine_checkpoints([tmp_path / "one", adapters_of(model, 1)], [0.5, -0.25], "cat")
    peftk.switch_adapter(model, mixed)
    assert layers_of(model)[0].r == 6
    peftk.unmerge_adapter(model)
    assert same(weights(model), before)


def test_a_switch_that_is_refused_changes_nothing() -> None:
    model = model_of()
    before = weights(model)
    layers_of(model)[0].merge()  # the others stay unmerged
    merged = weights(model)
    good = adapters_of(model, 1)
    name = list(good)[-1]
    nan = good[name]._replace(lora_B=good[name].lora_B * float("nan"))
    biased = good[name]._replace(lora_bias=torch.ones(24))
    narrow = good[name]._replace(lora_A=good[name].lora_A[:, :-1])
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for wrong, error, message in (
        ({**good, name: nan}, ValueError, f"^{name}: weight: expected W"),
        ({**good, name: narrow}, ValueError, f"^{name}: lora_A: expected"),
        ({**good, name: biased}, ValueError, f"^{name}: lora_bias: expected None, as the layer has none, got a bias"),
        ({**good, name: good[name][:2]}, TypeError, "adapters: expected a LoadedAdapter"),
        ({**good, "other": good[name]}, ValueError, "unknown: .'other'"),
        ({name: good[name]}, ValueError, "missing: .'0', '1'"),
    ):
        with pytest.raises(error, match=message):
            peftk.switch_adapter(model, wrong)  # type: ignore[arg-type]
        assert same(weights(model), merged)
        assert [layer.merged for layer in layers_of(model)] == [True, False, False]
        assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="model: expected LoRALinear layers"):
        peftk.switch_adapter(nn.Linear(2, 2), good)
    peftk.unmerge_adapter(model)
    assert same(weights(model), before)


# ---- lora_bias ------------------------------------------------------------------------------------------------------


def biased(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, dtype=dtype), nn.Tanh(), Conv1D(33, 40).to(dtype), nn.Linear(33, 24))
    model[3].to(dtype)
    config = {"r": 3, "target_modules": ["0", "2"], "lora_bias": True, **options}
    peftk.inject(model, peftk.LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


EXPORTS: dict[str, dict[str, object]] = {
    "lora_bias": {},
    "no lora_bias": {"lora_bias": False},
    "biases train": {"bias": "all"},
    "biases of the layers train": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["3"]},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", EXPORTS.values(), ids=EXPORTS)
def test_a_merged_state_dict_is_that_of_a_plain_model(options: dict[str, object], dtype: torch.dtype) -> None:
    plain = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), Conv1D(33, 40), nn.Linear(33, 24)).to(dtype)
    model, x = biased(dtype, **options), torch.randn(5, 24, dtype=dtype)
    before, y = {name: value.clone() for name, value in model.state_dict().items()}, model(x)
    peftk.merge_adapter(model)
    state = model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert torch.equal(model(x), model(x))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for actual in (plain(x), model(x)):
        torch.testing.assert_close(actual, y, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_bias" in name:
                parameter.add_(1)  # unmerging must not depend on it
        peftk.unmerge_adapter(model)
    for name, value in model.state_dict().items():
        assert "lora_bias" in name or torch.equal(bits(value[None]), bits(before[name][None])), name


def test_a_lora_bias_needs_a_bias() -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24, bias=False))
    peftk.inject(model, peftk.LoraConfig(r=3, target_modules=["0", "1"], lora_bias=True))
    before = weights(model)
    for act in (peftk.merge_adapter, lambda model: peftk.switch_adapter(model, with_biases(model))):
        with pytest.raises(ValueError, match=r"^1: lora_bias: expected a linear with a bias.*got one without"):
            act(model)
        assert same(weights(model), before)
        assert not any(layer.merged for layer in layers_of(model))
    with pytest.raises(ValueError, match=r"^lora_bias: expected a linear with a bias"):
        model[1].merge()


def with_biases(model: nn.Module) -> dict[str, LoadedAdapter]:
    return {
        name: adapter._replace(lora_bias=torch.linspace(-1, 1, adapter.lora_B.shape[0]))
        for name, adapter in adapters_of(model, 1).items()
    }


def test_switched_with_lora_bias() -> None:
    model, x = biased(), torch.randn(5, 24)
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    for _ in range(2):
        peftk.switch_adapter(model, with_biases(model))
        y = model(x)
        peftk.unmerge_adapter(model)
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
        assert torch.equal(model[0].lora_bias, torch.linspace(-1, 1, 40))
        peftk.merge_adapter(model)
    with pytest.raises(ValueError, match=r"^0: lora_bias: expected a bias, got None"):
        peftk.switch_adapter(model, adapters_of(model, 1))
    peftk.unmerge_adapter(model)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_bias_that_is_not_finite_or_was_changed() -> None:
    model = biased()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model[2].lora_bias[0] = float("inf")
        with pytest.raises(ValueError, match=r"^2: bias: expected bias .* to be finite"):
            peftk.merge_adapter(model)
        assert not model[0].merged
        model[2].lora_bias.copy_(before["2.lora_bias"])
        peftk.merge_adapter(model)
        held = model[2].bias.clone()
        model[2].bias[0] += 1
        for unmerge in (peftk.unmerge_adapter, lambda model: peftk.switch_adapter(model, with_biases(model))):
            with pytest.raises(ValueError, match=r"^2: bias: expected the bits that the merge left"):
                unmerge(model)
            assert all(layer.merged for layer in layers_of(model))
        model[2].bias.copy_(held)
    peftk.unmerge_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- another rank under an optimizer --------------------------------------------------------------------------------


def adamw(parameters: list[nn.Parameter]) -> object:
    return torch.optim.AdamW(parameters)


def in_groups(parameters: list[nn.Parameter]) -> object:
    return torch.optim.SGD([{"params": [one], "lr": 0.1} for one in parameters], momentum=0.9)


def scheduled(parameters: list[nn.Parameter]) -> object:
    return torch.optim.lr_scheduler.StepLR(torch.optim.Adam(parameters, foreach=True), 3)


@pytest.mark.parametrize("make", [adamw, in_groups, scheduled])
def test_another_rank_under_an_optimizer_is_refused(make: Callable[[list[nn.Parameter]], object]) -> None:
    model, x = model_of(), torch.randn(4, 24)
    held = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    optimizer = getattr(held, "optimizer", held)
    model(x).sum().backward()
    optimizer.step()
    before = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    adapters = adapters_of(model, 1)
    adapters["1"] = adapters_of(model, 1, 5)["1"]  # one such layer is enough
    with pytest.raises(ValueError, match=r"^1: r: expected 3 as before, as \w+ holds .*got 5; delete the optimizer"):
        peftk.switch_adapter(model, adapters)
    for parameter, value, grad in before:
        assert torch.equal(parameter, value)
        assert parameter.grad is grad
    assert not any(layer.merged for layer in layers_of(model))

    peftk.switch_adapter(model, adapters_of(model, 1))  # with the same rank the optimizer goes on
    peftk.unmerge_adapter(model)
    model(x).sum().backward()
    optimizer.step()

    del held, optimizer
    peftk.switch_adapter(model, adapters)
    peftk.unmerge_adapter(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(x).sum().backward()
    optimizer.step()


def test_an_optimizer_of_other_parameters_is_no_obstacle() -> None:
    model = model_of()
    others = torch.optim.AdamW([*model_of().parameters(), model[0].lora_A])
    peftk.switch_adapter(model, {**adapters_of(model, 1, 5), "0": adapters_of(model, 1)["0"]})
    assert others.param_groups


# ---- what no merge can change ---------------------------------------------------------------------------------------


def test_a_weight_without_memory() -> None:
    model = model_of().to("meta")
    with pytest.raises(TypeError, match=r"^0: weight: expected a dense tensor, got a meta tensor, which has no values"):
        peftk.merge_adapter(model)
    with pytest.raises(TypeError, match=r"^weight: expected a dense tensor, got a meta tensor"):
        model[1].merge()
    model = model_of()
    peftk.merge_adapter(model)
    model.to("meta")
    with pytest.raises(TypeError, match=r"^0: weight: expected a dense tensor, got a meta tensor"):
        peftk.unmerge_adapter(model)
    model = model_of()
    model[1].weight.untyped_storage().resize_(0)  # as FSDP does
    with pytest.raises(TypeError, match=r"^1: weight: expected a dense tensor, got .*memory has 0 of \d+ bytes"):
        peftk.merge_adapter(model)


def test_a_weight_that_is_computed() -> None:
    """torch would recompute it without the adapter."""

    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    for change in (
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Half()),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ):
        model = model_of()
        change(model[1])
        for act in (peftk.merge_adapter, lambda model: peftk.switch_adapter(model, adapters_of(model, 1))):
            with pytest.raises(ValueError, match=r"^1: weight: expected a Parameter, got one that is computed"):
                act(model)
        for untie in (False, True):
            with pytest.raises(ValueError, match=r"^weight: expected a Parameter, got one that is computed"):
                model[1].merge(untie=untie)
        assert not any(layer.merged for layer in layers_of(model))
    model = model_of()
    nn.utils.parametrize.register_parametrization(model[1], "lora_A", Half())
    with pytest.raises(ValueError, match=r"^1: lora_A: expected a Parameter, got one that is computed"):
        peftk.switch_adapter(model, adapters_of(model, 1))
    peftk.merge_adapter(model)


def test_merged_in_inference_mode_and_trained_after() -> None:
    model, x = model_of(), torch.randn(4, 24)
    before = weights(model)
    with torch.inference_mode():
        peftk.merge_adapter(model, untie=True)
        model[0].unmerge()
        model[0].merge(untie=True)
        peftk.switch_adapter(model, adapters_of(model, 1))
        y = model(x)
    model(x.requires_grad_()).sum().backward()
    with torch.inference_mode():
        peftk.unmerge_adapter(model)
    assert same(weights(model), before)
    model(x).sum().backward()
    torch.testing.assert_close(model(x), y.clone(), rtol=1e-4, atol=1e-4)
    assert all(layer.lora_A.grad is not None for layer in layers_of(model))


def test_a_merged_model_that_changed_its_dtype() -> None:
    model = model_of()
    peftk.merge_adapter(model)
    model.half()
    for unmerge in (peftk.unmerge_adapter, lambda model: peftk.switch_adapter(model, adapters_of(model, 1))):
        with pytest.raises(
            ValueError, match=r"^0: weight: expected dtype torch.float32 as in the merge, got torch.float16"
        ):
            unmerge(model)
    assert all(layer.merged for layer in layers_of(model))


# ---- interrupted ----------------------------------------------------------------------------------------------------

Action = Callable[[nn.Module], None]
ACTIONS: dict[str, Action] = {
    "merge": peftk.merge_adapter,
    "unmerge": peftk.unmerge_adapter,
    "switch": lambda model: peftk.switch_adapter(model, adapters_of(model, 1, 2)),
}
# where the interrupt comes: in a call of the backend, before or after its work, or when its result is checked or packed
PLACES = [(cpu, name) for name in ("merge_", "unmerge_", "remerge_", "checksum")] + [(merge, "_compact_receipt")]


def prepared(action: str) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A model, its base weights, and its weights before the action."""
    model = model_of()
    base = weights(model)
    if action != "merge":
        peftk.merge_adapter(model)
    return model, base, weights(model)


def usable(model: nn.Module, base: list[Tensor]) -> None:
    """Checks that the layers' state agrees with their weights."""
    model(torch.ones(1, 24))
    peftk.unmerge_adapter(model)
    assert same(weights(model), base)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failure_in_any_call_leaves_all_layers(
    monkeypatch: pytest.MonkeyPatch, place: tuple[object, str], action: str, error: type[BaseException]
) -> None:
    where, name = place
    original = getattr(where, name)
    for at in range(1, len(SIZES) + 1):
        model, base, before = prepared(action)
        calls = 0

        def failing(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:  # noqa: B023
                raise error
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, failing)
            if calls_of(action, name):
                with pytest.raises(error):
                    ACTIONS[action](model)
                assert same(weights(model), before)
            else:
                ACTIONS[action](model)
        usable(model, base)


def calls_of(action: str, name: str) -> bool:
    """Whether the action calls the function."""
    return (
        name
        in {
            "merge": ("merge_", "_compact_receipt"),
            "unmerge": ("unmerge_", "checksum"),
            "switch": ("remerge_", "checksum", "_compact_receipt"),
        }[action]
    )


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
@pytest.mark.parametrize("action", ACTIONS)
def test_ctrl_c_in_any_call(monkeypatch: pytest.MonkeyPatch, place: tuple[object, str], action: str) -> None:
    """A real signal after the call's work, before its result is used: it is deferred, and then nothing has changed."""
    where, name = place
    original = getattr(where, name)
    if not calls_of(action, name):
        return
    for at in range(1, len(SIZES) + 1):
        model, base, before = prepared(action)
        calls = 0

        def interrupted(*args: object) -> object:
            nonlocal calls
            result = original(*args)
            calls += 1
            if calls == at:  # noqa: B023
                signal.raise_signal(signal.SIGINT)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                ACTIONS[action](model)
        assert name == "checksum" or calls <= 2 * at  # no further layer; undoing switches counts too
        assert same(weights(model), before)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        usable(model, base)


@pytest.fixture
def alarms() -> Iterator[None]:
    def raises(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, raises)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("rounds", [150, pytest.param(5000, marks=pytest.mark.full)])
def test_signals_at_random_moments(alarms: None, rounds: int) -> None:
    """Wherever the alarm goes off, a layer is merged and has its receipt, or neither."""
    rng = random.Random(0)
    model = model_of(torch.bfloat16, ((64, 200), (200, 64), (64, 300)))
    base = weights(model)
    raised = 0
    adapters = [adapters_of(model, seed, 2 + seed) for seed in range(3)]
    for turn in range(rounds):
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-3))
            if turn % 3 == 0:
                peftk.switch_adapter(model, adapters[turn // 3 % 3])
            elif turn % 3 == 1:
                peftk.merge_adapter(model)
                layers_of(model)[1].unmerge()
                layers_of(model)[1].merge()
            else:
                with peftk.merged(model):
                    pass
                peftk.unmerge_adapter(model)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except TimeoutError:
            raised += 1
        if turn % 5 == 0:
            peftk.unmerge_adapter(model)
            assert same(weights(model), base), turn
    assert raised > rounds // 10
    peftk.unmerge_adapter(model)
    assert same(weights(model), base)


def test_signals_are_deferred_by_the_outermost_only() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():  # noqa: PT012
        with interrupts.deferred() as inner:
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            inner.deliver()
        inner.deliver()  # nothing is left to deliver
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_merge_as_well() -> None:
    """Only Python's main thread may set signal handlers."""
    model = model_of()
    base = weights(model)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with peftk.merged(model):
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors
    assert same(weights(model), base)


# ---- for ever -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", spread(DTYPES, default=1), ids=str)
@pytest.mark.parametrize(
    "sizes",
    [((24, 40), (40, 33)), pytest.param(((768, 768), (768, 3072)), marks=pytest.mark.full)],
    ids=["small", "base"],
)
def test_1000_cycles_leave_every_bit(dtype: torch.dtype, sizes: tuple[tuple[int, int], ...]) -> None:
    """Merges, switches from adapter to adapter and unmerges: 1,000 of each, with a different adapter every time."""
    model = model_of(dtype, sizes)
    base = weights(model)
    adapters = [adapters_of(model, seed, 1 + seed) for seed in range(4)]
    with torch.no_grad():
        for cycle in range(1000):
            with peftk.merged(model):
                assert cycle % 100 or not same(weights(model), base)
                peftk.switch_adapter(model, adapters[cycle % 4])
            assert cycle % 50 or same(weights(model), base)
    assert same(weights(model), base)
