"""Formats and quantizers: packing against the format's page, rounding against its bound."""

import pytest
import torch
from close import assert_close, assert_equal

from fastllm.formats import (
    FORMATS,
    IntFormat,
    QuantizedWeight,
    check,
    dequantize,
    pack_bits,
    pack_zero_point,
    parse_format,
    unpack_bits,
    unpack_zero_point,
)
from fastllm.quantizers import QUANTIZERS, quantize

INTEGERS = {name: f for name, f in FORMATS.items() if isinstance(f, IntFormat)}  # for floats see test_fp8_format
SHAPES = [(64, 256), (33, 200), (5, 37), (1, 8), (16, 1)]


def slowly_packed(q: torch.Tensor, bits: int) -> list[list[int]]:
    """compressed-tensors' page, word by word: value j of a row is at bits j * bits, counted from the lowest."""
    rows = []
    for row in q.tolist():
        number = sum(value << (j * bits) for j, value in enumerate(row))
        words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
        rows.append([word - (word >> 31 << 32) for word in words])
    return rows


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing(bits, shape, device):
    q = torch.randint(2**bits, shape, dtype=torch.uint8)
    packed = pack_bits(q, bits)
    assert packed.tolist() == slowly_packed(q, bits)
    assert_equal(unpack_bits(packed, bits, shape[1]), q)
    zeros = pack_zero_point(q, bits)
    assert zeros.t().tolist() == slowly_packed(q.t(), bits)
    assert_equal(unpack_zero_point(zeros, bits, shape[0]), q)


