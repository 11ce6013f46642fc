"""Packed weights: the bits of `dequantize`, of the conversions and of `quantize`, against the libraries that own them.

A library that is not installed skips its tests. What the others packed lies in tests/fixtures/quantized.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

from peftk.quantized.formats import FORMATS, pack_halves, pack_pairs, unpack_halves, unpack_pairs
from peftk.quantized.layouts import (
    from_awq,
    from_bitsandbytes_4bit,
    from_bitsandbytes_8bit,
    from_gptq,
    nested_absmax,
)
from peftk.quantized.quantize import quantize
from peftk.quantized.weight import QuantizedWeight
from tests.fixtures import quantized as vectors
from tests.support.quantized_cases import QUANTIZED, random_weight

SHAPES = [(1, 64), (3, 128), (16, 256), (5, 96), (64, 64)]
SCALES = [1.0, 1e-4, 3e4]


def weights(seed: int = 0, columns: int = 1) -> list[Tensor]:
    """Weights of several sizes and magnitudes, with zeros, equal values and signed zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for N, K in SHAPES:
        if K % columns:
            continue
        for scale in SCALES:
            weight = torch.randn(N, K, generator=generator) * scale
            weight[torch.rand(N, K, generator=generator) < 0.05] = 0.0
            weight[0, : K // 2] = -0.0
            weight[-1, K // 2 :] = scale
            found.append(weight)
    return found


def same(actual: Tensor, expected: Tensor) -> None:
    """The same bits; any nan is like any other."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    view = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[actual.element_size()]
    equal = (actual.view(view) == expected.view(view)) | (actual.isnan() & expected.isnan())
    assert bool(equal.all()), f"{int((~equal).sum())} of {equal.numel()} differ"


def dequantized(packed: Tensor, state) -> Tensor:
    """bitsandbytes' W. Its C++ takes blocks to begin at rows; where they do not, its Python, which quantized them, is
    right."""
    from bitsandbytes import functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    if state.shape[-1] % state.blocksize == 0:
        return functional.dequantize_4bit(packed, state)
    compute = _dequantize_4bit_compute.__wrapped__
    return compute(packed.flatten(), state.absmax, state.code, state.blocksize, state.shape, torch.float32)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_4bit(quant_type: str, blocksize: int):
    functional = pytest.importorskip("bitsandbytes.functional")
    for weight in weights(columns=2):
        packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
        ours = from_bitsandbytes_4bit(
            packed, state.absmax, tuple(weight.shape), quant_type=quant_type, blocksize=blocksize
        )
        assert ours.packed.data_ptr() == packed.data_ptr()
        same(ours.dequantize(), dequantized(packed, state))
        made = quantize(weight, quant_type, group=blocksize)
        assert torch.equal(made.packed, packed.flatten())
        same(made.scales, state.absmax)


def test_bitsandbytes_nested_scales():
    functional = pytest.importorskip("bitsandbytes.functional")
    for weight in weights(columns=2):
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        inner = state.state2
        absmax = nested_absmax(state.absmax, inner.code, inner.absmax, state.offset, inner.blocksize)
        ours = from_bitsandbytes_4bit(packed, absmax, tuple(weight.shape), quant_type="nf4", blocksize=64)
        if weight.shape[1] % 64 == 0:  # see `dequantized`
            same(ours.dequantize(), functional.dequantize_4bit(packed, state))


def test_bitsandbytes_8bit():
    functional = pytest.importorskip("bitsandbytes.functional")
    for weight in weights():
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
        if not bool(absmax.isfinite().all()):
            continue
        ours = from_bitsandbytes_8bit(codes, absmax)
        same(ours.dequantize(), functional.int8_vectorwise_dequant(codes, absmax))


@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
def test_gguf(format: str):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[format.upper()]
    for weight in weights(columns=32):
        blocks = gguf.quantize(weight.numpy(), kind)
        ours = QuantizedWeight(format, weight.shape, torch.from_numpy(blocks), block=(1, 32))
        same(ours.dequantize(), torch.from_numpy(gguf.dequantize(blocks, kind)))
        assert torch.equal(quantize(weight, format).packed, ours.packed)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_gguf_any_bytes():
    """Blocks that no quantizer writes: every scale of fp16, subnormal, inf and nan among them."""
    gguf = pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(1)
    for format, size in (("q8_0", 34), ("q4_0", 18)):
        blocks = torch.randint(0, 256, (64, 4 * size), generator=generator, dtype=torch.uint8)
        ours = QuantizedWeight(format, (64, 128), blocks, block=(1, 32)).dequantize()
        kind = gguf.GGMLQuantizationType[format.upper()]
        same(ours, torch.from_numpy(gguf.dequantize(blocks.numpy(), kind)))


@pytest.mark.parametrize(
    ("format", "block"),
    [("int8", (1, 32)), ("int8", (1, 256)), *(("fp8_e4m3", b) for b in ((1, 32), (1, 256), (128, 128), (192, 256)))],
)
def test_affine_of_torchao(format: str, block: tuple[int, int]):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    generator = torch.Generator().manual_seed(2)
    N, K = 192 if block[0] != 128 else 256, 256
    grid = (N // block[0], K // block[1])
    scales = torch.rand(grid, generator=generator) * 1e-2
    if format == "int8":
        packed = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
        expected = primitives.dequantize_affine(packed, block, scales, None, torch.int8)
    else:
        packed = torch.randint(0, 256, (N, K), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
        spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        expected = primitives._dequantize_affine_float8(packed, scales, torch.float32)
        same(expected, packed.float() * spread)
    same(QuantizedWeight(format, (N, K), packed, scales, block=block).dequantize(), expected)


def test_fp8_edges():
    """A block that W's end cuts off."""
    packed = torch.randn(130, 200).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    found = QuantizedWeight("fp8_e4m3", (130, 200), packed, scales, block=(128, 128)).dequantize()
    assert torch.equal(found[129, 199], packed[129, 199].float() * 8)
    assert torch.equal(found[129, 127], packed[129, 127].float() * 4)
    assert torch.equal(found[127, 128], packed[127, 128].float() * 2)


@pytest.mark.parametrize("zeros", [False, True])
def test_int4_of_torchao(zeros: bool):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (8, 256), generator=generator, dtype=torch.uint8)
    scales = torch.randn(8, 4, generator=generator).half()
    points = torch.randint(0, 16, (8, 4), generator=generator, dtype=torch.uint8) if zeros else torch.full((8, 4), 8)
    ours = QuantizedWeight(
        "int4", (8, 256), pack_halves(codes), scales, points if zeros else None, block=(1, 64)
    ).dequantize()
    expected = primitives.dequantize_affine(codes, (1, 64), scales.float(), points.float(), torch.uint8)
    same(ours, expected)


def test_mxfp4_of_torchao():
    """torchao, gpt-oss and the specification have the low half byte first."""
    tensors = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    generator = torch.Generator().manual_seed(4)
    packed = torch.randint(0, 256, (16, 64), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, (16, 4), generator=generator, dtype=torch.uint8)
    scales[0] = torch.tensor([0, 1, 254, 255])
    ours = QuantizedWeight("mxfp4", (16, 128), packed, scales, block=(1, 32)).dequantize()
    codes = tensors.f4_unpacked_to_f32(tensors.unpack_uint4(packed)).view(16, 4, 32)
    same(ours, (codes * tensors.get_fp_scale(scales.view(torch.float8_e8m0fnu))[..., None]).view(16, 128))


def test_gptq_vector():
    case = vectors.GPTQ
    ours = from_gptq(case.qweight, case.qzeros, case.scales, case.g_idx)
    assert ours.zeros is not None
    same(ours.dequantize().half(), case.weight)


def test_awq_vector():
    case = vectors.AWQ
    ours = from_awq(case.qweight, case.qzeros, case.scales)
    same(ours.dequantize().half(), case.weight)


def test_gptq_symmetric_has_no_zeros():
    case = vectors.GPTQ
    sevens = torch.full_like(case.qzeros, 0x77777777)
    assert from_gptq(case.qweight, sevens, case.scales).zeros is None
    eights = torch.full_like(case.qzeros, 0x88888888 - 2**32)
    assert from_gptq(case.qweight, eights, case.scales, zeros_minus_one=False).zeros is None


def test_half_bytes_go_back_and_forth():
    codes = torch.randint(0, 16, (3, 128), dtype=torch.uint8)
    assert torch.equal(unpack_halves(pack_halves(codes)), codes)
    for first in (False, True):
        assert torch.equal(unpack_pairs(pack_pairs(codes, high_first=first), high_first=first), codes)
    assert pack_halves(codes[:1, :32])[0, 3] == codes[0, 3] + 16 * codes[0, 19]


@pytest.mark.parametrize(("format", "group"), QUANTIZED)
def test_quantize_rounds_to_nearest(format: str, group: int | None):
    """No code of the format is nearer to an element than the chosen one, by more than rounding (GGUF: of s to fp16)."""
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(5))
    found = quantize(weight, format, group=group)
    values = found.dequantize()
    step = {"int8": 1 / 127, "q8_0": 1 / 127, "int4": 1 / 7, "q4_0": 1 / 8, "nf4": 0.31, "fp4": 0.34}[format]
    width = found.block[1]
    largest = weight.unflatten(1, (-1, width)).abs().amax(-1, keepdim=True).expand(-1, -1, width).flatten(1)
    allowed = largest * step * (1.0 if format == "q4_0" else 0.5) * (1.07 if format in ("q8_0", "q4_0") else 1.001)
    assert bool(((values - weight).abs() <= allowed).all())
    assert float((values - weight).norm() / weight.norm()) < {"int8": 0.01, "q8_0": 0.01}.get(format, 0.16)


