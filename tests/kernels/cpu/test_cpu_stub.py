"""`peftk/_cpu.pyi` declares what the module has, and wrong arguments raise the right errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from peftk import _cpu
from tests.support import stubs

NOTHING = {"M": 0, "N": 0, "K": 0, "x": 0, "x_stride": 0, "x_dtype": 0, "threads": 1}
ONE = {"A": 0, "stride_A": 0, "B": 0, "stride_Bn": 0, "stride_Br": 0, "bias_A": 0, "bias_B": 0, "rank": 0}
ONE |= {"activation": 0, "scaling": 1.0, "dtype": 0}
SIDE = {"lora_A": 0, "lora_B": 0, "ends": [1], "scaling": [1.0], "dtype": 0, "halves": 0}


def test_stub_says_what_the_module_has() -> None:
    assert stubs.differences(_cpu) == []


def test_every_argument_is_needed_and_known_by_its_name() -> None:
    weight = {"weight": 0, "weight_n": 0, "weight_k": 1, "weight_dtype": 0}
    functions: list[tuple[Callable[..., object], dict[str, object]]] = [
        (_cpu.Linear.of, NOTHING | weight),
        (_cpu.Linear.over_base, NOTHING),
        (_cpu.Adapters.none, {"dtype": 0}),
        (_cpu.Adapters.one, ONE),
        (_cpu.MergeWeight.of, {"weight": 0, "stride": 0, "N": 0, "K": 0, "dtype": 0}),
        (_cpu.MergeSide.of, SIDE),
    ]
    for function, arguments in functions:
        function(**arguments)
        function(**dict(reversed(arguments.items())))
        for name in arguments:
            some = {key: value for key, value in arguments.items() if key != name}
            with pytest.raises(TypeError, match=rf"missing argument '{name}'"):
                function(**some)
            for wrong in ("1", None, torch.tensor(1), -(10**400)):
                with pytest.raises(TypeError, match=rf"argument '{name}': expected .*, got "):
                    function(**some, **{name: wrong})
        with pytest.raises(TypeError, match="unknown argument 'colour'"):
            function(**arguments, colour=1)
        with pytest.raises(TypeError, match="takes 0 positional arguments, got 1"):
            function(1, **arguments)


def test_objects_are_of_their_class() -> None:
    linear, none = _cpu.Linear.over_base(**NOTHING), _cpu.Adapters.none(dtype=0)
    _cpu.lora_linear(linear, none, y=0, y_stride=0)
    for wrong in (none, None, 0):
        with pytest.raises(TypeError, match="argument 'linear': expected Linear, got"):
            _cpu.lora_linear(wrong, none, y=0, y_stride=0)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="argument 'weight': expected MergeWeight, got"):
            _cpu.checksum(wrong, threads=1)  # type: ignore[arg-type]
    weight = _cpu.MergeWeight.of(weight=0, stride=0, N=0, K=0, dtype=0)
    with pytest.raises(TypeError, match="argument 'from_side': expected MergeSide or None, got"):
        _cpu.remerge(weight, weight, None, threads=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got argument 'linear' twice"):
        _cpu.lora_linear(linear, linear=linear, adapters=none, y=0, y_stride=0)  # type: ignore[misc]


def test_invalid_values() -> None:
    linear, one = _cpu.Linear.over_base(**NOTHING), _cpu.Adapters.one(**ONE)
    with pytest.raises(ValueError, match="x_dtype: expected a dtype code 0, 1 or 2, got 3"):
        _cpu.Linear.over_base(**NOTHING | {"x_dtype": 3})
    with pytest.raises(ValueError, match="scaling: expected one for each adapter, and at least one, got 1 for 2"):
        _cpu.MergeSide.of(**SIDE | {"ends": [1, 2]})
    dy = {"dy": 0, "dy_stride": 0, "dy_dtype": 0}
    with pytest.raises(ValueError, match="grads: expected one entry for each of 1 adapters, got 0"):
        _cpu.lora_linear_backward(linear, one, **dy, grads=[])
    for wrong in ([(0, 0, 0)], [(0,) * 5], [0], 0):
        with pytest.raises(TypeError, match="argument 'grads': expected list of tuple of 4 × int of 64 bits, got"):
            _cpu.lora_linear_backward(linear, one, **dy, grads=wrong)  # type: ignore[arg-type]
