"""What the op of rounded activations owes whatever they are rounded to: gradients, opcheck, compilation."""

import pytest
import test_fp8_matmul
import test_int8_matmul
import torch
from close import assert_close, assert_equal
from test_int8_matmul import DTYPES

from fastllm.ops import dynamic_matmul


@pytest.mark.parametrize("of", [test_int8_matmul, test_fp8_matmul], ids=["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(of, dtype, device):
    N, K = 96, 161
    for layout in of.layouts(device):
        p, dense = of.prepared(N, K, dtype, device, layout)
        x = torch.randn(2, 3, K, dtype=dtype, device=device, requires_grad=True)
        bias = torch.randn(N, dtype=dtype, device=device, requires_grad=True)
        grad = torch.randn(2, 3, N, dtype=dtype, device=device)
        dynamic_matmul(x, *p, bias, N, layout).backward(grad)
        bounds = (4e-2, 5e-3) if dtype == torch.bfloat16 else (8e-3, 1e-3)
        assert_close(x.grad, grad.double() @ dense, *bounds, dtype=dtype)
        assert_close(bias.grad, grad.double().sum((0, 1)), *bounds, dtype=dtype)


@pytest.mark.parametrize("of", [test_int8_matmul, test_fp8_matmul], ids=["int8", "fp8"])
def test_opcheck_and_compile(of, device):
    N, K = 64, 128
    for layout in of.layouts(device):
        p, _ = of.prepared(N, K, torch.bfloat16, device, layout)
        x = torch.randn(3, K, dtype=torch.bfloat16, device=device)
        if not p.w.is_mkldnn:  # opcheck compares the storage of its arguments, and oneDNN's blocks have none
            for arg in (x, x.clone().requires_grad_()):
                torch.library.opcheck(torch.ops.fastllm.dynamic_matmul.default, (arg, *p, None, N, layout, True))

        def call(x, p=p, layout=layout):
            return dynamic_matmul(x, *p, None, N, layout)

        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        for M in (1, 3, 40):
            x = torch.randn(M, K, dtype=torch.bfloat16, device=device)
            assert_equal(compiled(x), call(x))
