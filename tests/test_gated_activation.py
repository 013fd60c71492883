"""act(gate) * up: the operators on this machine, and the kernel, interpreted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_close, assert_equal
from torch import Tensor
from transformers.activations import ACT2FN

from fastllm.kernels.gated_activation import KINDS
from fastllm.kernels.gated_activation import gated_activation as by_kernel
from fastllm.ops.gated_activation import ACTIVATIONS, activate, gated_activation, gated_activation_pair

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 640), (1, 1, 2048), (3, 5, 7), (2, 1025), (65, 1024), (4, 1)]
PAIR: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {"op": gated_activation_pair, "kernel": by_kernel}
# what transformers calls them
NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu",
         "sigmoid": "sigmoid", "relu": "relu", "relu2": "relu2"}  # fmt: skip


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Numbers whose products are not much larger than their RMS, which errors are measured by."""
    gate, up = torch.randn(shape, device=device).clamp(-2, 2), torch.rand(shape, device=device) + 0.5
    return gate.to(dtype), up.to(dtype)


@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("kind", KINDS)
def test_close_to_the_definition(kind: str, name: str, device: str) -> None:
    for i, shape in enumerate(SHAPES):
        dtype = DTYPES[(i + KINDS.index(kind)) % 3]
        gate, up = problem(shape, dtype, device)
        assert_close(PAIR[name](gate, up, kind), activate(gate.double(), up.double(), kind), dtype=dtype)


def test_the_kinds_are_those_of_transformers(device: str) -> None:
    assert set(NAMES) == set(KINDS) == set(ACTIVATIONS)
    gate, up = problem((3, 500), torch.float64, device)
    for kind, theirs in NAMES.items():
        assert_close(activate(gate, up, kind), ACT2FN[theirs](gate) * up, 1e-6, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_differ(kind: str, device: str) -> None:
    gate, up = problem((3, 500), torch.float32, device)
    for other in set(KINDS) - {kind}:
        with pytest.raises(AssertionError, match="worst"):
            assert_close(by_kernel(gate, up, kind), activate(gate.double(), up.double(), other), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_a_feed_forward_layer(dtype: torch.dtype, device: str) -> None:
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP

    mlp = Gemma3MLP(Gemma3TextConfig(hidden_size=32, intermediate_size=96)).to(device, dtype)
    x = 5 * torch.randn(2, 3, 32, device=device, dtype=dtype)
    with torch.no_grad():
        want, joined = mlp(x), torch.cat((mlp.gate_proj(x), mlp.up_proj(x)), -1)
        middles = (gated_activation(joined, "gelu_tanh"), by_kernel(*joined.chunk(2, -1), "gelu_tanh"))
        for middle in middles:
            assert_close(mlp.down_proj(middle), want.double(), 8e-2, 1.2e-2, dtype=dtype)


@pytest.mark.parametrize("name", PAIR)
def test_strides(name: str, device: str) -> None:
    gate, up = problem((4, 3, 60), torch.float16, device)
    both = torch.cat((gate + 1, gate, up, up + 1), -1)
    columns = gate.transpose(1, 2).contiguous().transpose(1, 2)
    want = activate(gate.double(), up.double(), "silu")
    pairs = ((both[..., 60:120], both[..., 120:180]), (columns, up), (gate, both[..., 120:180]))
    for g, u in pairs:
        assert_close(PAIR[name](g, u, "silu"), want, dtype=torch.float16)
    assert_close(PAIR[name](gate[:, :1].expand(-1, 3, -1), up, "silu")[:, 0], want[:, 0], dtype=torch.float16)
    if name == "op":
        assert_close(gated_activation(both[..., 60:180], "silu"), want, dtype=torch.float16)


@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("kind", KINDS)
def test_operands_stay_and_nan_shows(kind: str, name: str, device: str) -> None:
    gate, up = problem((2, 40), torch.float32, device)
    gate[0, 3] = up[1, 5] = float("nan")
    before = gate.clone(), up.clone()
    y = PAIR[name](gate, up, kind)
    assert y[0, 3].isnan() and y[1, 5].isnan() and y.isnan().sum() == 2
    for t, old in zip((gate, up), before, strict=True):
        assert_equal(t.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("name", PAIR)
def test_nothing_to_do(name: str, device: str) -> None:
    for shape in ((0, 5), (3, 0)):
        x = torch.ones(shape, device=device)
        assert PAIR[name](x, x, "silu").shape == shape


def test_what_does_not_fit_is_refused(device: str) -> None:
    x = torch.ones(3, 8, device=device)
    for run in PAIR.values():
        with pytest.raises(ValueError, match="kind must be one of silu, gelu.*got 'swish'"):
            run(x, x, "swish")
        with pytest.raises(ValueError, match=r"up must be torch.float32 \[3, 8\]"):
            run(x, x[:1], "silu")
        with pytest.raises(ValueError, match="got torch.float16"):
            run(x, x.half(), "silu")
    with pytest.raises(ValueError, match="gate beside up"):
        gated_activation(x[:, 1:], "silu")
    with pytest.raises(ValueError, match="must be float16, bfloat16 or float32"):
        by_kernel(x.double(), x.double(), "silu")


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole_and_differentiates(kind: str, device: str, opaque: None) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 2, 64, device=device)
    seen: list[str] = []

    def call(x: Tensor) -> Tensor:
        return gated_activation(x, kind)

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        assert_equal(torch.compile(call, fullgraph=True, backend=backend)(x), call(x))
    assert "fastllm.gated_activation" in " ".join(seen)
    whole = torch.compile(call, fullgraph=True, backend="aot_eager")
    exact = x.double().requires_grad_()
    activate(*exact.chunk(2, -1), kind).sin().sum().backward()
    for run in (call, whole):
        leaf = x.clone().requires_grad_()
        run(leaf).sin().sum().backward()
        assert_close(leaf.grad, exact.grad, dtype=torch.float32)


def test_the_operator_keeps_its_promises(device: str) -> None:
    gate, up = problem((3, 64), torch.bfloat16, device)
    torch.library.opcheck(torch.ops.fastllm.gated_activation.default, (gate, up, "silu"))
