# The CUDA module: addresses, sizes, strides and a stream in. Only peftk.backends.cuda calls it.
from typing import Any

def __getattr__(name: str) -> Any: ...
