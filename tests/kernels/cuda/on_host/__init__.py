"""Tests of the CUDA kernels compiled for the host, in a separate process that tests/support/host_cuda.py starts.
The files have no `test_` prefix, so that an ordinary run does not collect them.
"""
