"""Who multiplies by a quantized weight: fastllm in all its variants and the dense product; peers.py has others.

A provider says why it cannot run, or makes operands from a dense weight. What it computes is held to the weight that
its operands stand for, where it tells; otherwise to the dense weight, with a bound that says what 4 or 8 bits lose.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastllm.ops
from fastllm.formats import Format, IntFormat, QuantizedWeight, dequantize, parse_format, unpack_bits
from fastllm.ops import LAYOUTS
from fastllm.ops.int4pack import Int4Pack
from fastllm.ops.int8 import Int8Blocks, Int8Rows
from fastllm.ops.layout import Layout
from fastllm.quantizers import quantize

FOREVER = 1 << 30
FUSED, WHOLE, CHUNKS = "fused kernel", "dequantise + cuBLAS", "dequantise + cuBLAS by chunks"
# Relative Frobenius errors. EXACT: 16-bit operands, result and weights rounded once more, against the same weight.
EXACT, ROUNDED, ROUNDED_FP8 = 6e-3, 2e-2, 4e-2
# What rounding normal weights to 4 or 8 bits may cost, where only the dense weight is known.
QUANTIZED = {4: 0.25, 8: 0.03}


class Problem:
    """A random dense weight [N, K] and what it is in `format`. Everything else is made when it is first asked for."""

    def __init__(self, format: Format, N: int, K: int, dtype: torch.dtype, device: str) -> None:
        self.format, self.N, self.K, self.dtype, self.device = format, N, K, dtype, device
        self.w = torch.randn(N, K, dtype=dtype, device=device) / K**0.5

    def again(self, format: Format) -> "Problem":
        """The same dense weight for another format."""
        other = Problem(format, 1, 1, self.dtype, self.device)
        other.N, other.K, other.w = self.N, self.K, self.w
        return other

    @property
    def shape(self) -> tuple[int, int]:
        return self.N, self.K

    @cached_property
    def weight(self) -> QuantizedWeight:
        return quantize(self.w, self.format, "rtn")

    @cached_property
    def dense(self) -> Tensor:
        """What `weight` stands for, float32 [N, K]."""
        return dequantize(self.weight, self.format, self.shape, torch.float32)

    def integers(self) -> Tensor:
        """uint8 [N, K], as stored: 0 to 15, or to 255."""
        return unpack_bits(self.weight.packed, self.format.bits, self.K)


class Operands(NamedTuple):
    """What `prepare` returns.

    make:   a further copy of the packed weight, in memory of its own; `run(make(), x)` is y [M, N]
    bytes:  of weights, scales and zero points that a call reads
    weight: float32 [N, K], what they stand for; None if the library does not tell
    bound:  the allowed relative error against x @ weight.T, or against the dense weight if that is None
    """

    make: Callable[[], Any]
    run: Callable[[Any, Tensor], Tensor]
    bytes: int
    weight: Tensor | None
    bound: float


class Provider(ABC):
    """Stateless. `bits`: of the weights that it is for. `most_rows`: more rows than that are not worth the time."""

    name: str
    bits: int | None = None
    peer = False  # another library's
    most_rows = FOREVER

    @abstractmethod
    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
        """Why it cannot run; empty if it can. Imports nothing heavy."""

    @abstractmethod
    def prepare(self, problem: Problem) -> Operands: ...

    def begin(self) -> None:
        """Called before the first call at a new number of rows: for libraries whose tuning is a global switch."""
        return None


def fresh_tickets() -> Any:
    """Give the split-K kernel new counters; returns the old ones, to be kept as long as graphs that use them.

    Each launch that a graph captures takes some for good, and enough are kept in stock for a few graphs. A benchmark
    captures hundreds for a single time, and what comes after the last would be slowed by clearing its own.
    """
    if find_spec("fastllm.kernels.tickets") is None:
        return None
    from fastllm.kernels import tickets

    old = tickets._tickets(torch.device("cuda", 0))
    tickets._tickets.cache_clear()
    return old


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Dense(Provider):
    """torch's own product with the dense weight: cuBLAS, or oneDNN on a CPU. The baseline."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
        return []

    def prepare(self, problem: Problem) -> Operands:
        def run(w: Tensor, x: Tensor) -> Tensor:
            return nn.functional.linear(x, w)

        return Operands(problem.w.clone, run, nbytes(problem.w), problem.w.float(), EXACT)


