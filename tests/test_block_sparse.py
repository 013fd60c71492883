"""Block-sparse weights on a CPU: the op, its paths and its gradients, and the layer."""

import copy
import pickle

import pytest
import torch
from blocks import weight_of
from close import assert_close, assert_equal
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastllm.bsr_format import BlockSparseWeight, order_of
from fastllm.nn.block_sparse import BlockSparseLinear
from fastllm.ops import block_sparse
from fastllm.ops.block_sparse import block_sparse_matmul, definition, native, runs_on

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- the op


def operands(weight: BlockSparseWeight) -> tuple[Tensor, ...]:
    return *weight, order_of(weight.rows)


PATHS = ("by_rows", "by_groups", "by_blocks", "by_equal_rows")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_path_is_the_definition(dtype: torch.dtype, path: str) -> None:
    for B, M in ((32, 1), (64, 7), (128, 3)):
        dense, weight, _ = weight_of(B, dtype=dtype, equal=path == "by_equal_rows")
        x = torch.randn(M, dense.shape[1]).to(dtype)
        got = getattr(block_sparse, path)(x, weight)
        assert_close(got, x.double() @ dense.double().T, dtype=dtype)
        assert got.is_contiguous()
        with pytest.raises(AssertionError, match="worst"):
            wrong = weight._replace(values=weight.values.roll(1, 0))
            assert_close(getattr(block_sparse, path)(x, wrong), x.double() @ dense.double().T, dtype=dtype)


def test_each_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for path in PATHS:
        monkeypatch.setattr(block_sparse, path, lambda x, weight, path=path: taken.append(path))

    def path_of(M: int, dtype: torch.dtype, equal: bool = False) -> str:
        dense, weight, _ = weight_of(32, dtype=dtype, equal=equal)
        native(torch.zeros(M, dense.shape[1], dtype=dtype), weight)
        return taken.pop()

    assert path_of(1, torch.bfloat16) == path_of(32, torch.bfloat16) == "by_blocks"
    assert path_of(1, torch.bfloat16, True) == path_of(64, torch.bfloat16, True) == "by_equal_rows"
    assert path_of(64, torch.bfloat16) == "by_blocks"
    assert path_of(65, torch.bfloat16) == path_of(1, torch.float32) == path_of(99, torch.float32, True) == "by_groups"
    monkeypatch.setattr(block_sparse, "PARTS", 1 << 8)
    assert path_of(33, torch.bfloat16) == "by_groups" and path_of(32, torch.bfloat16) == "by_blocks"
    assert path_of(1, torch.float16) == "by_rows"
    monkeypatch.setattr(block_sparse, "GATHERED", 1 << 8)
    assert path_of(1, torch.float32) == "by_rows"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_is_its_definition(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse, "CHUNK", 40)
    dense, weight, _ = weight_of(32, dtype=dtype)
    b = torch.randn(128).to(dtype) if bias else None
    for shape in ((160,), (3, 160), (2, 3, 160), (1, 90, 160), (0, 160)):
        x = torch.randn(shape).to(dtype)
        want = x.double() @ dense.double().T + (0 if b is None else b.double())
        assert_close(definition(x, weight, b), want, dtype=dtype)
        assert_close(block_sparse_matmul(x, *operands(weight), b), want, dtype=dtype)
    assert_equal(block_sparse_matmul(x, *operands(weight), b, True), want.to(dtype))  # no rows


def test_other_dtypes_of_values_are_converted() -> None:
    dense, weight, _ = weight_of(32)
    x = torch.randn(5, 160).bfloat16()
    got = block_sparse_matmul(x, *operands(weight), None)
    assert_close(got, x.double() @ dense.bfloat16().double().T, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(dtype: torch.dtype) -> None:
    dense, weight, _ = weight_of(32, dtype=dtype)
    x = torch.randn(70, 160).to(dtype)
    y = block_sparse_matmul(x, *operands(weight), None, True)
    assert_close(y, x.double() @ dense.double().T, dtype=dtype)
    for M in (1, 5):
        assert_equal(block_sparse_matmul(x[:M], *operands(weight), None, True), y[:M])


def test_gradients() -> None:
    dense, weight, _ = weight_of(32)
    bias = torch.randn(128, requires_grad=True)
    for shape in ((3, 160), (2, 2, 160)):
        x, grad = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 128)
        block_sparse_matmul(x, *operands(weight), bias).backward(grad)
        other = x.detach().double().requires_grad_()
        want_bias = bias.detach().double().requires_grad_()
        nn.functional.linear(other, dense.double(), want_bias).backward(grad.double())
        assert_close(x.grad, other.grad, dtype=torch.float32)
        assert_close(bias.grad, want_bias.grad, dtype=torch.float32)
        bias.grad = None


