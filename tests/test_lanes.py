"""Sparse weights side by side: the way there and back to the bit, what is refused, and the op that reads them."""

from collections.abc import Callable

import pytest
import torch
from close import BOUNDS, assert_close, assert_equal
from torch import Tensor

from fastllm.formats import QuantizedWeight
from fastllm.ops import lanes
from fastllm.ops.lanes import CROSSOVER, LANES, Lanes
from fastllm.ops.layout import Prepared, choose
from fastllm.ops.sparse_matmul import SPARSE_LAYOUTS, sparse_matmul
from fastllm.sparse_formats import SparseFormat, compress, dequantize_sparse, mask_of, parse_sparse

DTYPES = (torch.float16, torch.float32, torch.bfloat16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def make(name: str, N: int, K: int, dtype: torch.dtype, device: str = "cpu") -> tuple[QuantizedWeight, SparseFormat]:
    format = parse_sparse(name)
    mask = format.largest(torch.rand(N, K, device=device))
    if format.values:
        values: Tensor = torch.randint(0, 256, (N, K), dtype=torch.uint8, device=device)
        return compress(values, mask, torch.rand(N, 1, device=device).to(dtype) / 99, format), format
    values = torch.randn(N, K, device=device).to(dtype)
    return compress(values, mask, values.new_empty(N, 0), format), format


def assert_same(got: QuantizedWeight, want: QuantizedWeight) -> None:
    assert got.packed.dtype == want.packed.dtype and got.zero_point is None
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[want.packed.element_size()]
    assert_equal(got.packed.view(as_bits), want.packed.view(as_bits))
    assert_equal(got.index, want.index)
    assert got.scale is want.scale


@pytest.mark.parametrize("values", ["", "-int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_to_the_bit(values: str, dtype: torch.dtype) -> None:
    for i, k in enumerate((*range(1, 33, 3), "2:4")):
        name = (k if isinstance(k, str) else f"{k}:32") + values
        shape = ((1, 32), (32, 96), (33, 64), (95, 160))[i % 4]
        weight, format = make(name, *shape, dtype)
        p = Lanes().pack(weight, format, shape)
        bits = 8 if values else 8 * dtype.itemsize
        tiles, words = -(-shape[0] // LANES), -(-format.kept * bits // 32)
        assert p.w.shape == (tiles, shape[1] // 32, words, LANES) and p.zero.shape == (tiles, shape[1] // 32, LANES)
        assert p.w.dtype == p.zero.dtype == torch.int32 and p.w.is_contiguous() and p.zero.is_contiguous()
        before = p.w.clone()
        assert_same(Lanes().rest(p, format, shape), weight)
        assert_equal(p.w, before)
        assert_equal(SPARSE_LAYOUTS["rest"].pack(weight, format, shape).w.float(), weight.packed.float())


def test_every_bit_pattern_survives() -> None:
    """NaN with any payload, infinities, negative zeros: what is moved are bits."""
    format = parse_sparse("16:32")
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    weight, _ = make("16:32", 64, 2048, torch.float16)
    for dtype in (torch.float16, torch.bfloat16):
        odd = weight._replace(packed=patterns.view(dtype).view(64, 1024), scale=torch.empty(64, 0, dtype=dtype))
        assert_same(Lanes().rest(Lanes().pack(odd, format, (64, 2048)), format, (64, 2048)), odd)


def test_where_a_value_lies() -> None:
    """The definition of the layout, one value at a time."""
    for name, dtype in (("7:32", torch.float16), ("2:4", torch.float32), ("5:32-int8", torch.float16)):
        weight, format = make(name, 40, 96, dtype)
        p = Lanes().pack(weight, format, (40, 96))
        size, kind = (1, torch.uint8) if format.values else (dtype.itemsize, dtype)
        flat = weight.packed.view(kind) if format.values else weight.packed
        for n, block, j in ((0, 0, 0), (31, 2, 4), (32, 1, 3), (39, 2, format.kept - 1)):
            lane = p.w[n // 32, block, :, n % 32].contiguous().view(kind)
            assert lane[j] == flat[n, block * format.kept + j], (name, n, block, j)
            assert p.zero[n // 32, block, n % 32] == weight.index[n, block]
            assert not lane[format.kept :].count_nonzero() and len(lane) - format.kept < 4 // size
        assert not p.w[1, :, :, 8:].count_nonzero() and not p.zero[1, :, 8:].count_nonzero()


@pytest.mark.parametrize("name", ["12:32", "2:4-int8"])
def test_a_few_tiles_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, format = make(name, 150, 64, torch.bfloat16)
    whole = Lanes().pack(weight, format, (150, 64))
    monkeypatch.setattr(lanes, "MOVED", 2 * 32 * 64)
    p = Lanes().pack(weight, format, (150, 64))
    assert_equal(p.w, whole.w)
    assert_equal(p.zero, whole.zero)
    assert_same(Lanes().rest(p, format, (150, 64)), weight)


def one_wrong(index: Tensor, quads: bool) -> Tensor:
    """Another number of bits, or one place twice."""
    index = index.clone()
    index[3, 1] = index[3, 1] & ~0xF0 if quads else index[3, 1] ^ 1 << 5
    return index


@pytest.mark.parametrize("name", ["16:32", "2:4", "9:32-int8"])
def test_damage_is_refused(name: str) -> None:
    weight, format = make(name, 33, 96, torch.float16)
    assert weight.index is not None
    for wrong, message in (
        (
            weight._replace(index=one_wrong(weight.index, format.quads)),
            "index: 1 of 99 words are none of .* it is damaged",
        ),
        (weight._replace(index=torch.zeros_like(weight.index)), "it is damaged"),
        (weight._replace(index=weight.index[:, :2]), r"index: .* needs \[33, 3\], got \[33, 2\]"),
        (weight._replace(index=weight.index.long()), "index is torch.int64"),
        (weight._replace(index=None), "got nothing"),
        (weight._replace(packed=weight.packed[:, 1:]), "packed: "),
        (weight._replace(packed=weight.packed[:32]), "packed: "),
        (weight._replace(scale=weight.scale[1:]), "scale: "),
    ):
        with pytest.raises(ValueError, match=message):
            Lanes().pack(wrong, format, (33, 96))


def test_what_it_cannot_hold_and_why() -> None:
    found = Lanes().reasons(parse_sparse("16:32"), 64, 64, torch.float16, CPU)
    assert found == ["it runs on a CUDA device, not on cpu"]
    assert not Lanes().reasons(parse_sparse("2:4-int8"), 64, 64, torch.bfloat16, CUDA)
    for values in ("int4", "int4-g64", "int8-g128"):
        (why,) = Lanes().reasons(parse_sparse("16:32", values), 64, 256, torch.float16, CUDA)
        assert why.startswith("it multiplies floats and int8 with one scale per channel, not ") and values[:4] in why
    weight, format = make("16:32", 32, 128, torch.float16)
    with pytest.raises(ValueError):
        Lanes().pack(weight, parse_sparse("16:32", "int4"), (32, 128))
    chosen, refused = choose(SPARSE_LAYOUTS, format, 32, 128, torch.float16, CPU)
    assert chosen.name == "rest" and list(refused) == ["lanes"] and chosen.slow
    with pytest.raises(ValueError, match="was not told the format"):
        Lanes().dense(Lanes().pack(weight, format, (32, 128)), 0, 0, slice(0, 32), 128, torch.float16)
    with pytest.raises(NotImplementedError, match="rest"):
        Lanes().unpack(weight.packed, format, (32, 128))


# --- the op


def operands(name: str, layout: str, N: int, K: int, dtype: torch.dtype, device: str) -> tuple[Prepared, Tensor]:
    """Prepared, and the dense weight in float64."""
    weight, format = make(name, N, K, dtype, device)
    return SPARSE_LAYOUTS[layout].pack(weight, format, (N, K)), dequantize_sparse(
        weight, format, (N, K), torch.float64
    )


def bounds(dtype: torch.dtype) -> tuple[float, float]:
    """Twice those of one rounding: a CPU rounds the weights, and the sum before the bias."""
    return 2 * BOUNDS[dtype].worst, 2 * BOUNDS[dtype].rms


@pytest.mark.parametrize("layout", SPARSE_LAYOUTS)
@pytest.mark.parametrize("name", ["16:32", "2:4", "8:32-int8", "2:4-int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_is_the_product(layout: str, name: str, dtype: torch.dtype, device: str) -> None:
    p, dense = operands(name, layout, 70, 96, dtype, device)
    bias = torch.randn(70, device=device).to(dtype)
    for shape in ((1,), (3,), (2, 5), (CROSSOVER,), (0,)):
        x = torch.randn(*shape, 96, device=device).to(dtype)
        for given in (bias, None):
            y = sparse_matmul(x, p.w, p.scale, p.zero, given, 70, name, layout)
            want = x.double() @ dense.T + (0 if given is None else given.double())
            assert_close(y, want, *bounds(dtype), dtype=dtype)


@pytest.mark.parametrize("layout", SPARSE_LAYOUTS)
def test_rows_are_invariant_if_asked(layout: str, device: str) -> None:
    p, _ = operands("16:32", layout, 70, 96, torch.float32, device)
    x = torch.randn(CROSSOVER + 2, 96, device=device)
    whole = sparse_matmul(x, p.w, p.scale, p.zero, None, 70, "16:32", layout, True)
    for i in (0, CROSSOVER + 1):
        assert_equal(
            sparse_matmul(x[i : i + 1], p.w, p.scale, p.zero, None, 70, "16:32", layout, True), whole[i, None]
        )


@pytest.mark.parametrize("layout", SPARSE_LAYOUTS)
@pytest.mark.parametrize("name", ["16:32", "2:4-int8"])
def test_gradients(layout: str, name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes.SparseLayout, "step", lambda self, K: 32)  # several chunks
    p, dense = operands(name, layout, 70, 96, torch.float32, device)
    x, bias = torch.randn(2, 3, 96, device=device), torch.randn(70, device=device)
    x.requires_grad_(), bias.requires_grad_()
    grad = torch.randn(2, 3, 70, device=device)
    sparse_matmul(x, p.w, p.scale, p.zero, bias, 70, name, layout).backward(grad)
    assert_close(x.grad, grad.double() @ dense, dtype=torch.float32)
    assert_close(bias.grad, grad.double().sum((0, 1)), dtype=torch.float32)


@pytest.mark.parametrize("layout", SPARSE_LAYOUTS)
def test_the_op_is_well_defined(layout: str, device: str) -> None:
    p, _ = operands("16:32", layout, 40, 64, torch.float32, device)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    torch.library.opcheck(
        torch.ops.fastllm.sparse_matmul.default, (x, p.w, p.scale, p.zero, None, 40, "16:32", layout)
    )


def test_chunks_of_a_large_product(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Rows that are expanded a few at a time."""
    p, dense = operands("12:32", "lanes", 100, 64, torch.float32, device)
    asked: list[slice] = []
    inner: Callable = Lanes.dense
    monkeypatch.setattr(Lanes, "step", lambda self, K: 64)
    monkeypatch.setattr(Lanes, "dense", lambda self, *args: (asked.append(args[3]), inner(self, *args))[1])
    x = torch.randn(40, 64, device=device)
    assert_close(sparse_matmul(x, p.w, p.scale, p.zero, None, 100, "12:32", "lanes"), x.double() @ dense.T,
                 dtype=torch.float32)  # fmt: skip
    assert asked == [slice(0, 64), slice(64, 100)]


def test_the_mask_is_what_is_kept() -> None:
    weight, format = make("2:4", 40, 64, torch.float16)
    back = Lanes().rest(Lanes().pack(weight, format, (40, 64)), format, (40, 64))
    assert torch.equal(mask_of(back, format, (40, 64)), mask_of(weight, format, (40, 64)))
