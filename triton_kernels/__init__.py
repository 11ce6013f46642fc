"""Triton kernels and their launchers, one file per operation; installed as `peftk.triton_kernels`.

Importing this imports triton: only `peftk.backends.triton` does, when it is first asked for.
"""