class Packed(Provider):
    """A layout of fastllm; without one, the layout that fastllm chooses, which is what a user gets."""

    def __init__(
        self, name: str, layout: Layout | None = None, bits: int | None = None, most_rows: int = FOREVER
    ) -> None:
        self.name, self.layout, self.bits, self.most_rows = name, layout, bits, most_rows

    def layout_for(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> Layout:
        return self.layout or fastllm.ops.layout_for(format, N, K, dtype, torch.device(device))

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
        layout = self.layout_for(format, N, K, dtype, device)
        return layout.reasons(format, N, K, dtype, torch.device(device))

    def prepare(self, problem: Problem) -> Operands:
        format, (N, K), weight = problem.format, problem.shape, problem.weight
        layout = self.layout_for(format, N, K, problem.dtype, problem.device)

        def make() -> Any:  # packing may overwrite what it is given; oneDNN's blocks are made only by packing
            fresh = [None if t is None else t.clone() for t in weight]
            return layout.pack(QuantizedWeight(*fresh), format, problem.shape)

        def run(p: Any, x: Tensor) -> Tensor:
            return layout.matmul(x, p, N, format.bits, format.group_of(K))

        bound = ROUNDED if format.activations else EXACT
        return Operands(make, run, format.bytes(N, K), problem.dense, bound)


class Kernel(Provider):
    """The Triton kernels by themselves: fused, or the weight made dense, whole or in chunks that stay in the L2 cache,
    and the library's product. The sides of the switch in fastllm/ops/gpu.py."""

    def __init__(self, name: str) -> None:
        self.name = name

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
        return LAYOUTS["planar"].reasons(format, N, K, dtype, torch.device(device))

    def prepare(self, problem: Problem) -> Operands:
        from fastllm.kernels.dequantize import dequantize
        from fastllm.kernels.quant_matmul import quant_matmul

        format, K = problem.format, problem.K
        bits, group = format.bits, format.group_of(K)
        planar = Packed(self.name, LAYOUTS["planar"]).prepare(problem)

        def fused(p: Any, x: Tensor) -> Tensor:
            return quant_matmul(x, p.w, p.scale, p.zero, None, bits, group)

        def dequantised(p: Any, x: Tensor) -> Tensor:
            return nn.functional.linear(x, dequantize(p.w, p.scale, p.zero, bits, group, K, x.dtype))

        def by_chunks(p: Any, x: Tensor) -> Tensor:
            return Layout.matmul(LAYOUTS["planar"], x, p, problem.N, bits, group)

        return planar._replace(run={FUSED: fused, WHOLE: dequantised, CHUNKS: by_chunks}[self.name])


class Activations(Packed):
    """Weights and activations of 8 bits, the latter rounded row by row within each call. kind: "int8" or "fp8"."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(name, bits=8)
        self.kind = kind

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
        if not hasattr(fastllm.ops, f"{self.kind.upper()}_LAYOUTS"):
            return [f"this checkout has no product of {self.kind} activations"]
        if (format.bits, format.group, format.symmetric) != (8, None, True):
            return ["it is compared with symmetric int8 weights with one scale a row"]
        chosen = self.layout_for(format, N, K, dtype, device)
        return [] if chosen.name != f"{self.kind}-rest" else [f"only the definition in plain torch runs on {device}"]

    def layout_for(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> Layout:
        rounding = parse_format(self.kind, activations=self.kind)
        return fastllm.ops.layout_for(rounding, N, K, dtype, torch.device(device))

    def prepare(self, problem: Problem) -> Operands:
        own = problem.again(parse_format(self.kind, activations=self.kind))
        return super().prepare(own)._replace(bound=ROUNDED if self.kind == "int8" else ROUNDED_FP8)


def variant(kind: type[Layout], **switches: int) -> Layout:
    """A layout with its switch moved, so that one side of it runs at every size."""
    layout = kind()
    for name, value in switches.items():
        setattr(layout, name, value)
    return layout


def own(device: str) -> list[Provider]:
    """fastllm's choice first, then every candidate that it could have chosen."""
    if device == "cpu":
        return [
            Packed("fastllm"),
            Packed("int4pack", variant(Int4Pack, direct_rows=FOREVER), 4, most_rows=128),
            Packed("int4pack, dequantised", variant(Int4Pack, direct_rows=0), 4),
            Packed("int8pack", variant(Int8Rows, direct_rows=FOREVER), 8, most_rows=128),
            Packed("int8, cast", variant(Int8Rows, direct_rows=0), 8),
            Packed("oneDNN digits", variant(Int8Blocks, smallest=0), 8),
        ]
    return [
        Packed("fastllm"),
        *(Kernel(name) for name in (FUSED, WHOLE, CHUNKS)),
        Activations("fastllm w8a8", "int8"),
        Activations("fastllm fp8", "fp8"),
    ]


def duplicate(state: Any) -> Any:
    """Copies of every tensor of a tuple or list, strides kept."""
    if isinstance(state, Tensor):
        return state.clone()
    return type(state)(duplicate(part) for part in state) if isinstance(state, list | tuple) else state


def again(state: Any) -> Callable[[], Any]:
    return partial(duplicate, state)
