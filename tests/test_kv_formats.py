"""Formats of quantized keys and values: errors of half a step, whatever the numbers, and codes where they belong."""

import re

import numpy as np
import pytest
import torch
from close import assert_equal
from test_unpack import REGISTER, floats, fma_bf16x2, lop3, prmt
from torch import Tensor

from fastllm.kernels import kv_load
from fastllm.kv_formats import GROUP, HALF_MAX, KV_FORMATS

INT8, INT4 = KV_FORMATS["int8"], KV_FORMATS["int4"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each = pytest.mark.parametrize("format", KV_FORMATS.values(), ids=KV_FORMATS)


def rows(D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of sizes far apart, one of them with an outlier."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, D) * torch.tensor([1e-2, 1.0, 30.0, 1.0, 5.0])[:, None]
    x[..., 3, 7] = 100.0
    return x.to(dtype)


def steps_of(x: Tensor, name: str) -> Tensor:
    """What a code more is worth, for each number, before anything is rounded."""
    if name == "int8":
        return (x.double().abs().amax(-1, keepdim=True) / 127).expand(x.shape)
    groups = x.double().unflatten(-1, (-1, GROUP))
    return ((groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15).expand(groups.shape).flatten(-2)


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_errors_are_half_a_step_at_most(format, dtype: torch.dtype, D: int) -> None:
    x = rows(D, dtype)
    codes, scale = format.quantize(x)
    assert codes.shape == (*x.shape[:-1], format.width(D)) and codes.dtype == format.dtype
    assert scale.shape == (*x.shape[:-1], *format.scale_shape(D)) and scale.dtype == format.scale_dtype
    got = format.dequantize(codes, scale, torch.float64)
    # scales and zeros of int4 are rounded to float16: 15 steps, and the zero, to one part in 2048
    slack = 0.0 if format is INT8 else 15 * 2.0**-11 * steps_of(x, "int4") + 2.0**-11 * x.double().abs()
    error, step = (got - x.double()).abs(), steps_of(x, format.name)
    assert (error <= step * 0.5001 + slack).all()
    assert error.max() > 0.4 * step.min()  # and something was rounded


@each
def test_dequantized_numbers_are_stored_as_they_are(format) -> None:
    """Up to what the scale itself loses: codes do not move."""
    codes, scale = format.quantize(rows(128))
    again, _ = format.quantize(format.dequantize(codes, scale, torch.float32))
    assert (unpacked(again, format) - unpacked(codes, format)).abs().max() <= (0 if format is INT8 else 1)


def unpacked(codes: Tensor, format) -> Tensor:
    return codes.int() if format is INT8 else torch.cat((codes & 15, codes >> 4), -1).int()


def test_int8_by_hand() -> None:
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, -0.5, 0.0], [0.0] * 6])
    codes, scale = INT8.quantize(x)
    assert codes.tolist() == [[127, -127, 0, 2, 0, 0], [0] * 6] and scale.tolist() == [1.0, 0.0]
    assert_equal(INT8.dequantize(codes, scale, torch.float16)[0], torch.tensor([127, -127, 0, 2, 0, 0]).half())


def test_int4_by_hand() -> None:
    """Byte d holds code d below code d + D / 2; scales, then zeros."""
    x = torch.cat((torch.arange(32) % 16, 2.0 * (torch.arange(32) % 16) - 8))
    codes, scale = INT4.quantize(x[None])
    assert scale.tolist() == [[[1.0, 2.0], [0.0, -8.0]]]
    assert codes.tolist() == [[d % 16 * 17 for d in range(32)]]
    assert_equal(INT4.dequantize(codes, scale, torch.float32)[0], x)
    only = torch.zeros_like(codes)
    only[0, 5] = 3 << 4
    assert INT4.dequantize(only, torch.ones(1, 2, 2).half(), torch.float32)[0].nonzero().numel() == 64
    difference = INT4.dequantize(only, torch.ones(1, 2, 2).half(), torch.float32)[0] - 1
    assert difference.nonzero().tolist() == [[32 + 5]] and difference[37] == 3


@each
def test_zeros_and_constants_are_exact(format) -> None:
    for value in (0.0, 1.5, -0.25, 1024.0):
        x = torch.full((2, 3, 64), value)
        codes, scale = format.quantize(x)
        assert_equal(format.dequantize(codes, scale, torch.float32), x)
    codes, scale = format.quantize(torch.zeros(1, 64))
    assert not codes.any() and not scale.any()