@pytest.mark.parametrize("format", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_is_the_formula(format, shape, device):
    (N, K), G = shape, format.groups(shape[1])
    q = torch.randint(2**format.bits, shape, dtype=torch.uint8)
    z = torch.full((N, G), format.middle) if format.symmetric else torch.randint(2**format.bits, (N, G))
    scale = torch.rand(N, G)
    zero_point = None if format.symmetric else pack_zero_point(z.to(torch.uint8), format.bits)
    weight = QuantizedWeight(pack_bits(q, format.bits), scale, zero_point)
    check(weight, format, shape)
    group = torch.arange(K) // format.group_of(K)
    want = (q.double() - z.double()[:, group]) * scale.double()[:, group]
    assert_close(dequantize(weight, format, shape, torch.float32), want, dtype=torch.float32)
    assert format.bytes(N, K, 4) == sum(t.numel() * t.element_size() for t in weight if t is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", INTEGERS.values(), ids=INTEGERS)
def test_rounding_is_to_the_nearest(format, dtype, device):
    N, K = 33, 200
    w = torch.randn(N, K, dtype=dtype)
    weight = quantize(w, format, "rtn")
    assert weight.scale.dtype == dtype
    group = torch.arange(K) // format.group_of(K)
    step = weight.scale.double()[:, group]
    error = (dequantize(weight, format, (N, K), torch.float64) - w.double()).abs()
    # half a step; the ends of the range also lose half a step to symmetry or to the rounded zero point, and the
    # rounding of the scale times the number of levels
    ends = 1.01 + 2**format.bits * torch.finfo(dtype).eps / 2
    assert (error <= ends * step).all()
    assert (error <= 0.5001 * step).float().mean() > 0.95


@pytest.mark.parametrize("format", INTEGERS.values(), ids=INTEGERS)
def test_hqq_is_no_worse_in_any_group(format, device):
    N, K = 32, 256
    w = torch.randn(N, K) * torch.rand(N, 1) + (torch.rand(N, K) > 0.99) * 3

    def error(method):
        e = (dequantize(quantize(w, format, method), format, (N, K), torch.float32) - w).abs()
        return e.pow(2 if format.symmetric else 4).view(N, format.groups(K), -1).sum(-1)  # what each chooses by

    rtn, hqq = error("rtn"), error("hqq")
    assert (hqq <= rtn * 1.001).all()
    kept = format.bits == 8 or not format.symmetric and format.group_of(K) > 128  # where the scale stays
    assert kept or hqq.sum() < 0.97 * rtn.sum()


@pytest.mark.parametrize("largest", [1.0, -1.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_sign_of_a_symmetric_scale_makes_room(bits, largest, device):
    """Weights that fill the range on one side only: the largest is -8, exactly, whichever sign it has."""
    middle = 2 ** (bits - 1)
    w = largest * torch.arange(middle + 1, device=device)[None, :32].repeat(2, 8)[:, :32].float() / middle
    w[:, -1] = largest
    format = IntFormat(bits, 32)
    weight = quantize(w, format, "hqq")
    assert (weight.scale.sign() == -largest).all()
    assert_equal(dequantize(weight, format, (2, 32), torch.float32), w)
    assert not torch.equal(dequantize(quantize(w, format, "rtn"), format, (2, 32), torch.float32), w)


def test_a_scale_that_would_gain_nothing_stays_positive():
    w = torch.tensor([7.0, -7.0, 3.0, -2.0] * 8)[None] / 7
    weight = quantize(w, IntFormat(4, 32), "hqq")
    assert (weight.scale > 0).all()
    assert_equal(weight.scale, quantize(w, IntFormat(4, 32), "rtn").scale)


def test_a_weight_of_zeros_stays_zero():
    for method in QUANTIZERS:
        for format in INTEGERS.values():
            weight = quantize(torch.zeros(4, 64, dtype=torch.float16), format, method)
            assert (dequantize(weight, format, (4, 64), torch.float32) == 0).all(), (method, format.name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value):
    w = torch.randn(64, 64)
    w[7, 9] = value
    with pytest.raises(ValueError, match="1 values that are NaN or infinite in rows 0 to 63"):
        quantize(w, FORMATS["int4-g32"])


@pytest.mark.parametrize(
    "w", [torch.zeros(8), torch.zeros(2, 2, 2), torch.zeros(4, 4, dtype=torch.int8)], ids=["1-D", "3-D", "int8"]
)
def test_what_is_no_weight_is_refused(w):
    with pytest.raises(ValueError, match="floating-point matrix"):
        quantize(w, FORMATS["int8"])


def test_names():
    assert all(parse_format(name) == format and format.name == name for name, format in FORMATS.items())
    assert parse_format("int4") == IntFormat(4, 128) and parse_format("int8") == IntFormat(8)
    assert parse_format("int4", group_size=64) == IntFormat(4, 64) and parse_format("int4", -1) == IntFormat(4)
    assert parse_format("int8-g32-asym") == IntFormat(8, 32, False) and parse_format("int4-channel") == IntFormat(4)
    for name in ("int5", "int4-g", "nf4", "int4-g64-sym"):
        with pytest.raises(ValueError, match="unknown weight format"):
            parse_format(name)
    with pytest.raises(ValueError, match="group_size=48 is not a multiple of 32"):
        parse_format("int4", 48)
    with pytest.raises(ValueError, match="bits=3"):
        IntFormat(3)
    with pytest.raises(ValueError, match="unknown method 'awq'; known: rtn, hqq"):
        quantize(torch.randn(4, 64), FORMATS["int8"], "awq")


DAMAGE = {
    "rows": lambda w: w._replace(packed=w.packed[:-1]),
    "words": lambda w: w._replace(packed=w.packed[:, :-1]),
    "scales": lambda w: w._replace(scale=w.scale[:, :1]),
    "dtype": lambda w: w._replace(packed=w.packed.long()),
    "integer scales": lambda w: w._replace(scale=w.scale.int()),
    "zero points": lambda w: w._replace(zero_point=w.zero_point[:-1]),
    "no zero points": lambda w: w._replace(zero_point=None),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(damage):
    format = FORMATS["int4-g32-asym"]
    weight = quantize(torch.randn(16, 64), format, "rtn")
    check(weight, format, (16, 64))
    with pytest.raises(ValueError, match="up_proj.weight.*(needs|expected|but the format)"):
        check(damage(weight), format, (16, 64), "up_proj.weight")
