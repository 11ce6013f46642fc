"""vLLM's punica wrapper for a CPU, on peftk's C++ kernels."""

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from peftk.serve.engines.vllm.punica import PeftkPunica


class PeftkPunicaCPU(PeftkPunica, PunicaWrapperCPU):
    """vLLM's own computes with the padded rank, and gives rows of the base model (-1) the adapter in the last slot."""
