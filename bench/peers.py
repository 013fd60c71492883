"""Other libraries as providers. Each is imported only when it runs; one that cannot run says why.

The versions that their calls were written for are in requirements/peers.txt. tinygemm and GemLite multiply by the very
integers that fastllm does, so they are held to the same reference; torchao, bitsandbytes and humming quantize by their
own rules, and are held to what they say the result is, or else to the dense weight and the bound of QUANTIZED.
"""

import copy
from importlib.util import find_spec
from typing import Any

import torch
from providers import EXACT, QUANTIZED, ROUNDED, Operands, Problem, Provider, again, nbytes
from torch import Tensor, nn

from fastllm.formats import IntFormat, unpack_zero_point

HALVES = (torch.bfloat16, torch.float16)


def first(*conditions: tuple[bool, str]) -> list[str]:
    """The texts whose condition holds."""
    return [why for bad, why in conditions if bad]


def absent(module: str) -> tuple[bool, str]:
    return find_spec(module) is None, f"{module} is not installed"


def not_cuda(device: str) -> tuple[bool, str]:
    return device != "cuda", f"it runs on a CUDA device, not on {device}"


class Tinygemm(Provider):
    """torch.ops.aten._weight_int4pack_mm: int4 in groups, bfloat16, w = (q - 8) * scale + zero."""

    name, bits, peer, most_rows = (
        "torch tinygemm",
        4,
        True,
        512,
    )  # at 1024 rows it takes twenty times as long as cuBLAS

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
        return first(
            not_cuda(device),
            (format.bits != 4, "it holds 4-bit weights only"),
            (format.group not in (32, 64, 128, 256), "it takes groups of 32, 64, 128 or 256"),
            (dtype != torch.bfloat16, "it takes bfloat16 only"),
            (K % 128 != 0 or N % 8 != 0, "it takes K in multiples of 128 and N in multiples of 8"),
        )

    def prepare(self, problem: Problem) -> Operands:
        q, group = problem.integers(), problem.format.group
        packed = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).contiguous(), 8)
        scale = problem.weight.scale
        zero = torch.zeros_like(scale)
        if problem.weight.zero_point is not None:
            zero = scale * (8 - unpack_zero_point(problem.weight.zero_point, 4, problem.N).to(scale.dtype))
        pairs = torch.stack((scale, zero), -1).transpose(0, 1).contiguous()  # [K / group, N, 2]

        def run(state: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm(x, state[0], group, state[1])

        return Operands(again((packed, pairs)), run, nbytes(packed, pairs), problem.dense, ROUNDED)


class GemLite(Provider):
    """GemLite's own choice of kernel and, where its table for this GPU has the shape, of tile.

    `tuned`: nothing from that table, and an exhaustive search instead (minutes a shape).
    """

    peer = True

    def __init__(self, tuned: bool) -> None:
        self.tuned, self.name = tuned, "GemLite max-autotuned" if tuned else "GemLite"

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
        return first(
            not_cuda(device),
            absent("gemlite"),
            (dtype not in HALVES, "it takes float16 or bfloat16"),
            (format.bits == 8 and format.group is not None, "its int8 weights have one scale a row"),
            (not format.symmetric, "only symmetric weights are handed to it here"),
            (bool(format.group) and K % (format.group or 1) != 0, f"K={K} is not a multiple of the group"),
        )

    def begin(self) -> None:
        import gemlite
        from gemlite import core

        gemlite.reset_config()
        if not self.tuned:
            gemlite.load_config(core.get_default_cache_config())
        gemlite.set_autotune("max" if self.tuned else "fast")

    def prepare(self, problem: Problem) -> Operands:
        import gemlite
        from gemlite.helper import A16W8, A16Wn

        format, scale, q = problem.format, problem.weight.scale, problem.integers()
        if format.bits == 8:
            q = (q.to(torch.int16) - 128).to(torch.int8)
            layer = A16W8(device="cuda:0", dtype=problem.dtype).from_weights(q, scales=scale)
        else:
            zeros, group = torch.full_like(scale, format.middle), format.group_of(problem.K)
            layer = A16Wn(device="cuda:0", dtype=problem.dtype).from_weights(q, scale, zeros, format.bits, group)
        tensors = [t.detach() for t in layer.get_tensor_args()]
        settings = layer.get_meta_args()

        def run(state: list[Tensor], x: Tensor) -> Tensor:
            return gemlite.forward_functional(x, None, state, settings)

        return Operands(again(tensors), run, nbytes(*tensors), problem.dense, ROUNDED)


def module_operands(layer: nn.Module, size: int, weight: Tensor | None, bound: float) -> Operands:
    """Operands of a library whose unit is a module."""

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    return Operands(lambda: copy.deepcopy(layer), run, size, weight, bound)


def linear(problem: Problem, device: str) -> nn.Linear:
    layer = nn.Linear(problem.K, problem.N, bias=False, dtype=problem.dtype, device=device)
    layer.weight = nn.Parameter(problem.w.to(device), requires_grad=False)
    return layer


class TorchAO(Provider):
    """torchao's `quantize_`, without torch.compile. kind: "weight only", or "dynamic" (activations in int8 too)."""

    peer = True

    def __init__(self, bits: int, kind: str = "weight only") -> None:
        self.bits, self.kind, self.name = bits, kind, f"torchao int{bits} {kind}"

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
        return first(
            absent("torchao"),
            (format.bits != self.bits, f"it is set to {self.bits} bits"),
            (self.bits == 4 and device != "cuda", f"its int4 runs on a CUDA device, not on {device}"),
            (self.bits == 4 and format.group not in (32, 64, 128, 256), "it takes groups of 32, 64, 128 or 256"),
            (self.bits == 8 and format.group is not None, "its int8 weights have one scale a row"),
            (self.bits == 4 and dtype != torch.bfloat16, "its int4 takes bfloat16 only"),
        )

    def prepare(self, problem: Problem) -> Operands:
        from torchao import quantization as ao

        config: Any
        if self.bits == 4:
            packing = "tile_packed_to_4d"
            config = ao.Int4WeightOnlyConfig(
                group_size=problem.format.group, int4_packing_format=packing, set_inductor_config=False
            )
        elif self.kind == "dynamic":
            config = ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        else:
            config = ao.Int8WeightOnlyConfig(set_inductor_config=False)
        model = nn.Sequential(linear(problem, problem.device))
        ao.quantize_(model, config)
        N, K = problem.shape
        groups = problem.format.groups(K)
        if self.bits == 4:  # it has no public dequantize
            return module_operands(model[0], N * K // 2 + 4 * N * groups, None, QUANTIZED[4])
        weight = model[0].weight.dequantize().float()
        return module_operands(model[0], N * K + 4 * N, weight, ROUNDED if self.kind == "dynamic" else EXACT)


class BitsAndBytes(Provider):
    """bitsandbytes: nf4 in blocks of 64 (beside int4), or LLM.int8() without outliers (beside int8)."""

    peer = True

    def __init__(self, bits: int) -> None:
        self.bits, self.name = bits, "bitsandbytes nf4" if bits == 4 else "bitsandbytes int8"

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
        return first(
            absent("bitsandbytes"),
            (format.bits != self.bits, f"it is set to {self.bits} bits"),
            (self.bits == 8 and format.group is not None, "its int8 weights have one scale a row"),
        )

    def prepare(self, problem: Problem) -> Operands:
        import bitsandbytes as bnb

        (N, K), w = problem.shape, problem.w.cpu()
        layer: Any
        if self.bits == 4:
            layer = bnb.nn.Linear4bit(
                K, N, bias=False, compute_dtype=problem.dtype, compress_statistics=False, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(
                w, requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
            )
            layer = layer.to(problem.device)
            state = layer.weight.quant_state
            weight = bnb.functional.dequantize_4bit(layer.weight.data, state).float()
            return module_operands(layer, nbytes(layer.weight.data, state.absmax), weight, EXACT)
        layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=0.0)
        layer.weight = bnb.nn.Int8Params(w, has_fp16_weights=False, requires_grad=False)
        layer = layer.to(problem.device)
        weight = layer.weight.CB.float() * (layer.weight.SCB.float()[:, None] / 127)
        return module_operands(layer, nbytes(layer.weight.CB, layer.weight.SCB), weight, ROUNDED)


class Humming(Provider):
    """humming, a successor of Marlin, compiled with nvcc when it first runs (seconds a kernel)."""

    name, peer = "humming", True

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
        return first(
            not_cuda(device),
            absent("humming"),
            (dtype not in HALVES, "it takes float16 or bfloat16"),
            (not format.symmetric, "only symmetric weights are handed to it here"),
            (bool(format.group) and K % (format.group or 1) != 0, f"K={K} is not a multiple of the group"),
        )

    def prepare(self, problem: Problem) -> Operands:
        from humming.layer import HummingLayer

        settings = {"dtype": f"uint{problem.format.bits}", "group_size": problem.format.group or 0}
        layer = HummingLayer(
            shape_n=problem.N, shape_k=problem.K, weight_config=settings, torch_dtype=problem.dtype
        ).cuda()
        layer.load_from_unquantized(problem.w)
        layer.transform()
        bytes_ = problem.format.bytes(problem.N, problem.K)
        return module_operands(layer, bytes_, None, QUANTIZED[problem.format.bits])


class Marlin(Provider):
    """Not run here: no wheel of Marlin's kernels loads beside a current torch. `Humming` is the closest that does."""

    name, peer = "Marlin", True

    def reasons(self, format: IntFormat, N: int, K: int, dtype: torch.dtype, device: str) -> list[str]:
        return [
            "no wheel of its own for this torch: marlin-kernels ends at torch 2.5, gptqmodel is published as source "
            "only, and vllm brings hundreds of megabytes and a torch of its own"
        ]

    def prepare(self, problem: Problem) -> Operands:
        raise NotImplementedError(self.reasons(problem.format, *problem.shape, problem.dtype, problem.device)[0])


def peers(slow: bool = False) -> list[Provider]:
    """Every other library; `slow` adds those that compile or search for minutes."""
    more: list[Provider] = [Humming(), GemLite(tuned=True)] if slow else []
    return [
        Tinygemm(),
        GemLite(tuned=False),
        TorchAO(4),
        TorchAO(8),
        TorchAO(8, "dynamic"),
        BitsAndBytes(4),
        BitsAndBytes(8),
        *more,
        Marlin(),
    ]
