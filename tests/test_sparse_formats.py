"""Sparse weights at rest: exact both ways, the bytes of the table, and nothing that could be read beyond its end."""

from itertools import product

import pytest
import torch
from close import assert_equal
from torch import Tensor

from fastllm.formats import IntFormat, QuantizedWeight, dequantize, pack_bits, unpack_bits
from fastllm.sparse_formats import (
    SCRATCH,
    SparseFormat,
    check_sparse,
    compress,
    dense_codes,
    dequantize_sparse,
    expand,
    largest,
    mask_of,
    parse_sparse,
)

KEPT = [1, 8, 13, 16, 31, 32]
PATTERNS = ["2:4", *(f"{k}:32" for k in KEPT)]
VALUES = ["int8", "int4-g64", "int4-g128", "int4-channel", "int8-g32"]
FLOATS = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(5, 64), (1, 32), (3, 288)]
N, K = 6, 128


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(format: SparseFormat, shape=(N, K), dtype=torch.float32) -> tuple[QuantizedWeight, Tensor, Tensor]:
    """(at rest, the mask, what it stands for)."""
    dense = random(*shape).to(dtype)
    mask = format.largest(random(*shape, seed=1))
    if format.values is None:
        return compress(dense, mask, dense.new_empty(shape[0], 0), format), mask, dense * mask
    codes = torch.randint(0, 2**format.bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    scale = (random(shape[0], format.groups(shape[1]), seed=3) / 8).to(dtype)
    plain = torch.where(mask, codes, torch.tensor(format.values.middle, dtype=torch.uint8))
    meant = dequantize(QuantizedWeight(pack_bits(plain, format.bits), scale), format.values, shape, dtype)
    return compress(codes, mask, scale, format), mask, meant


def columns_by_hand(index: Tensor, format: SparseFormat) -> Tensor:
    """The mask, bit by bit, as `SparseFormat` describes the words."""
    mask = torch.zeros(len(index), index.shape[1] * 32, dtype=torch.bool)
    for row, line in enumerate(index.tolist()):
        for j, word in enumerate(line):
            bits = word & 0xFFFFFFFF
            if format.quads:
                for q in range(8):
                    p0, p1 = bits >> 4 * q & 3, bits >> 4 * q + 2 & 3
                    assert p0 < p1
                    mask[row, 32 * j + 4 * q + p0] = mask[row, 32 * j + 4 * q + p1] = True
            else:
                for b in range(32):
                    mask[row, 32 * j + b] = bool(bits >> b & 1)
    return mask


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_floats_come_back_to_the_bit(pattern, shape, dtype):
    format = parse_sparse(pattern)
    stored, mask, meant = weight(format, shape, dtype)
    check_sparse(stored, format, shape)
    assert stored.packed.dtype == dtype and stored.scale.shape == (shape[0], 0) and stored.scale.dtype == dtype
    assert_equal(columns_by_hand(stored.index, format), mask)
    assert_equal(mask_of(stored, format, shape), mask)
    assert_equal(stored.packed.flatten(), meant[mask])  # row by row, in the order of columns
    assert_equal(expand(stored, format, shape), meant)
    assert_equal(dequantize_sparse(stored, format, shape, torch.float32), meant.float())
    assert_equal(expand(stored, format, shape, fill=7)[~mask], torch.full_like(meant[~mask], 7))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_integers_come_back_to_the_bit(pattern, shape, values):
    format = parse_sparse(pattern, values)
    stored, mask, meant = weight(format, shape)
    check_sparse(stored, format, shape)
    assert stored.packed.dtype == torch.int32 and stored.scale.shape == (shape[0], format.groups(shape[1]))
    assert_equal(columns_by_hand(stored.index, format), mask)
    assert_equal(dequantize_sparse(stored, format, shape, torch.float32), meant)
    codes = unpack_bits(dense_codes(stored, format, shape).packed, format.bits, shape[1])
    assert (codes[~mask] == format.values.middle).all()
    again = compress(codes, mask, stored.scale, format)
    assert all(torch.equal(a, b) for a, b in zip(again, stored, strict=True) if a is not None)


@pytest.mark.parametrize("values", [None, *VALUES])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bytes_are_those_of_the_tensors(pattern, values):
    format = parse_sparse(pattern, values)
    for shape, dtype in product(SHAPES, FLOATS):
        stored, _, _ = weight(format, shape, dtype)
        size = sum(t.nbytes for t in stored if t is not None)
        assert format.bytes(*shape, scale_bytes=dtype.itemsize) == size


@pytest.mark.parametrize(
    "name, want",
    [
        ("2:4", 1.125),
        ("16:32", 1.125),
        ("6:32", 0.5),
        ("2:4-int8", 0.625),
        ("16:32-int8", 0.625),
        ("2:4-int4-channel", 0.375),
        ("16:32-int4-channel", 0.375),
        ("16:32-int4-g128", 0.375 + 2 / 128),
        ("2:4-int4-g64", 0.375 + 2 / 64),
        ("32:32", 2.125),
    ],
)
def test_bytes_for_a_weight(name, want):
    """9, 5 and 3 bits for a weight of which half is kept, in 16, 8 and 4 bits: and scales as a dense one has."""
    assert parse_sparse(name).bytes(4096, 4096) / 4096**2 == pytest.approx(want, rel=2e-3)


def test_names():
    for pattern, values in product(PATTERNS, (None, *VALUES)):
        format = parse_sparse(pattern, values)
        assert format.pattern == pattern and parse_sparse(format.name) == format and parse_sparse(format) is format
        assert format.stored == ("sparse24" if pattern == "2:4" else "bitmap32")
    assert parse_sparse("16:32-int8") == parse_sparse("16:32", IntFormat(8)) != parse_sparse("2:4-int8")
    assert parse_sparse("2:4", "int4").name == "2:4-int4-g128" and parse_sparse("2:4") != parse_sparse("16:32")


@pytest.mark.parametrize(
    "pattern, values, message",
    [
        ("4:8", None, "unknown pattern '4:8'; known: 2:4, 16:32 or any other k:32"),
        ("2:32:4", None, "unknown pattern"),
        (" 16:32", None, "unknown pattern"),
        ("-1:32", None, "unknown pattern"),
        ("16:32-", None, "unknown pattern"),
        ("16:32-fp8", None, "unknown pattern"),
        ("0:32", None, "0 of 32: from 1 to 32"),
        ("33:32", None, "33 of 32: from 1 to 32"),
        ("16:32-int8", "int8", "names the values already; leave values='int8' out"),
        ("16:32", "fp8", "cannot be fp8-a8; use int8 or int4"),
        ("16:32", "nf4", "unknown weight format nf4"),
        ("16:32", "int4-asym", "cannot be int4-g128-asym: a 0 is kept exactly by symmetric"),
        ("16:32-int8-a8", None, "cannot be int8-a8"),
        ("2:4", "int3", "unknown weight format 'int3'"),
        ("2:4", "int4-g48", "group_size=48 is not a multiple of 32"),
    ],
)
def test_what_is_no_format(pattern, values, message):
    with pytest.raises(ValueError, match=message):
        parse_sparse(pattern, values)


def test_a_format_is_of_one_kind():
    with pytest.raises(ValueError, match="8 of 32"):
        SparseFormat(8, quads=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, m", [(2, 4), (1, 32), (16, 32), (32, 32), (0, 4), (60, 96)])
def test_the_largest_are_counted(n, m, dtype):
    """Also with ties, zeros of either sign and infinities; of equal ones those that come first."""
    scores = random(40, 96).to(dtype)
    scores[0], scores[1], scores[2], scores[3] = 0, -0.0, 1, float("inf")
    scores[4, ::2], scores[5, ::3], scores[6, 1::2] = float("inf"), -float("inf"), 0
    scores[7] = (random(96, seed=5) * 2).round().to(dtype)
    mask = largest(scores, n, m)
    assert (mask.view(40, -1, m).sum(-1) == n).all()
    for row, start in product(range(9), range(0, 96, m)):
        stretch = scores[row, start : start + m].tolist()
        best = sorted(range(m), key=lambda i, s=stretch: -s[i])[:n]  # sorting is stable
        assert mask[row, start : start + m].nonzero()[:, 0].tolist() == sorted(best)


def test_the_largest_in_many_rows_at_a_time():
    scores = random(SCRATCH // 1024 + 3, 1024)
    mask = largest(scores, 16, 32)
    assert_equal(mask[-3:], largest(scores[-3:], 16, 32))
    format = SparseFormat(16)
    stored = compress(scores, mask, scores.new_empty(len(scores), 0), format)
    assert_equal(expand(stored, format, tuple(scores.shape)), scores * mask)


def test_scores_that_cannot_be_ordered_are_refused():
    scores = random(4, 64)
    scores[2, 3] = float("nan")
    with pytest.raises(ValueError, match="some scores are NaN"):
        largest(scores, 2, 4)
    with pytest.raises(ValueError, match="rows of 66 cannot be cut into stretches of 4"):
        largest(random(4, 66), 2, 4)


@pytest.mark.parametrize("pattern", ["2:4", "16:32", "8:32"])
def test_masks_of_another_pattern_are_refused(pattern):
    format, dense = parse_sparse(pattern), random(4, 64)
    mask = format.largest(dense)
    size = "4 columns do not keep exactly 2" if pattern == "2:4" else rf"32 columns do not keep exactly {format.kept}"
    for bad in (torch.ones_like(mask), torch.zeros_like(mask), mask.roll(1, 0).logical_or(mask)):
        with pytest.raises(ValueError, match=rf"\d+ of \d+ stretches of {size}"):
            compress(dense, bad, dense.new_empty(4, 0), format)
    with pytest.raises(ValueError, match="K=48 is not a multiple of 32"):
        compress(dense[:, :48], mask[:, :48], dense.new_empty(4, 0), format)


CASES = [(p, v) for p in ("2:4", "16:32", "13:32") for v in (None, "int8", "int4-g64")]


@pytest.mark.parametrize("pattern, values", CASES)
def test_damaged_words_are_refused(pattern, values):
    format = parse_sparse(pattern, values)
    stored, _, _ = weight(format)
    check_sparse(stored, format, (N, K))
    for word in (0, -1, 1, -2, 0x7FFFFFFF, 0x11111111):
        index = stored.index.clone()
        index[3, 2] = word
        with pytest.raises(ValueError, match=rf"up_index: 1 of 24 words are none of {pattern}: it is damaged"):
            check_sparse(stored._replace(index=index), format, (N, K), "up")


@pytest.mark.parametrize("pattern, values", CASES)
def test_tensors_that_do_not_fit_are_refused(pattern, values):
    format = parse_sparse(pattern, values)
    stored, _, _ = weight(format)
    packed, scale, _, index = stored
    for change, message in (
        ({"packed": packed[1:]}, r"up_packed: .* of \[6, 128\] needs \[6, \d+\], got \[5, \d+\]"),
        ({"packed": packed[:, 1:]}, r"up_packed: .* needs \[6, \d+\]"),
        ({"packed": packed.flatten()}, r"up_packed: .* got \[\d+\]"),
        ({"index": index[:, :3]}, r"up_index: .* needs \[6, 4\], got \[6, 3\]"),
        ({"index": None}, r"up_index: .* got nothing"),
        ({"scale": scale.new_ones(6, 3)}, r"up_scale: .* got \[6, 3\]"),
        ({"index": index.long()}, "up_index is torch.int64, not torch.int32"),
        ({"packed": packed.double().int() if values is None else packed.float()}, "up_packed is torch.*, not "),
        ({"scale": scale.int()}, "up_scale is torch.int32, not a floating-point type"),
    ):
        with pytest.raises(ValueError, match=message):
            check_sparse(stored._replace(**change), format, (N, K), "up")
    with pytest.raises(ValueError, match="K=100 is not a multiple of 32"):
        check_sparse(stored, format, (N, 100))
    check_sparse(QuantizedWeight(*(None if t is None else t.to("meta") for t in stored)), format, (N, K))
