"""Norms of rows, with and without the sum before them: the operators on this machine, and the kernel, interpreted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_close, assert_equal
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastllm.kernels.norm import LARGEST_D, config, norm
from fastllm.ops.norm import layer, layer_norm, norm_add, norm_add_norm, rms, rms_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 640), (1, 1, 8), (3, 5, 128), (2, 1000), (17, 96), (5, 2050), (33, 7), (4, 1), (300, 64), (2, 4, 40, 64)]


def by_kernel(x: Tensor, weight: Any, eps: float, *, residual: Any = None, cast_first: bool = False) -> Any:
    y, total = norm(x, residual, None, weight, None, None, eps, False, cast_first)
    return y if residual is None else (y, total)


def layer_by_kernel(x: Tensor, weight: Any, bias: Any, eps: float, *, residual: Any = None) -> Any:
    y, total = norm(x, residual, None, weight, bias, None, eps, True)
    return y if residual is None else (y, total)


RMS: dict[str, Callable] = {"op": rms_norm, "kernel": by_kernel}
LAYER: dict[str, Callable] = {"op": layer_norm, "kernel": layer_by_kernel}


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x with rows of very different sizes, a residual, a weight in float32 that its dtype can hold."""
    x = torch.randn(shape, device=device) * torch.logspace(-1, 1, shape[-2], device=device)[:, None]
    weight = torch.rand(shape[-1], device=device) + 0.5
    return x.to(dtype), torch.randn(shape, device=device).to(dtype), weight.to(dtype).float()


@pytest.mark.parametrize("i, shape", list(enumerate(SHAPES)))
@pytest.mark.parametrize("name", RMS)
def test_rms_norm(name: str, i: int, shape: tuple[int, ...], device: str) -> None:
    dtype, run = DTYPES[i % 3], RMS[name]
    x, residual, weight = problem(shape, dtype, device)
    for w, cast_first in ((weight, False), (weight.to(dtype), True), (None, False), (weight, True)):
        w64 = None if w is None else w.double()
        assert_close(run(x, w, 1e-5, cast_first=cast_first), rms(x.double(), w64, 1e-5, False), dtype=dtype)
        y, total = run(x, w, 1e-5, residual=residual, cast_first=cast_first)
        assert_equal(total, x + residual)
        assert_close(y, rms((x + residual).double(), w64, 1e-5, False), dtype=dtype)


