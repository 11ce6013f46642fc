"""The two sides of kernels that are compiled ahead, each for a process of its own.

python -m tests.support.compiled_ahead compile   what `CALLS` launch, on a stand-in for an H100, into Triton's cache
python -m tests.support.compiled_ahead launch    the same calls by real launches of tensors in memory, up to the driver,
                                                 which is a stub; prints the names of what was launched and compiled
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from peftk import functional
from peftk.backends import triton
from peftk.tools.selftest.check import Check, Target
from peftk.tools.selftest.work import Work, build_case
from peftk.tools.triage.group import Group
from peftk.tools.triage.prepare import compile_share
from peftk.tools.triage.worker import compilations
from peftk.triton_kernels import lora_linear, lora_wgrad, merge, tuned

BF16 = torch.bfloat16
TARGET = 90


def one(device: str) -> None:
    Work(build_case((17, 256, 128), (16,), BF16, device, many=False, biases=True), "triton").run()


def many(device: str) -> None:
    ranks = (1, 17, 0, None)
    case = build_case((300, 200, 136), ranks, BF16, device, many=True, biases=True, adapter_dtype=torch.float32)
    Work(case, "triton", dropout_p=0.25).run()


def merged(device: str) -> None:
    weight, A, B = (torch.ones(shape, device=device, dtype=BF16) for shape in ((96, 64), (8, 64), (96, 8)))
    functional.merge_(weight, A, B, 1.0, backend="triton")


CALLS: tuple[Callable[[str], None], ...] = (one, many, merged)


def checks(target: Target) -> Iterator[Check]:
    for call in CALLS:
        yield Check("triage", "triton", call.__name__, "", lambda call=call: (call(target.device), 0.0)[1])  # type: ignore[misc]


class Driver:
    """Triton's driver without a GPU: binaries are loaded and launched by name only."""

    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448})

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.utils.load_binary = self.load

    def load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        assert binary.startswith(b"\x7fELF")
        return 0, 0, 0, 0, 1024

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: self.launched.append(metadata.name)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", TARGET, 32)


def launch() -> None:
    stub = Driver()
    driver.set_active(stub)
    mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros).start()  # what no kernel writes is no noise
    with mock.patch.object(triton, "_DEVICE", "cpu"), compilations() as compiled:
        for module in (lora_linear, lora_wgrad, merge, tuned):
            mock.patch.object(module, "target", return_value=TARGET).start()
        for call in CALLS:
            call("cpu")
    print(json.dumps({"launched": sorted(set(stub.launched)), "compiled": compiled}))


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        launch()
    else:
        problems = compile_share([Group("few", "", checks)], TARGET, 0, 1)
        assert not problems, problems
