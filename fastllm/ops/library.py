"""What ops have in common: the library, how they are defined, gradients, shapes of results."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastllm", "DEF")


def is_watched(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an op of these tensors must go through the dispatcher, which costs 8 of the 20 us of a small layer."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        return True
    return torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in others))


def is_traced(x: Tensor) -> bool:
    """Whether torch.compile looks on, on a CPU: it then makes better code of a definition than of an op."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


OPERANDS = "Tensor w, Tensor scale, Tensor? zero"


def define(
    name: str, forward: Callable[..., Tensor], grad_x: Callable[..., Tensor], rest: str, operands: str = OPERANDS
) -> None:
    """Define `fastllm::name`, differentiable with respect to x and bias, and `fastllm::name_grad_x`.

    forward(x, w, scale, zero, bias, N, *rest, batch_invariant) -> y [..., N]
    grad_x(grad, w, scale, zero, K, *rest) -> [..., K]
    rest: the further arguments of both, as in a schema
    operands: three tensors, of which the third may take another place than that of zero points
    """
    LIBRARY.define(f"{name}(Tensor x, {operands}, Tensor? bias, int N, {rest}, bool batch_invariant=False) -> Tensor")
    LIBRARY.define(f"{name}_grad_x(Tensor grad, {operands}, int K, {rest}) -> Tensor")
    for key in ("CPU", "CUDA", "MkldnnCPU"):  # the last: oneDNN's blocks are opaque tensors with a key of their own
        LIBRARY.impl(name, forward, key)
        LIBRARY.impl(f"{name}_grad_x", grad_x, key)
    gradient = getattr(torch.ops.fastllm, f"{name}_grad_x")

    def save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, w, scale, zero, bias, _, *ctx.rest, _ = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(w, scale, zero)
        ctx.K = x.shape[-1]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, scale, zero = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient(grad, w, scale, zero, ctx.K, *ctx.rest)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, None, grad_bias, None, *[None] * len(ctx.rest), None

    def like_y(x: Tensor, w: Tensor, scale: Tensor, zero: Any, bias: Any, N: int, *_: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], N)

    def like_x(grad: Tensor, w: Tensor, scale: Tensor, zero: Any, K: int, *_: Any) -> Tensor:
        return grad.new_empty(*grad.shape[:-1], K)

    torch.library.register_autograd(f"fastllm::{name}", backward, setup_context=save_for_backward, lib=LIBRARY)
    torch.library.register_fake(f"fastllm::{name}", like_y, lib=LIBRARY)
    torch.library.register_fake(f"fastllm::{name}_grad_x", like_x, lib=LIBRARY)


def define_fused(schema: str, forward: Callable, definition: Callable, like: Callable) -> None:
    """Define `fastllm::schema`. Where an input requires a gradient the definition runs, which autograd sees through.

    forward, definition: the arguments of the schema -> the result
    like: the arguments -> tensors of the result's shape, dtype and device, all contiguous
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    op = getattr(torch.ops.fastllm, name)

    def settled(*args: Any) -> Any:
        """As `like` promises to whoever compiles."""
        y = forward(*args)
        return y.contiguous() if isinstance(y, Tensor) else tuple(part.contiguous() for part in y)

    def differentiable(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return definition(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, settled, key)
    LIBRARY.impl(name, differentiable, "Autograd")
    torch.library.register_fake(f"fastllm::{name}", like, lib=LIBRARY)