@pytest.mark.parametrize(("format", "group"), QUANTIZED)
def test_quantize_keeps_zeros(format: str, group: int | None):
    assert bool((quantize(torch.zeros(2, 128), format, group=group).dequantize() == 0).all())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("int8", torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 1), None, (1, 3)), None, ""),
        (("int5", torch.zeros(2, 3), None, None, (1, 3)), ValueError, "format: expected one of int8"),
        (("int8", torch.zeros(2, 3), torch.zeros(2, 1), None, (1, 3)), TypeError, "packed: expected torch.int8"),
        (
            ("int8", torch.zeros(2, 2, dtype=torch.int8), torch.zeros(2, 1), None, (1, 3)),
            ValueError,
            "packed: expected",
        ),
        (
            ("int8", torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 3), None, (1, 3)),
            ValueError,
            "scales: expected",
        ),
        (("int8", torch.zeros(2, 3, dtype=torch.int8), None, None, (1, 3)), TypeError, "scales: expected a tensor"),
        (("int8", torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 1), None, (1, 2)), ValueError, "block: expected"),
        (("int8", torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 1), None, (2, 3)), ValueError, "block: expected"),
        (
            ("int8", torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 1), torch.zeros(2, 1), (1, 3)),
            ValueError,
            "zeros: expected None",
        ),
        (
            ("int8", torch.zeros(3, 2, dtype=torch.int8).t(), torch.zeros(2, 1), None, (1, 3)),
            ValueError,
            "packed: expected a contiguous",
        ),
    ],
)
def test_tensors_that_do_not_fit(arguments, error, message):
    format, packed, scales, zeros, block = arguments
    if error is None:
        QuantizedWeight(format, (2, 3), packed, scales, zeros, block=block)
        return
    with pytest.raises(error, match=message):
        QuantizedWeight(format, (2, 3), packed, scales, zeros, block=block)


