"""Runs live models of other libraries on peftk's kernels: HF PEFT (`peftk.accelerate`)."""
