"""vLLM's punica wrapper for CUDA GPUs, on peftk's Triton kernels. Mixtures of experts stay vLLM's own."""

from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from peftk.serve.engines.vllm.punica import PeftkPunica


class PeftkPunicaGPU(PeftkPunica, PunicaWrapperGPU):  # vLLM marks it @final, which Python does not mind
    pass