def test_more_that_do_not_fit():
    packed, scales = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="shape: expected K to be a multiple of 32"):
        QuantizedWeight("int4", (2, 60), packed, scales, block=(1, 60))
    with pytest.raises(ValueError, match="block: expected a multiple of 32 columns"):
        QuantizedWeight("int4", (2, 64), packed, scales, block=(1, 16))
    with pytest.raises(TypeError, match=r"zeros: expected torch.uint8, got torch.int32"):
        QuantizedWeight("int4", (2, 64), packed, scales, torch.zeros(2, 1, dtype=torch.int32), block=(1, 64))
    with pytest.raises(ValueError, match=r"packed: expected shape \[2, 34\], got \[2, 33\]"):  # truncated
        QuantizedWeight("q8_0", (2, 32), torch.zeros(2, 33, dtype=torch.uint8), block=(1, 32))
    with pytest.raises(ValueError, match=r"block: expected \(1, 32\)"):
        QuantizedWeight("q8_0", (2, 64), torch.zeros(2, 68, dtype=torch.uint8), block=(1, 64))
    with pytest.raises(ValueError, match=r"scales: expected shape \[2\], got \[1\]"):
        QuantizedWeight("nf4", (2, 64), torch.zeros(64, dtype=torch.uint8), torch.ones(1), block=(1, 64))
    case = vectors.GPTQ
    with pytest.raises(ValueError, match="g_idx: expected consecutive groups"):
        from_gptq(case.qweight, case.qzeros, case.scales, case.g_idx.flip(0))
    with pytest.raises(ValueError, match="qzeros: expected shape"):
        from_gptq(case.qweight, case.qzeros[:1], case.scales)
    with pytest.raises(ValueError, match="scales: expected K = "):
        from_awq(vectors.AWQ.qweight, vectors.AWQ.qzeros[:0], vectors.AWQ.scales[:0])
    with pytest.raises(ValueError, match="absmax: expected shape"):
        nested_absmax(torch.zeros(300, dtype=torch.uint8), torch.zeros(256), torch.zeros(1), 0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 64, dtype=torch.int8), "int8"), TypeError, "weight: expected float32"),
        ((torch.zeros(64), "int8"), ValueError, r"weight: expected shape \[N, K\]"),
        ((torch.zeros(2, 64), "int2"), ValueError, "format: expected one of int8"),
        ((torch.zeros(2, 64), "int4", 24), ValueError, "group: expected a divisor"),
        ((torch.zeros(2, 64), "int4", 16), ValueError, "group: expected 32, 64 or 128"),
        ((torch.zeros(2, 64), "q8_0", 64), ValueError, "group: expected 32"),
        ((torch.full((2, 64), float("nan")), "nf4"), ValueError, "weight: expected finite"),
    ],
)
def test_quantize_refuses(arguments, error, message):
    weight, format, *group = arguments
    with pytest.raises(error, match=message):
        quantize(weight, format, group=group[0] if group else None)


