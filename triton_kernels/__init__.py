"""Triton kernels and their launchers, one file per operation; installed as `peftk.triton_kernels`.

Importing this package imports triton. `peftk.backends.triton` imports it when that backend is first needed.
"""
