# The CUDA module: addresses, sizes, strides and a stream in (csrc/bindings/cuda.cpp), called by peftk.backends.cuda only.
from typing import Any

def __getattr__(name: str) -> Any: ...
