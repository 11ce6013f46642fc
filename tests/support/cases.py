"""Random cases and what they should give. They ship, in `peftk.tools.selftest`: users' machines are held to the
same."""

from peftk.tools.selftest.cases import (
    DTYPES,
    Case,
    decode_adapter,
    decode_case,
    double,
    expected,
    expected_grads,
    normal,
    random_case,
)

__all__ = [
    "DTYPES",
    "Case",
    "decode_adapter",
    "decode_case",
    "double",
    "expected",
    "expected_grads",
    "normal",
    "random_case",
]