@each
def test_extremes(format) -> None:
    """int8 has the range of float32; the scales of int4 that of float16, where numbers are clamped."""
    x = rows(64) * 1e6
    codes, scale = format.quantize(x)
    got = format.dequantize(codes, scale, torch.float64)
    assert got.isfinite().all()
    if format is INT8:
        assert ((got - x.double()).abs() <= 0.5001 * steps_of(x, "int8")).all()
    else:
        inside = x.abs() <= HALF_MAX
        assert (got.abs() <= 16 * HALF_MAX).all() and inside.any()
    tiny = torch.full((1, 64), 1e-30)
    tiny[0, 0] = -1e-30
    codes, scale = format.quantize(tiny)
    limit = 1e-32 if format is INT8 else 2e-30  # below float16: 0
    assert (format.dequantize(codes, scale, torch.float64) - tiny).abs().max() <= limit


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    """A NaN shows in the scale of int8 and in the zero of int4; an infinity in int8's scale, and int4 clamps it."""
    x = rows(64)
    for format in KV_FORMATS.values():
        clean_codes, clean_scale = format.quantize(x)
        worse = x.clone()
        worse[1, 2, 0, 5] = value
        codes, scale = format.quantize(worse)
        other = torch.ones(2, 3, 5, dtype=torch.bool)
        other[1, 2, 0] = False
        assert codes[other].equal(clean_codes[other]) and scale[other].equal(clean_scale[other])
        got = format.dequantize(codes, scale, torch.float32)
        assert got[other].isfinite().all()
        if value != value or format is INT8:
            assert not scale[1, 2, 0].isfinite().all() and not got[1, 2, 0].isfinite().all()


@pytest.mark.parametrize("D, fits", [(32, False), (64, True), (72, False), (96, False), (128, True), (192, True)])
def test_which_heads_can_be_stored(D: int, fits: bool) -> None:
    assert INT8.reasons(D) == [] and (INT4.reasons(D) == []) == fits
    if not fits:
        assert f"heads of {D} are not a multiple of 64" in INT4.reasons(D)[0]


@each
def test_rows_do_not_depend_on_each_other(format) -> None:
    x = rows(128)
    codes, scale = format.quantize(x)
    one, own = format.quantize(x[1, 2, 3])
    assert_equal(codes[1, 2, 3], one)
    assert_equal(scale[1, 2, 3], own)


# --- the PTX that takes codes apart, executed on every value that a register can hold


def executed(ptx: str, outputs: int) -> list[np.ndarray]:
    """The output registers of straight-line PTX whose last operand holds REGISTER."""
    registers = {f"${outputs}": REGISTER}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(REGISTER, int(name, 0))

    def sub_f16x2(a: str, b: str) -> np.ndarray:
        less = floats(value(a), torch.float16) - floats(value(b), torch.float16)
        return less.half().view(torch.int16).numpy().reshape(-1).view(np.uint32)

    steps = {
        "lop3.b32": lambda a, b, c, table: lop3(value(a), value(b), value(c), int(table, 0)),
        "prmt.b32": lambda a, b, selector: prmt(value(a), value(b), int(selector, 0)),
        "and.b32": lambda a, b: value(a) & value(b),
        "xor.b32": lambda a, b: value(a) ^ value(b),
        "shr.u32": lambda a, by: value(a) >> np.uint32(int(by)),
        "mov.b32": value,
        "sub.rn.f16x2": sub_f16x2,
        "fma.rn.bf16x2": lambda a, b, c: fma_bf16x2(value(a), value(b), value(c)),
    }
    for line in filter(None, (part.strip() for part in re.sub(r"[{}]|\.reg[^;]*;", "", ptx).split(";"))):
        name, operands = line.split(None, 1)
        target, *others = (operand.strip() for operand in operands.split(","))
        registers[target] = steps[name](*others)
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("dtype, name", [(torch.float16, "_INT8_FP16"), (torch.bfloat16, "_INT8_BF16")])
def test_every_code_of_int8(dtype: torch.dtype, name: str) -> None:
    halves = torch.from_numpy(REGISTER.view(np.int16).astype(np.int64)).view(-1, 2)
    for i, part in enumerate(executed(getattr(kv_load, name).value, 2)):
        signed = (halves >> 8 * i & 255).to(torch.int8)  # two's complement
        assert torch.equal(floats(part, dtype), signed.double())


def test_every_code_of_int4() -> None:
    halves = torch.from_numpy(REGISTER.view(np.uint16).astype(np.int64)).view(-1, 2)
    for i, part in enumerate(executed(kv_load._INT4_FP16.value, 4)):
        size = kv_load.HIGH.value if i % 2 else kv_load.LOW.value
        assert torch.equal(floats(part, torch.float16) * size, (halves >> 4 * i & 15).double())


def test_a_wrong_constant_is_seen() -> None:
    wrong = kv_load._INT8_FP16.value.replace("0x4341", "0x4340")
    good, bad = (executed(ptx, 2) for ptx in (kv_load._INT8_FP16.value, wrong))
    assert [bool((a == b).all()) for a, b in zip(good, bad, strict=True)] == [True, False]
