"""peftk's kernels under vLLM's LoRA layers. `docs/vllm.md`.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in every process of its own. `stacks` and
`punica` are the operations and import no vLLM; `cpu` and `gpu` put them before vLLM's own classes; `layers` is the rest
that vLLM lets us replace.
"""

from __future__ import annotations


def register() -> None:
    """Makes vLLM's LoRA layers use peftk's kernels, on a CPU and on CUDA GPUs. May be called more than once.

    Other platforms keep vLLM's own. VLLM_PLUGINS= (empty) starts vLLM without any plug-in.
    """
    from vllm.platforms import current_platform

    from peftk.serve.engines.vllm import layers

    if current_platform.is_cpu() or current_platform.is_cuda():
        name = "cpu.PeftkPunicaCPU" if current_platform.is_cpu() else "gpu.PeftkPunicaGPU"
        layers.use_punica(type(current_platform), f"{__name__}.{name}")
        layers.replace()