@pytest.mark.parametrize("format", FORMATS)
def test_it_acts_as_the_tensor_it_stands_for(format: str):
    weight = random_weight(format, 8, 128)
    W = weight.dequantize()
    x = torch.randn(3, 128)
    assert torch.equal(torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, W))
    assert torch.equal(weight.t(), W.t())
    assert (weight.shape, weight.dtype, weight.device, weight.requires_grad) == (W.shape, W.dtype, W.device, False)
    half = weight.to(torch.bfloat16)
    assert isinstance(half, QuantizedWeight)
    assert torch.equal(half.dequantize(), W)  # no packed bit has changed
    assert torch.equal(half + 0, W.bfloat16() + 0)
    with pytest.raises(TypeError, match="in place"):
        weight.add_(1)


@pytest.mark.parametrize("format", FORMATS)
def test_it_travels(format: str):
    """Copies, Parameters, modules and files."""
    weight = random_weight(format, 8, 128)
    W = weight.dequantize()
    module = torch.nn.Linear(128, 8, bias=False)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    for moved in (copy.deepcopy(module), module.to(torch.bfloat16), module.to("cpu")):
        assert isinstance(moved.weight, QuantizedWeight)
        assert torch.equal(moved.weight.dequantize(), W)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)["weight"]
    assert torch.equal(loaded.dequantize(), W)
    fresh = random_weight(format, 8, 128, seed=9)
    fresh.copy_(weight)
    assert torch.equal(fresh.dequantize(), W)
    with pytest.raises(TypeError, match="copy_: expected another"):
        fresh.copy_(W)


@pytest.mark.parametrize(
    ("format", "largest", "values", "rounded"),
    [  # the scale is 1 in both; ggml rounds q4_0 half up, and q8_0 half away from zero
        ("q4_0", -8.0, (0.45, 0.55, -0.5, -0.55, 6.5, 7.9), (0, 1, 0, -1, 7, 7)),
        ("q8_0", 127.0, (0.45, 0.5, -0.5, 1.5, -2.5, 2.49), (0, 1, -1, 2, -3, 2)),
    ],
)
def test_where_ggml_rounds(format: str, largest: float, values: tuple[float, ...], rounded: tuple[int, ...]):
    """The owning library decides, where it is there; this holds where it is not."""
    weight = torch.zeros(1, 32)
    weight[0, : len(values) + 1] = torch.tensor([largest, *values])
    found = quantize(weight, format).dequantize()[0]
    assert found.tolist() == [largest, *map(float, rounded), *[0.0] * (31 - len(values))]
