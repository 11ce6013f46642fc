"""Runs a model's forward on fake tensors (without memory) to see which linears it calls and whose weights it reads.

The run uses a copy of the modules with fake tensors, in eval mode, without gradients and hooks, so the model, its
buffers and random number generators stay as they are. A model that cannot run like that (mostly because of branches
that depend on values) is no error: what was seen until then counts, and the rest shows when the real model runs
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
SECONDS = 10.0  # CPU time of this thread after which a run is given up
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
_CALLS = ("forward", "_compiled_call_impl")  # attributes of compiled modules and of those with accelerate's hooks

_Inputs = tuple[Sequence[Any], Mapping[str, Any]]


class TrialResult(NamedTuple):
    """The result of a run, by names of linears: which were called; for weights that were read, the reader's class."""

    called: frozenset[str]
    read: dict[str, str]


_NOTHING = TrialResult(frozenset(), {})


@dataclasses.dataclass
class _LazyTrial:
    """A run of a model that takes place when its result is first asked for."""

    model: nn.Module | None
    example_inputs: Any
    outcome: TrialResult | None = None

    def result(self) -> TrialResult:
        if self.outcome is None:
            assert self.model is not None
            self.outcome = run(self.model, self.example_inputs)
            self.model = self.example_inputs = None
        return self.outcome


@contextlib.contextmanager
def lazy_trial(model: nn.Module, example_inputs: Any = None) -> Iterator[None]:
    """Within the `with`, the first `result(model)` runs the model. If the block succeeds, the model keeps the result.

    Raises TypeError if the model's forward does not take example_inputs.
    """
    before = model.__dict__.get(_KEY)
    if example_inputs is not None:
        arguments(model, example_inputs)
    elif before is not None:
        yield
        return
    now = model.__dict__[_KEY] = _LazyTrial(model, example_inputs)
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


def result(model: nn.Module) -> TrialResult:
    """The result of the model's run; an empty one if there was none. The model is run only within `lazy_trial`."""
    found: _LazyTrial | None = model.__dict__.get(_KEY)
    return _NOTHING if found is None else found.result()


def reader(model: nn.Module, name: str, linear: nn.Module) -> str | None:
    """The class that reads a linear's weight if the linear is not called, so an adapter would do nothing; else None."""
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention"  # needs no run
    name, found = _plain(name), result(model)
    return None if name in found.called else found.read.get(name)


def any_reader(model: nn.Module, name: str) -> str | None:
    """The class that reads the weight of this linear, whether it is also called or not; None if there is none."""
    return result(model).read.get(_plain(name))


