"""Tests that need TRITON_INTERPRET=1 before triton is imported. `tests/kernels/triton/test_interpreter.py` runs them in
separate processes. The files have no `test_` prefix, so that an ordinary run does not collect them.
"""