def test_torch_accepts_the_op() -> None:
    _, weight, _ = weight_of(32)
    x, bias = torch.randn(2, 3, 160, requires_grad=True), torch.randn(128, requires_grad=True)
    torch.library.opcheck(torch.ops.fastllm.block_sparse_matmul, (x, *operands(weight), bias))
    torch.library.opcheck(torch.ops.fastllm.block_sparse_matmul_grad_x, (torch.randn(3, 128), *weight, 160))


def test_operands_that_do_not_fit_are_refused() -> None:
    _, weight, _ = weight_of(32)
    values, columns, rows, order = operands(weight)
    x = torch.randn(3, 160)
    for given, message in (
        ((x.double(), values, columns, rows, order), "x must be float16, bfloat16 or float32, got torch.float64"),
        ((x[:, 1:], values, columns, rows, order), r"a B that divides K=159; got \[\d+, 32, 32\]"),
        ((x, values[0], columns, rows, order), r"values must be \[nnz, B, B\]"),
        ((x, values, columns.long(), rows, order), "columns must be int32"),
        ((x, values, columns, rows, order[1:]), r"order must be int32 \[4\]; got torch.int32 \[3\]"),
        ((x, values, columns, rows, order, torch.zeros(3)), r"bias must be \[128\] for 4 rows .* got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            block_sparse_matmul(*given)


def test_the_report_says_where_dense_is_as_fast() -> None:
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    assert runs_on(2048, 2048, 64, 200, bf16, cpu) == "products of blocks"
    assert "float32" in runs_on(2048, 2048, 64, 200, torch.float16, cpu)
    full = runs_on(2048, 2048, 64, 1024, bf16, cpu)
    assert "dense would be as fast for one row and for a prompt (100% of blocks of 64 x 64 are kept)" in full
    assert "triton" in runs_on(2048, 2048, 64, 1024, bf16, torch.device("cuda"))


# --- the layer


def layer_of(B: int = 32, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple:
    dense, _, _ = weight_of(B, dtype=dtype)
    linear = nn.Linear(dense.shape[1], dense.shape[0], bias, dtype=dtype)
    linear.weight.data.copy_(dense)
    return linear, BlockSparseLinear.from_linear(linear, B)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_is_the_dense_one(dtype: torch.dtype) -> None:
    for B, bias in ((32, True), (64, False)):
        linear, layer = layer_of(B, dtype, bias)
        x = torch.randn(2, 3, linear.in_features).to(dtype)
        assert_close(layer(x), copy.deepcopy(linear).double()(x.double()), dtype=dtype)
        assert_equal(layer.dequantize(), linear.weight.detach())
        back = layer.to_dense()
        assert type(back) is nn.Linear and (back.bias is None) != bias
        assert_equal(back(x), linear(x))
        assert layer.weight.shape == linear.weight.shape and layer.weight.dtype == dtype and layer.weight.isnan().all()
        assert layer.shape == (layer.out_features, layer.in_features) == tuple(linear.weight.shape)
        assert not any(p.requires_grad for p in layer.parameters())
        stored = layer.at_rest().nbytes + 4 * (linear.out_features // B)
        assert layer.nbytes == stored + (linear.bias.nbytes if linear.bias is not None else 0)
        assert 0 < layer.density == layer.count * B * B / linear.weight.numel() < 1
        assert f"block{B}, {layer.count} blocks ({layer.density:.0%}), products of blocks" in repr(layer)
        assert layer.format.name == f"block{B}" and not layer.transposed


def test_masks_and_transposed_weights() -> None:
    conv = Conv1D(64, 96)
    layer = BlockSparseLinear.from_linear(conv, 32, torch.tensor([[1, 0, 1], [0, 1, 0]]).bool())
    assert layer.transposed and layer.shape == (64, 96) and layer.count == 3
    x, dense = torch.randn(4, 96), conv.weight.detach().T.clone()
    dense[:32, 32:64], dense[32:, :32], dense[32:, 64:] = 0, 0, 0
    assert_close(layer(x), x.double() @ dense.double().T + conv.bias.double(), dtype=torch.float32)
    for wrong, message in (
        (lambda: BlockSparseLinear.from_linear(conv), r"\[64, 96\] is not .* 64 leaves 0 and 96"),
        (lambda: BlockSparseLinear.from_linear(conv, 32, torch.ones(3, 2).bool()), r"bool \[2, 3\]; got .* \[3, 2\]"),
        (lambda: BlockSparseLinear(layer.at_rest(), (64, 96), torch.zeros(96)), r"must be \[64\], got \[96\]"),
        (lambda: BlockSparseLinear(layer.at_rest(), (96, 96)), r"rows must be int32 \[4\]; got torch.int32 \[3\]"),
        (lambda: layer(torch.randn(4, 64)), r"x must be floating point \[..., 96\], got torch.float32 \[4, 64\]"),
        (lambda: layer(torch.ones(4, 96).int()), "must be floating point"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            wrong()


def test_what_is_saved_is_loaded() -> None:
    _, layer = layer_of()
    x, state = torch.randn(3, 160), dict(layer.state_dict())  # torch notes in its own that it was assigned once
    assert set(state) == {"weight_values", "weight_columns", "weight_rows", "bias"}
    for made in (
        BlockSparseLinear.empty(160, 128, True, 32),
        BlockSparseLinear.empty(160, 128, True, 32, device="cpu"),
        layer_of()[1],  # other blocks, another number of them
    ):
        other = copy.deepcopy(made)
        if made.weight_values.is_meta:
            assert "not loaded" in repr(made)
        else:
            assert not torch.equal(made(x), layer(x))
            made.load_state_dict(state)
            assert_equal(made(x), layer(x))
            assert made.weight_values.data_ptr() != state["weight_values"].data_ptr()
        other.load_state_dict(state, assign=True)
        assert_equal(other(x), layer(x))
        assert other.weight_values.data_ptr() == state["weight_values"].data_ptr()
        assert not other.weight_values.requires_grad
    with pytest.raises(RuntimeError, match="BlockSparseLinear: columns must be from 0 to 4"):
        made.load_state_dict(state | {"weight_columns": state["weight_columns"] + 4})
    with pytest.raises(ValueError, match="has no weight yet"):
        made(x)
    with pytest.raises(RuntimeError, match="size mismatch for weight_values"):
        BlockSparseLinear.empty(192, 128, True, 64, device="cpu").load_state_dict(state)


def test_copies_and_moves() -> None:
    linear, layer = layer_of()
    x = torch.randn(3, 160)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal(other(x), layer(x))
        assert other.weight_values.data_ptr() != layer.weight_values.data_ptr()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight_values.dtype == half.bias.dtype == torch.bfloat16
    assert half.weight_columns.dtype == half.weight_rows.dtype == half._order.dtype == torch.int32
    assert_close(half(x.bfloat16()), x.bfloat16().double() @ linear.weight.bfloat16().double().T
                 + linear.bias.bfloat16().double(), dtype=torch.bfloat16)  # fmt: skip
    assert all(t.is_meta for t in (*copy.deepcopy(layer).to("meta").state_dict().values(),))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(dynamic: bool) -> None:
    _, layer = layer_of()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((3, 160), (2, 5, 160)) if dynamic else ((3, 160),):
        x = torch.randn(shape)
        assert_equal(compiled(x), layer(x))
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(mine).square().sum().backward()
        layer(other).square().sum().backward()
        assert_equal(mine.grad, other.grad)
