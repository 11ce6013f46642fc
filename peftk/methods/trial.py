"""A model's forward on fake tensors, which have no memory, to see which linears it calls and whose weights it reads.

It runs on a copy of the modules whose tensors are fake, in eval mode, without gradients and without hooks: the model,
its buffers and the generators of random numbers stay as they are. What can't run so (branches that depend on values,
most of all) is no error: what was seen until then counts, and the rest shows when the model runs
(`peftk.nn.watched`).
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import logging
import random
import sys
import time
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftk.methods.reads import Reads
from peftk.methods.sample_inputs import is_transformers, sample_inputs
from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.replace import is_linear

_KEY = "_peftk_look"
SECONDS = 10.0  # of this thread's time, after which a run is given up
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
_CALLS = ("forward", "_compiled_call_impl")  # of one module alone: compiled ones, and those with hooks of accelerate

_Inputs = tuple[Sequence[Any], Mapping[str, Any]]


class Seen(NamedTuple):
    """What runs of a model have shown, by names of its linears: which were called, and which class reads which."""

    called: frozenset[str]
    read: dict[str, str]


_NOTHING = Seen(frozenset(), {})


@dataclasses.dataclass
class _Look:
    """A run of a model that is made when its outcome is asked for."""

    model: nn.Module | None
    example_inputs: Any
    outcome: Seen | None = None

    def seen(self) -> Seen:
        if self.outcome is None:
            assert self.model is not None
            self.outcome = look(self.model, self.example_inputs)
            self.model = self.example_inputs = None
        return self.outcome


@contextlib.contextmanager
def looking(model: nn.Module, example_inputs: Any = None) -> Iterator[None]:
    """Within, `seen(model)` runs the model, once and only if asked. If all goes well the model keeps the outcome.

    Raises TypeError where example_inputs are not what the model's forward takes.
    """
    before = model.__dict__.get(_KEY)
    if example_inputs is not None:
        arguments(model, example_inputs)
    elif before is not None:
        yield
        return
    now = model.__dict__[_KEY] = _Look(model, example_inputs)
    done = False
    try:
        yield
        done = True
    finally:
        kept = now if done and now.outcome is not None else before
        if kept is None:
            del model.__dict__[_KEY]
        else:
            model.__dict__[_KEY] = kept


def seen(model: nn.Module) -> Seen:
    """What is known of the model, which runs for it only within `looking`."""
    found: _Look | None = model.__dict__.get(_KEY)
    return _NOTHING if found is None else found.seen()


def reader(model: nn.Module, name: str, linear: nn.Module) -> str | None:
    """The class that reads the weight of a linear which is never called: an adapter there would do nothing."""
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention"  # known without a run
    name, found = _plain(name), seen(model)
    return None if name in found.called else found.read.get(name)


def partly_read(model: nn.Module, name: str) -> str | None:
    """The class that reads the weight of this linear, called or not."""
    return seen(model).read.get(_plain(name))


def look(model: nn.Module, example_inputs: Any = None, *, layers: Collection[nn.Module] | None = None) -> Seen:
    """Runs the model with example_inputs; without them, the models of transformers in it, with inputs made for them.

    layers: what is looked at, None for all linears.
    """
    linears = [module for module in model.modules() if (is_linear(module) if layers is None else module in layers)]
    called: set[nn.Module] = set()
    read: dict[nn.Module, str] = {}
    if example_inputs is not None:
        _run(model, linears, [arguments(model, example_inputs)], called, read)
    waiting = [model] if example_inputs is None else []
    while waiting:
        module = waiting.pop()
        inside = set(module.modules())
        within = [linear for linear in linears if linear in inside]
        if within and not (is_transformers(module) and _run(module, within, _sampled(module), called, read)):
            waiting += module.children()
    names = {_plain(name): module for name, module in model.named_modules(remove_duplicate=False)}
    return Seen(
        frozenset(name for name, module in names.items() if module in called),
        {name: read[module] for name, module in names.items() if module in read},
    )


def _plain(name: str) -> str:
    """Without what torch.compile puts between a compiled module and its name."""
    return name.replace("_orig_mod.", "")


def arguments(model: nn.Module, example_inputs: Any) -> _Inputs:
    """Named ones of a mapping, several of a tuple or list, else one."""
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = example_inputs if isinstance(example_inputs, (tuple, list)) else [example_inputs]
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        kind = type(model).__name__
        raise TypeError(f"example_inputs: expected what {kind}.forward takes, got something else ({error})") from None
    return args, kwargs


def _sampled(model: nn.Module) -> Iterator[_Inputs]:
    return (((), inputs) for inputs in sample_inputs(model))


class _OutOfTimeError(Exception):
    pass


class _Trial(Reads):
    """Guesses values where a model asks for them, and ends a run that takes too long."""

    def __init__(self, model: nn.Module, layers: Collection[nn.Module], deadline: float) -> None:
        super().__init__(model, layers)
        self.deadline = deadline

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

        if time.thread_time() > self.deadline:
            raise _OutOfTimeError
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return _guess(func, *args)


def _guess(func: Any, x: Tensor, *args: Any) -> Any:
    """One for a number, no for a question, and all elements where those are wanted that are not zero."""
    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default:
        return x.dtype != torch.bool and (1.0 if x.is_floating_point() else 1)
    if func is aten.nonzero.default:
        return _all_of(x)
    if func is aten.index.Tensor:
        indices: list[Tensor | None] = []
        for index in args[0]:
            masks = index is not None and index.dtype in (torch.bool, torch.uint8)
            indices += _all_of(index).unbind(1) if masks else [index]
        return aten.index.Tensor(x, indices)
    raise NotImplementedError(f"{func} on tensors without values")


def _all_of(x: Tensor) -> Tensor:
    return x.new_empty((x.numel(), x.dim()), dtype=torch.int64)


def _run(
    model: nn.Module,
    linears: Sequence[nn.Module],
    inputs: Iterable[_Inputs],
    called: set[nn.Module],
    read: dict[nn.Module, str],
) -> bool:
    """Whether the model took one of these inputs all the way. Adds to `called` and `read` what was seen."""
    deadline, inputs = time.thread_time() + SECONDS, list(inputs)
    try:
        with _nothing_left_behind(model):
            mode = _fake_mode(model)
            # some operations on fake tensors are for 16 bit alone
            for fake in (mode.from_tensor, lambda tensor: _in_16_bit(mode.from_tensor(tensor))):
                shadow, originals = _shadow(model, linears, fake)
                trial = _Trial(shadow, originals, deadline)
                try:
                    if any(_goes_through(shadow, one, mode, trial) for one in inputs):
                        return True
                finally:
                    called.update(originals[layer] for layer in trial.called)
                    read.update((originals[layer], by) for layer, by in trial.read.items())
    except Exception:  # a model's own code, of which anything may come
        pass
    return False


def _in_16_bit(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.to(torch.bfloat16)
    return nn.Parameter(half, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else half


def _goes_through(shadow: nn.Module, inputs: _Inputs, mode: Any, trial: _Trial) -> bool:
    kinds = collections.Counter((p.device, p.dtype) for p in shadow.parameters() if p.is_floating_point())
    (device, dtype), _ = kinds.most_common(1)[0]

    def fake(tensor: Tensor) -> Tensor:
        made: Tensor = mode.from_tensor(tensor).to(device, dtype if tensor.is_floating_point() else None)
        return made

    try:
        with torch.no_grad(), mode:
            args, kwargs = pytree.tree_map_only(Tensor, fake, inputs)
            with trial:
                shadow(*args, **kwargs)
        return True
    except _OutOfTimeError:
        raise
    except Exception:  # fake tensors have no values to branch by; or these are no inputs for this model
        return False


def _fake_mode(model: nn.Module) -> Any:
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a while to import

    return detect_fake_mode(list(model.parameters())) or FakeTensorMode(allow_non_fake_inputs=True)


class _Base(FrozenLinear):
    """What stands in for a layer of ours: the linear that it was."""

    def __init__(self, layer: FrozenLinear, memo: Mapping[int, Any]) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.fan_in_fan_out = layer.fan_in_fan_out
        self.weight = memo[id(layer.weight)]
        self.bias = None if layer.bias is None else memo[id(layer.bias)]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix, self.bias)


def _shadow(
    model: nn.Module, linears: Sequence[nn.Module], fake: Callable[[Tensor], Tensor]
) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy of the model with fake tensors and no hooks; and which of its linears is a copy of which."""
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    for module in modules:
        for name, value in module.__dict__.items():
            if isinstance(value, dict) and name.endswith(_HOOKS):
                memo[id(value)] = type(value)()
            else:
                memo.update((id(t), fake(t)) for t in _tensors(value) if id(t) not in memo)
    for module in modules:
        if isinstance(module, FrozenLinear):
            memo[id(module)] = _Base(module, memo)
        else:
            memo[id(module)] = type(module).__new__(type(module))
    for module in modules:
        if not isinstance(module, FrozenLinear):
            memo[id(module)].__dict__.update(
                (name, _copy(value, memo)) for name, value in module.__dict__.items() if name not in _CALLS
            )
            memo[id(module)].__dict__["_compiled_call_impl"] = None
    shadow: nn.Module = memo[id(model)]
    return shadow.eval(), {memo[id(linear)]: linear for linear in linears}


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """Raises ValueError for a function that knows a module of the model, which it would run in place of the copy."""
    if hasattr(value, "cache_clear"):  # a method's cache
        value = value.__wrapped__
    for cell in getattr(value, "__closure__", None) or ():
        known = cell.cell_contents
        if id(getattr(known, "__self__", known)) in memo:
            raise ValueError(f"{value}: expected no module of the model in it")
    return copy.deepcopy(value, memo)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (list, tuple, dict, collections.OrderedDict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


@contextlib.contextmanager
def _nothing_left_behind(model: nn.Module) -> Iterator[None]:
    """Leaves random numbers as they were and no fake tensor in a cache; says no warning."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    spaces = _spaces(model)
    before = {cache: cache.cache_info() for cache in _caches(spaces)}
    fast = torch.backends.mha.get_fastpath_enabled()
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # which says at length what could not run
    silent, logger.disabled = logger.disabled, True
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            torch.backends.mha.set_fastpath_enabled(False)  # which a module leaves that gets adapters
            yield
    finally:
        logger.disabled = silent
        torch.backends.mha.set_fastpath_enabled(fast)
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for cache, info in before.items():
            if cache.cache_info() != info:
                cache.cache_clear()
        _drop_fakes(spaces)


def _spaces(model: nn.Module) -> list[Mapping[str, Any]]:
    """The names in the classes of a model, and in the files that these are written in."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    written = {kind.__module__ for kind in classes if kind.__module__.partition(".")[0] not in ("builtins", "torch")}
    return [*map(vars, classes), *(vars(sys.modules[name]) for name in written if name in sys.modules)]


def _caches(spaces: Iterable[Mapping[str, Any]]) -> set[Any]:
    """The functools.lru_cache among these names, or right within functions of these names."""
    kind: Any = type(functools.lru_cache(_spaces))
    found = set()
    for space in spaces:
        for value in space.values():
            if type(value) is kind:
                found.add(value)
            elif isinstance(value, types.FunctionType):
                for cell in value.__closure__ or ():
                    with contextlib.suppress(ValueError):  # not filled yet
                        if type(cell.cell_contents) is kind:
                            found.add(cell.cell_contents)
    return found


def _drop_fakes(spaces: Iterable[Mapping[str, Any]]) -> None:
    """Takes what holds fake tensors out of the dicts of these names: caches that a class or a file has."""
    from torch._subclasses.fake_tensor import FakeTensor

    for space in spaces:
        for value in space.values():
            if type(value) is dict:
                for key in [key for key, kept in value.items() if any(type(t) is FakeTensor for t in _tensors(kept))]:
                    del value[key]