@pytest.mark.parametrize("i, shape", list(enumerate(SHAPES)))
@pytest.mark.parametrize("name", LAYER)
def test_layer_norm(name: str, i: int, shape: tuple[int, ...], device: str) -> None:
    dtype, run = DTYPES[i % 3], LAYER[name]
    x, residual, weight = problem(shape, dtype, device)
    for w, b in ((weight.to(dtype), residual[..., 0, :].reshape(-1, shape[-1])[0].clone()), (None, None)):
        w64, b64 = (None, None) if w is None else (w.double(), b.double())
        assert_close(run(x, w, b, 1e-5), layer(x.double(), w64, b64, 1e-5), dtype=dtype)
        y, total = run(x, w, b, 1e-5, residual=residual)
        assert_equal(total, x + residual)
        assert_close(y, layer((x + residual).double(), w64, b64, 1e-5), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast_first", [False, True])
@pytest.mark.parametrize("name", RMS)
def test_norms_on_both_sides_of_a_sum(name: str, cast_first: bool, dtype: torch.dtype, device: str) -> None:
    for shape in ((1, 640), (3, 4, 100)):
        x, residual, a = problem(shape, dtype, device)
        b = a.flip(0)
        if name == "op":
            y, total = norm_add_norm(x, residual, a, b, 1e-6, 1e-3, cast_first)
            alone = norm_add(x, residual, a, 1e-6, cast_first)
        else:
            y, total = norm(x, residual, a, b, None, 1e-6, 1e-3, False, cast_first)
            nothing, alone = norm(x, residual, a, None, None, 1e-6, None, False, cast_first)
            assert nothing is None
        assert_equal(alone, total)
        assert_close(total, rms(x.double(), a.double(), 1e-6, False) + residual.double(), dtype=dtype)
        assert_close(y, rms(total.double(), b.double(), 1e-3, False), dtype=dtype)


@pytest.mark.parametrize("name", RMS)
def test_rounds_where_the_definition_does(name: str, device: str) -> None:
    """To the bit, but for the few numbers that a last bit of the sum of squares pushes over an edge."""
    x, _, weight = problem((16, 512), torch.bfloat16, device)
    for cast_first in (False, True):
        w = weight.to(torch.bfloat16) if cast_first else weight
        same = RMS[name](x, w, 1e-6, cast_first=cast_first) == rms(x, w, 1e-6, cast_first)
        assert same.float().mean() > 0.995
    other = rms(x, weight, 1e-6, True) == rms(x, weight, 1e-6, False)
    assert other.float().mean() < 0.9  # so the comparison tells the two apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RMS)
def test_agrees_with_transformers(name: str, dtype: torch.dtype, device: str) -> None:
    for rows in (1, 5):
        x, _, weight = problem((1, rows, 256), dtype, device)
        llama, gemma = LlamaRMSNorm(256, 1e-6).to(device, dtype), Gemma3RMSNorm(256, 1e-6).to(device, dtype)
        llama.weight.data, gemma.weight.data = weight.to(dtype), (weight - 1).to(dtype)
        with torch.no_grad():
            w = 1 + gemma.weight.float()
            pairs = [
                (RMS[name](x, llama.weight.data, 1e-6, cast_first=True), llama(x)),
                (RMS[name](x, w, 1e-6), gemma(x)),
            ]
        for got, want in pairs:
            assert (got == want).float().mean() > (0.99 if dtype == torch.bfloat16 else 0.3)
            assert_close(got, want.double(), dtype=dtype)


@pytest.mark.parametrize("name", RMS)
def test_strides(name: str, device: str) -> None:
    x, residual, weight = problem((6, 4, 96), torch.float16, device)
    wide = torch.cat((x + 1, x, x + 2), -1)[..., 96:192]
    inner = x.transpose(0, 1).contiguous().transpose(0, 1)
    column = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not wide.is_contiguous() and not inner.is_contiguous() and column.stride(-1) == 4
    want = rms(x.double(), weight.double(), 1e-6, False)
    for view in (wide, inner, column, x[:, :1].expand(-1, 4, -1)):
        expected = rms(view.double(), weight.double(), 1e-6, False)
        assert_close(RMS[name](view, weight, 1e-6), expected, dtype=torch.float16)
    for view in (wide, inner, column):
        y, total = RMS[name](residual, weight, 1e-6, residual=view)
        assert_equal(total, residual + x)
    assert_close(RMS[name](wide[2:3, 1:2], weight, 1e-6), want[2:3, 1:2], dtype=torch.float16)


@pytest.mark.parametrize("name", RMS)
def test_operands_stay_as_they_are(name: str, device: str) -> None:
    for rows in (1, 3, 200):
        x, residual, weight = problem((rows, 64), torch.float32, device)
        before = [t.clone() for t in (x, residual, weight)]
        RMS[name](x, weight, 1e-6, residual=residual)
        RMS[name](x, weight, 1e-6, cast_first=True)
        RMS[name](x, None, 1e-6)
        for t, old in zip((x, residual, weight), before, strict=True):
            assert_equal(t, old)


@pytest.mark.parametrize("name", RMS)
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_nothing_to_do(name: str, shape: tuple[int, ...], device: str) -> None:
    x = torch.ones(shape, device=device)
    y, total = RMS[name](x, torch.ones(64, device=device), 1e-6, residual=x)
    assert y.shape == total.shape == shape


@pytest.mark.parametrize("name", RMS)
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_of_zeros_and_of_nan(name: str, rows: int, device: str) -> None:
    x = torch.zeros(rows, 64, device=device)
    assert_equal(RMS[name](x, None, 1e-6), x)
    x[-1, 3] = float("nan")
    y = RMS[name](x, None, 1e-6)
    assert y[-1].isnan().all() and not y[:-1].isnan().any()
    assert RMS[name](torch.full((rows, 64), 1e30, device=device), None, 1e-6).abs().max() < 1.1  # inf squares give 0


BAD = {
    "eps must be positive": lambda x: rms_norm(x, None, 0.0),
    r"weights and bias must be \[8\]": lambda x: rms_norm(x, x.new_ones(1), 1e-6),
    r"residual must be torch.float32 \[3, 8\]": lambda x: rms_norm(x, None, 1e-6, residual=x[:1]),
    "got torch.float16": lambda x: norm_add(x, x.half(), None, 1e-6),
    "weight_b must be a contiguous": lambda x: norm(x, None, None, x.new_ones(16)[::2], None, None, 1e-6),
    "x must be float16": lambda x: norm(x.double(), None, None, None, None, None, 1e-6),
    f"at most {LARGEST_D}": lambda x: norm(x.new_ones(1, LARGEST_D + 1), None, None, None, None, None, 1e-6),
    "residual must be": lambda x: norm(x, x[:1], None, None, None, None, 1e-6),
    "is on meta": lambda x: norm(x, None, None, torch.ones(8, device="meta"), None, None, 1e-6),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused(message: str, device: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message](torch.ones(3, 8, device=device))


def test_float64_stays_float64() -> None:
    x = torch.randn(3, 50, dtype=torch.float64)
    assert_close(rms_norm(x, None, 1e-6), rms(x, None, 1e-6, False), 1e-12, 1e-12)


def test_tiles() -> None:
    for rows in (1, 2, 16):
        for D in (1, 64, 640, 4096, 16384, LARGEST_D):
            tile = config(rows, D)
            assert tile.BLOCK_D >= D and tile.BLOCK_M <= rows and 1 <= tile.num_warps <= 32
            assert tile.BLOCK_M * tile.BLOCK_D <= 1024 * 32 * tile.num_warps // 16  # numbers a thread holds


CALLS: dict[str, Callable] = {
    "rms_norm": lambda x, r, w: rms_norm(x, w, 1e-6),
    "add_rms_norm": lambda x, r, w: rms_norm(x, w, 1e-6, residual=r, cast_first=True),
    "norm_add_norm": lambda x, r, w: norm_add_norm(x, r, w, w, 1e-6, 1e-6),
    "norm_add": lambda x, r, w: norm_add(x, r, w, 1e-6),
    "layer_norm": lambda x, r, w: layer_norm(x, w, w, 1e-6),
    "add_layer_norm": lambda x, r, w: layer_norm(x, w, None, 1e-6, residual=r),
}


def flat(y: Any) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole_and_differentiates(name: str, device: str, opaque: None) -> None:
    call, seen = CALLS[name], []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, residual, weight = problem((4, 3, 96), torch.float32, device)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    with torch.no_grad():
        for got, want in zip(flat(compiled(x, residual, weight)), flat(call(x, residual, weight)), strict=True):
            assert_equal(got, want)
    assert f"fastllm.{name}" in " ".join(seen)
    whole = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    found = []
    for run in (whole, call):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        sum(part.sin().sum() for part in flat(run(*leaves))).backward()
        found.append([leaf.grad for leaf in leaves])
    exact = [t.double().requires_grad_() for t in (x, residual, weight)]
    sum(part.sin().sum() for part in flat(call(*exact))).backward()  # the definition, as for every gradient
    for got, same, leaf in zip(*found, exact, strict=True):
        if leaf.grad is None:
            assert got is None and same is None
        else:
            assert_close(got, leaf.grad, dtype=torch.float32)
            assert_close(same, leaf.grad, dtype=torch.float32)


@pytest.mark.parametrize("name", ["rms_norm", "norm_add_norm"])
def test_the_operator_keeps_its_promises(name: str, device: str) -> None:
    x, residual, weight = problem((3, 64), torch.bfloat16, device)
    args = {"rms_norm": (x, weight, 1e-6, False), "norm_add_norm": (x, residual, weight, weight, 1e-6, 1e-6, True)}[
        name
    ]
    torch.library.opcheck(getattr(torch.ops.fastllm, name).default, args)
