"""Tests that need TRITON_INTERPRET=1 before triton is imported: run by `tests/kernels/triton/test_interpreter.py`, in a
process of their own. The files have no `test_` prefix, so that an ordinary run does not collect them.
"""