def run(model: nn.Module, example_inputs: Any = None, *, layers: Collection[nn.Module] | None = None) -> TrialResult:
    """Runs the model with example_inputs. Without them, runs the transformers models in it, with sample inputs.

    layers: the layers to follow; None means all linears.
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
    return TrialResult(
        frozenset(name for name, module in names.items() if module in called),
        {name: read[module] for name, module in names.items() if module in read},
    )


def _plain(name: str) -> str:
    """The name without the parts that torch.compile inserts."""
    return name.replace("_orig_mod.", "")


def arguments(model: nn.Module, example_inputs: Any) -> _Inputs:
    """args and kwargs: a mapping has named arguments, a tuple or list several, anything else is one argument.

    Raises TypeError if the model's forward does not take them.
    """
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
    """Also guesses values that a model asks for, and ends a run that takes too long."""

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
    """Guesses values: 1 for a number, False for a bool, and all elements for those that are not zero."""
    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default:
        return x.dtype != torch.bool and (1.0 if x.is_floating_point() else 1)
    if func is aten.nonzero.default:
        return _all_indices(x)
    if func is aten.index.Tensor:
        indices: list[Tensor | None] = []
        for index in args[0]:
            masks = index is not None and index.dtype in (torch.bool, torch.uint8)
            indices += _all_indices(index).unbind(1) if masks else [index]
        return aten.index.Tensor(x, indices)
    raise NotImplementedError(f"{func} on tensors without values")


def _all_indices(x: Tensor) -> Tensor:
    return x.new_empty((x.numel(), x.dim()), dtype=torch.int64)


def _run(
    model: nn.Module,
    linears: Sequence[nn.Module],
    inputs: Iterable[_Inputs],
    called: set[nn.Module],
    read: dict[nn.Module, str],
) -> bool:
    """Whether the model ran to the end with one of these inputs. Adds what was seen to `called` and `read`."""
    deadline, inputs = time.thread_time() + SECONDS, list(inputs)
    try:
        with _side_effects_undone(model):
            mode = _fake_mode(model)
            # some operations on fake tensors support only 16 bits
            for fake in (mode.from_tensor, lambda tensor: _in_16_bit(mode.from_tensor(tensor))):
                shadow, originals = _shadow(model, linears, fake)
                trial = _Trial(shadow, originals, deadline)
                try:
                    if any(_runs_to_end(shadow, candidate, mode, trial) for candidate in inputs):
                        return True
                finally:
                    called.update(originals[layer] for layer in trial.called)
                    read.update((originals[layer], by) for layer, by in trial.read.items())
    except Exception:  # the model's own code may raise anything
        pass
    return False


def _in_16_bit(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.to(torch.bfloat16)
    return nn.Parameter(half, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else half


def _runs_to_end(shadow: nn.Module, inputs: _Inputs, mode: Any, trial: _Trial) -> bool:
    """Whether the model ran to the end with these inputs."""
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
    except Exception:  # fake tensors have no values for branches, or the inputs do not fit this model
        return False


def _fake_mode(model: nn.Module) -> Any:
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a while to import

    return detect_fake_mode(list(model.parameters())) or FakeTensorMode(allow_non_fake_inputs=True)


class _PlainLinear(FrozenLinear):
    """Stands in for a layer of ours in the copy: computes the base layer in plain torch."""

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
    """A copy of the model with fake tensors and without hooks, and the original of each of its linears."""
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
            memo[id(module)] = _PlainLinear(module, memo)
        else:
            memo[id(module)] = object.__new__(type(module))
    for module in modules:
        if not isinstance(module, FrozenLinear):
            memo[id(module)].__dict__.update(
                (name, _copy(value, memo)) for name, value in module.__dict__.items() if name not in _CALLS
            )
            memo[id(module)].__dict__["_compiled_call_impl"] = None
    shadow: nn.Module = memo[id(model)]
    return shadow.eval(), {memo[id(linear)]: linear for linear in linears}


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy. Raises ValueError for a function with a module of the model in its closure, as it would run that."""
    if hasattr(value, "cache_clear"):  # a functools cache around a method
        value = value.__wrapped__
    for cell in getattr(value, "__closure__", None) or ():
        content = cell.cell_contents
        if id(getattr(content, "__self__", content)) in memo:
            raise ValueError(f"{value}: expected a function without a module of the model in its closure, got one with")
    return copy.deepcopy(value, memo)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (list, tuple, dict, collections.OrderedDict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


@contextlib.contextmanager
def _side_effects_undone(model: nn.Module) -> Iterator[None]:
    """Undoes the side effects of a run: restores random states, removes fake tensors from caches, hides warnings."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    namespaces = _namespaces(model)
    before = {cache: cache.cache_info() for cache in _caches(namespaces)}
    fast = torch.backends.mha.get_fastpath_enabled()
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # it logs at length what could not run
    silent, logger.disabled = logger.disabled, True
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            torch.backends.mha.set_fastpath_enabled(False)  # a module with adapters does not take the fast path either
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
        _drop_fakes(namespaces)


def _namespaces(model: nn.Module) -> list[Mapping[str, Any]]:
    """The namespaces of the classes of a model's modules, and of the Python modules that define them."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    written = {kind.__module__ for kind in classes if kind.__module__.partition(".")[0] not in ("builtins", "torch")}
    return [*map(vars, classes), *(vars(sys.modules[name]) for name in written if name in sys.modules)]


def _caches(namespaces: Iterable[Mapping[str, Any]]) -> set[Any]:
    """The functools.lru_cache objects in these namespaces, or in the closures of functions there."""
    kind: Any = type(functools.lru_cache(_namespaces))
    found = set()
    for namespace in namespaces:
        for value in namespace.values():
            if type(value) is kind:
                found.add(value)
            elif isinstance(value, types.FunctionType):
                for cell in value.__closure__ or ():
                    with contextlib.suppress(ValueError):  # not filled yet
                        if type(cell.cell_contents) is kind:
                            found.add(cell.cell_contents)
    return found


def _drop_fakes(namespaces: Iterable[Mapping[str, Any]]) -> None:
    """Removes entries with fake tensors from dicts in these namespaces, which classes and modules use as caches."""
    from torch._subclasses.fake_tensor import FakeTensor

    for namespace in namespaces:
        for value in namespace.values():
            if type(value) is dict:
                for key in [key for key, kept in value.items() if any(type(t) is FakeTensor for t in _tensors(kept))]:
                    del value[key]
