"""Whether operations are being recorded."""

from __future__ import annotations

import torch


def is_recording() -> bool:
    """Whether operations are being recorded: by torch.compile, torch.jit.trace, make_fx, or a torch dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )
