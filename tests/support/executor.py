"""Python access to the executor that runs CUDA kernels on the host."""

from __future__ import annotations

import ctypes


class Statistics(ctypes.Structure):
    """cuda_on_host::Statistics in tests/cuda_emulator/executor.h."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("launches", "blocks", "switches", "copies", "products")),
        ("matrix_loads", ctypes.c_uint64),
        ("bank_conflicts", ctypes.c_uint64),
        ("resident", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("device", ctypes.c_uint64),
    ]


class Executor:
    """The executor's `statistics`, which a test may reset, and the seed and limits of its schedules."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.cuda_on_host_statistics.restype = ctypes.POINTER(Statistics)
        self.statistics: Statistics = library.cuda_on_host_statistics().contents

    def current_device(self) -> int:
        return int(self._library.cuda_on_host_current_device())

    def seed(self, seed: int) -> None:
        self._library.cuda_on_host_seed(ctypes.c_uint64(seed))

    def limit_resident(self, blocks: int) -> None:
        """The most blocks at once: each launch draws a limit from 1 to `blocks`. 0: the executor's own limit."""
        self._library.cuda_on_host_limit_resident(blocks)

    def reset(self) -> None:
        ctypes.memset(ctypes.byref(self.statistics), 0, ctypes.sizeof(Statistics))
