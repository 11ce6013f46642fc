# The CUDA module: addresses, sizes, strides and a stream in. Only peftk.backends.cuda calls it.
from typing import Any

device: str  # of the tensors that the kernels take: "cuda"

def __getattr__(name: str) -> Any: ...
