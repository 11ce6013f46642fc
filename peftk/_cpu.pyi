# The C++ module: addresses, sizes, strides and dtype codes in. Only peftk.backends.cpu calls it.
from typing import Any

def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def plan(
    M: int,
    N: int,
    K: int,
    x_dtype: int,
    weight_n: int,
    weight_k: int,
    weight_dtype: int,
    threads: int,
    backward: bool,
) -> tuple[str, bool, int]: ...
def plain_tensors(tensor: type, parameter: type) -> None: ...
def __getattr__(name: str) -> Any: ...
