"""A mixture of experts in int4, as fastllm runs it, against a loop over the same experts, one QuantLinear each.

    python bench/experts.py [--experts 64] [--tokens 8] [--out DIR]        (on a machine with a CUDA GPU)

Both are timed as they are called, eagerly: a loop has to ask the device which experts were hit, so it cannot be part
of a CUDA graph. Whether fastllm's can, and what it takes then, is measured besides. Writes experts.json.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import CALLS, Cuda, Runner, cold_bytes, error_of, in_turn, measure, ready
from providers import ROUNDED
from results import RESULTS, about, device_name, write
from torch import Tensor, nn

from fastllm import QuantLinear
from fastllm.formats import parse_format
from fastllm.nn.experts import QuantExperts

FORMAT, TOP = "int4-g128", 8
SIZES = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts_per_tok": TOP}  # of Qwen3-30B-A3B


def mixture(count: int, device: str, dtype: torch.dtype, **sizes: int) -> Any:
    """The experts of a layer of Qwen3-MoE, with random weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts = Qwen3MoeExperts(Qwen3MoeConfig(num_experts=count, **{**SIZES, **sizes}))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts.to(device, dtype).requires_grad_(False).eval()


def layers_of(weights: Tensor) -> list[QuantLinear]:
    """One for each expert of weights [E, N, K]."""
    made = []
    for w in weights:
        dense = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype, device="meta")
        dense.weight = nn.Parameter(w, requires_grad=False)
        made.append(QuantLinear.from_linear(dense, FORMAT, "rtn"))
    return made


def loop(up: list[QuantLinear], down: list[QuantLinear], hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """sum over k of weights[t, k] * expert_{index[t, k]}(hidden[t]), expert by expert."""
    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        gate, value = up[expert](hidden[token]).chunk(2, -1)
        y = down[expert](nn.functional.silu(gate) * value) * weights[token, slot, None]
        out.index_add_(0, token, y)
    return out


def routed(tokens: int, count: int, hidden: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, each with TOP different experts and their weights."""
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    index = torch.rand(tokens, count, device=device).topk(min(TOP, count), -1).indices
    return x, index, torch.rand(index.shape, device=device).softmax(-1).to(dtype)


def eager(rotation: list[Callable[[], Any]]) -> Runner:
    """As it is called, without a graph."""
    times = math.ceil(CALLS / len(rotation))
    return Runner(in_turn(rotation, times), times * len(rotation), "eager")


def compared(count: int, tokens: int, gpu: Any, device: str, dtype: torch.dtype, cold: int, **sizes: int) -> dict:
    """Seconds of both, and their ratio. SystemExit if they do not agree."""
    copies: list[tuple[Callable, Callable]] = []
    held = 0
    while held < cold:
        dense = mixture(count, device, dtype, **sizes)
        up, down = layers_of(dense.gate_up_proj), layers_of(dense.down_proj)
        held += sum(layer.nbytes for layer in (*up, *down))
        copies.append((QuantExperts.from_experts(dense, parse_format(FORMAT), "rtn"), partial(loop, up, down)))
    given = routed(tokens, count, up[0].in_features, device, dtype)
    error = error_of(copies[0][0](*given), copies[0][1](*given).float())
    if not error <= ROUNDED:
        raise SystemExit(f"fastllm's experts and the loop differ: relative error {error:.1e}, allowed {ROUNDED:.0e}")
    own, looped = ([partial(pair[i], *given) for pair in copies] for i in (0, 1))
    for call in (*own, *looped):
        call()  # on first use the weights of all experts move into one tensor
    runners = {"loop": eager(looped), "fastllm": eager(own)}
    graph = ready(own, gpu) if gpu is not None else eager(own)
    if graph.mode == "graph":
        runners["fastllm, as a graph"] = graph
    times = measure(runners if gpu is not None else {"loop": looped, "fastllm": own}, "loop", 0.0, gpu)
    seconds = {name: timing.median for name, timing in times.items()}
    return {
        "experts": count, "tokens": tokens, "format": FORMAT, "error": error, "seconds": seconds,
        "no graph": graph.why, "grouped_x": seconds["loop"] / seconds["fastllm"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<device>)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("experts are timed on a CUDA GPU, and torch sees none here")
    with torch.inference_mode():
        row = compared(args.experts, args.tokens, Cuda(), "cuda", torch.bfloat16, cold_bytes("cuda"))
    path = (args.out or RESULTS / device_name("cuda")) / "experts.json"
    write(path, about("cuda"), [row])
    times = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in row["seconds"].items())
    print(f"{args.experts} experts, {args.tokens} tokens: {times}; {row['grouped_x']:.2f}x the loop {row['no graph']}")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
