"""Products, activations and roundings with exactly specified rounding points.

Four operations are emulated under TRITON_INTERPRET=1, so that tests see the rounding points of the compiled kernels:

- operands are widened before `tl.dot`, since the interpreter's 16-bit dots are wrong;
- fp32 → bf16 rounds to nearest even, where the interpreter truncates;
- bf16 → fp32 keeps denormals, which the interpreter turns into other numbers;
- `fma` rounds once, where the interpreter rounds the product as well.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a·b in fp32 with exact products: `tl.dot` for equal dtypes (fp32 as ieee, never TF32), else `dot_terms`."""
    return _mma(a, b, acc) if a.dtype == b.dtype else dot_terms(a, b, acc)


@triton.jit
def dot_terms(a, b, acc):
    """acc + a·b on the bf16 tensor cores for factors of any dtype, with exact products.

    A factor is split into bf16 terms whose sum is exactly the factor: 3 for fp32 (24 = 3 · 8 significant bits), 2 for
    fp16 (11 = 8 + 3). Every pair of terms is multiplied: from 3 products (fp32 · bf16) to 9 (fp32 · fp32). Such a
    product runs about 15 times as fast as an fp32 product without tensor cores.
    """
    if a.dtype == tl.bfloat16:
        acc = _dot_term(a, b, acc)
    else:
        rest = a.to(tl.float32)
        for _ in tl.static_range(3 if a.dtype == tl.float32 else 2):
            term = leading_bits(rest)
            acc = _dot_term(term.to(tl.bfloat16), b, acc)
            rest = remainder(rest, term)
    return acc


@triton.jit
def _dot_term(a, b, acc):
    if b.dtype == tl.bfloat16:
        acc = _mma(a, b, acc)
    else:
        rest = b.to(tl.float32)
        for _ in tl.static_range(3 if b.dtype == tl.float32 else 2):
            term = leading_bits(rest)
            acc = _mma(a, term.to(tl.bfloat16), acc)
            rest = remainder(rest, term)
    return acc


@triton.jit
def _mma(a, b, acc):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def leading_bits(t):
    """The first 8 significant bits of fp32 t, a bf16 value. Truncated, not rounded, so that it cannot overflow."""
    return (t.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def nearest_term(t):
    """The bf16 value nearest to fp32 t, so that at most 2⁻⁸|t| is left; from 2¹²⁷ on cut, since it could overflow."""
    bits = t.to(tl.int32, bitcast=True)
    return (tl.where(tl.abs(t) < 1.7e38, bits + 0x8000, bits) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def remainder(t, high):
    """t - high, exact; 0 for an infinite t, whose first term is t itself."""
    return tl.where(t == high, 0.0, t - high)


@triton.jit
def round_to(t, dtype: tl.constexpr):
    """fp32 t rounded once to dtype, to nearest even. No change for fp32."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = t.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(t == t, nearest, bits | 0x400000) >> 16
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return t.to(dtype)


@triton.jit
def to_field(t, dtype: tl.constexpr):
    """t in dtype: fp32 rounded once, 16-bit as it is."""
    return round_to(t, dtype) if t.dtype == tl.float32 else t


@triton.jit
def widen(t):
    """t in fp32, exact."""
    if INTERPRETED and t.dtype == tl.bfloat16:
        return (t.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return t.to(tl.float32)


@triton.jit
def fma(a, b, c):
    """fl32(a · b + c), rounded once."""
    if INTERPRETED:
        return _fma_in_fp64(a.to(tl.float64) * b.to(tl.float64), c.to(tl.float64))
    else:
        return tl.fma(a, b, c)


@triton.jit
def _fma_in_fp64(product, c):
    """fp32 of product + c, rounded once. product: of two fp32 numbers, exact in fp64.

    The fp64 sum is rounded to odd: where two-sum finds it inexact and its last bit is even, it is replaced by its other
    neighbour. Rounding that to fp32 gives the same result as rounding the exact sum.
    """
    total = c + product
    rest = total - c
    error = (c - (total - rest)) + (product - rest)
    bits = total.to(tl.int64, bitcast=True)
    move = (error != 0.0) & (tl.abs(total) < float("inf")) & ((bits & 1) == 0)
    step = tl.where((error > 0.0) == (total > 0.0), 1, -1)
    return tl.where(move, bits + step, bits).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def activate(z, code):
    """act(z) in fp32. code: the activation's number in `peftk.adapters.activations.CODES`, a scalar or one per row."""
    relu = tl.where(z < 0.0, 0.0, z)  # keeps NaN
    gelu = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    # 0.5 · (1 + tanh(t)) = sigmoid(2t), so gelu_tanh and silu share one expression
    slope = tl.where(code == 3, 1.5957691216057308 * (1.0 + 0.044715 * z * z), 1.0)
    gated = z / (1.0 + tl.exp(-z * slope))
    return tl.where(code == 0, z, tl.where(code == 1, relu, tl.where(code == 2, gelu, gated)))


@triton.jit
def activation_slope(z, code):
    """act'(z) in fp32, with relu'(0) = 0. code: as in `activate`."""
    relu = tl.where(z > 0.0, 1.0, 0.0)
    gelu = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    # gelu_tanh and silu are z · g with g = sigmoid(q(z)): the slope is g + z · g (1 - g) q'(z)
    square = tl.where(code == 3, 0.044715 * z * z, 0.0)
    factor = tl.where(code == 3, 1.5957691216057308, 1.0)
    q = z * factor * (1.0 + square)
    g = 1.0 / (1.0 + tl.exp(-q))
    gated = g + z * (g / (1.0 + tl.exp(q))) * (factor * (1.0 + 3.0 * square))
    return tl.where(code == 0, 1.0, tl.where(code == 1, relu, tl.where(code == 2, gelu, gated)))
