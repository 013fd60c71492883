"""GPTQ: the exact cases, the awkward ones, and what it gains on a trained model."""

from itertools import product

import pytest
import torch
from trained import observed

from fastllm.compress.gptq import gptq, inverse_factor, sweep
from fastllm.compress.statistics import Statistics, output_error
from fastllm.formats import IntFormat, dequantize, parse_format
from fastllm.quantizers import codes_and_scales, decode, quantize


def error(w, weight, format, hessian) -> float:
    """Of the output, as a share of it."""
    lost = dequantize(weight, format, tuple(w.shape), torch.float32) - w
    return float(output_error(lost, hessian).sum() / output_error(w, hessian).sum())


def statistics(x) -> Statistics:
    seen = Statistics(x.shape[1])
    seen.add(x)
    return seen


@pytest.mark.parametrize("name", ["int4-g64", "int4-g64-asym"])
def test_it_loses_less_than_half_of_what_rounding_loses(name):
    format, errors = parse_format(name), {"rtn": [], "hqq": [], "gptq": [], "in order": []}
    for w, seen in observed().values():
        ways = {
            "rtn": quantize(w, format, "rtn"),
            "hqq": quantize(w, format, "hqq"),
            "gptq": gptq(w, seen.hessian, format, torch.float32)[0],
            "in order": gptq(w, seen.hessian, format, torch.float32, act_order=False)[0],
        }
        for way, weight in ways.items():
            errors[way].append(error(w, weight, format, seen.hessian))
    assert len(errors["rtn"]) == 28
    mean = {way: sum(found) / 28 for way, found in errors.items()}
    assert mean["gptq"] <= 0.45 * mean["rtn"] and mean["hqq"] <= 0.95 * mean["rtn"]
    assert mean["gptq"] <= mean["in order"] <= 0.6 * mean["rtn"]
    assert all(a < b for a, b in zip(errors["gptq"], errors["rtn"], strict=True))


def three_bits(w, hessian, way):
    """w rounded to 3 bits in groups of 64, symmetric."""
    grouped = w.unflatten(1, (-1, 64))
    scale, zero = grouped.abs().amax(-1) / 3, torch.full(grouped.shape[:2], 4.0)
    if way == "rtn":
        codes = (grouped / scale[..., None] + 4).round().clamp(0, 7).flatten(1)
    else:
        order = hessian.diagonal().argsort(descending=True)
        factor = inverse_factor(hessian, order)
        codes = torch.empty_like(w)
        codes[:, order] = sweep(w[:, order], factor, scale, zero, (torch.arange(w.shape[1]) // 64)[order], 7).float()
    return decode(codes, scale, zero, 64)


def test_three_bits():
    ratios = []
    for w, seen in list(observed().values())[:7]:
        lost = [
            float(output_error(three_bits(w, seen.hessian, way) - w, seen.hessian).sum()) for way in ("gptq", "rtn")
        ]
        ratios.append(lost[0] / lost[1])
    assert sum(ratios) / len(ratios) <= 0.45


def test_it_is_near_the_best_of_all_roundings():
    """A row of six weights of 2 bits has 4096 roundings."""
    generator = torch.Generator().manual_seed(5)
    ratios = []
    for _ in range(8):
        w, x = torch.randn(4, 6, generator=generator), torch.randn(64, 6, generator=generator)
        x = x @ torch.randn(6, 6, generator=generator)
        seen = statistics(x)
        scale, zero = (w.amax(1) - w.amin(1))[:, None] / 3, (-w.amin(1) / (w.amax(1) - w.amin(1)) * 3).round()[:, None]
        group = torch.zeros(6, dtype=torch.int64)
        order = seen.hessian.diagonal().argsort(descending=True)
        codes = torch.empty(4, 6)
        factor = inverse_factor(seen.hessian, order)
        codes[:, order] = sweep(w[:, order], factor, scale, zero, group, 3).float()
        all_codes = torch.tensor(list(product(range(4), repeat=6))).float()
        for row in range(4):
            every = (all_codes - zero[row]) * scale[row] - w[row]
            best = output_error(every, seen.hessian).min()
            ratios.append(
                float(output_error((codes[row] - zero[row])[None] * scale[row] - w[row], seen.hessian) / best)
            )
    assert min(ratios) >= 1 - 1e-4 and sorted(ratios)[len(ratios) // 2] <= 1.1


def test_blocks_change_nothing():
    w, seen = next(iter(observed().values()))
    factor = inverse_factor(seen.hessian.double(), torch.arange(w.shape[1]))
    codes, scale, zero = codes_and_scales(w, IntFormat(4, 64), "rtn", torch.float32)
    group = torch.arange(w.shape[1]) // 64
    found = [sweep(w.double(), factor, scale, zero, group, 15, block) for block in (1, 32, 128)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and not torch.equal(found[0], codes)


def awkward(which):
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(1))
    if which == "dead columns":
        x[:, 5::7] = 0
    elif which == "few rows":
        x = x[:8]
    elif which == "the same row":
        x = x[:1].expand(512, -1)
    elif which == "one column":
        x[:, 1:] = 0
    elif which == "all dead":
        x = x * 0
    elif which == "tiny":
        x = x * 1e-18
    elif which == "huge":
        x = x * 1e12
    return x


@pytest.mark.parametrize(
    "which", ["dead columns", "few rows", "the same row", "one column", "all dead", "tiny", "huge"]
)
@pytest.mark.parametrize("name", ["int4-g32", "int4-g128-asym", "int4-channel", "int8"])
def test_singular_inputs(which, name):
    format, w = parse_format(name), torch.randn(48, 128, generator=torch.Generator().manual_seed(2))
    hessian = statistics(awkward(which)).hessian
    weight, why = gptq(w, hessian, format, torch.float32, method="rtn")
    plain = quantize(w, format, "rtn")
    lost = [output_error(dequantize(q, format, (48, 128), torch.float32) - w, hessian).sum() for q in (weight, plain)]
    assert lost[0] <= 1.01 * lost[1]
    assert (why != "") == (which == "all dead")
    if why:
        assert torch.equal(weight.packed, plain.packed)


def test_infinite_inputs_are_refused():
    x = torch.zeros(4, 64)
    x[1, 3] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        gptq(torch.randn(8, 64), statistics(x).hessian, IntFormat(4, 32), torch.float32)


def test_statistics_are_those_of_all_rows():
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    seen = statistics(x[0].float())
    seen.add(x[1:].float())
    rows = x.flatten(0, 1)
    assert seen.count == 15
    torch.testing.assert_close(seen.hessian.double(), rows.t() @ rows / 15, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.mean.double(), rows.abs().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.largest.double(), rows.abs().amax(0), rtol=1e-6, atol=0)
    scale = torch.rand(16) + 0.5
    seen.divide(scale)
    other = statistics((rows / scale).float())
    torch.testing.assert_close(seen.hessian, other.hessian, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.largest, other.largest, rtol=1e-5, atol=1e-6)
