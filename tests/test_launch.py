"""The launchers on their way to a GPU that is not there: triton's own launch path, with a driver that does nothing.

The interpreter takes arguments that the compiler would not. Here every launcher binds, specialises and compiles as on
an H100; only the last call into the driver is missing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__)


class Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 80, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Launcher:
    launched: list[tuple] = []

    def __init__(self, *_: Any):
        pass

    def __call__(self, *args: Any, **_: Any) -> None:
        self.launched.append(args)


class Driver:
    """What triton asks of a driver, as an H100 would answer."""

    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def launches() -> dict[str, Callable[[], Any]]:
    """One call of each launcher for each kind of problem; tensors lie in plain memory, which nobody reads."""
    import torch

    from fastllm.kernels import dequantize as dequantize_module
    from fastllm.kernels import quant_matmul as quant_matmul_module
    from fastllm.kernels.dequantize import dequantize
    from fastllm.kernels.expert_matmul import expert_matmul, plan_experts
    from fastllm.kernels.quant_matmul import quant_matmul
    from fastllm.kernels.scaled_matmul import quantize_rows, scaled_matmul

    for module in (dequantize_module, quant_matmul_module):
        module.uses_ptx = lambda _: True  # as on a GPU

    def operands(N: int, K: int, bits: int, group: int, zero: bool, dtype: torch.dtype) -> tuple:
        G = -(-K // group)
        z = torch.zeros(N, G, dtype=torch.uint8) if zero else None
        words = torch.zeros(N, 4 * bits * -(-K // 128), dtype=torch.int32)
        return words, torch.ones(N, G, dtype=dtype), z, torch.zeros(N, dtype=dtype)

    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    found: dict[str, Callable[[], Any]] = {}
    for name, (M, N, K, bits, group, zero, dtype) in {
        "decode": (1, 4096, 4096, 4, 128, False, brain),
        "zero points": (1, 4096, 4096, 4, 32, True, half),
        "int8": (1, 4096, 4096, 8, 4096, False, brain),
        "32 rows": (32, 4096, 4096, 4, 128, False, half),
        "64 rows": (64, 4096, 1024, 4, 128, False, brain),
        "prefill": (300, 4096, 4096, 4, 128, False, brain),
        "odd sizes": (3, 37, 201, 4, 64, True, half),
        "float32": (2, 64, 256, 8, 64, False, single),
    }.items():
        x, own = torch.zeros(M, K, dtype=dtype), operands(N, K, bits, group, zero, dtype)
        found[name] = lambda x=x, own=own, bits=bits, group=group: quant_matmul(x, *own, bits, group)
    x, own = torch.zeros(20, 4096, dtype=brain), operands(4096, 4096, 4, 128, False, brain)
    found["batch invariant"] = lambda: quant_matmul(x, *own, 4, 128, batch_invariant=True)
    found["dequantize"] = lambda: dequantize(*own[:3], 4, 128, 4096, brain)
    index = torch.zeros(16, dtype=torch.long)
    found["plan"] = lambda: plan_experts(index, 8, 16)
    stack, tokens = operands(8 * 512, 1024, 4, 128, False, brain), torch.zeros(8, 1024, dtype=brain)
    slots, experts = torch.zeros(64, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    found["experts"] = lambda: expert_matmul(tokens, slots, experts, *stack, 512, 4, 128, 2)
    q, ones = torch.zeros(5, 4096, dtype=torch.int8), torch.ones(4096)
    w8 = torch.zeros(4096, 4096, dtype=torch.int8)
    found["int8 rows"] = lambda: quantize_rows(x)
    found["int8 products"] = lambda: scaled_matmul(q, ones[:5], w8, ones, None, brain)
    q8, wf8 = (t.to(torch.float8_e4m3fn) for t in (q, w8))
    found["float8 rows"] = lambda: quantize_rows(x, torch.float8_e4m3fn)
    found["float8 products"] = lambda: scaled_matmul(q8, ones[:5], wf8, ones, None, brain)
    return found | attention_launches()


def attention_launches() -> dict[str, Callable[[], Any]]:
    """Those of attention, and of what is around it."""
    import torch

    from fastllm.kernels import decode_attention as decode_module
    from fastllm.kernels.append_kv import Store, append_kv
    from fastllm.kernels.decode_attention import decode_attention
    from fastllm.kernels.flash_attention import flash_attention, flash_attention_varlen
    from fastllm.kernels.gated_activation import gated_activation
    from fastllm.kernels.norm import norm
    from fastllm.kernels.rotary import rotary

    decode_module.uses_ptx = lambda _: True

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    q, k, one = new(1, 32, 256, 128), new(1, 8, 256, 128), new(1, 32, 1, 128)
    keys, codes = new(1, 8, 4096, 128), new(1, 8, 4096, 128, dtype=torch.int8)
    scales, end = new(1, 8, 4096, dtype=torch.float32), torch.tensor([3000], dtype=torch.int32)
    ends, tokens, others = torch.tensor([0, 100, 256], dtype=torch.int32), new(256, 32, 128), new(256, 8, 128)
    x, w, angles, slot = new(1, 1, 4096), new(4096), new(1, 1, 128), torch.tensor([7])
    eight = {"format": "int8", "k_scale": scales, "v_scale": scales}
    stores = {
        "append": Store(keys, keys, None, None, slot, 0, None, 16),
        "append int8": Store(codes, codes, scales, scales, slot, 0, None, 8),
    }
    found: dict[str, Callable[[], Any]] = {
        "attention": lambda: flash_attention(q, k, k, causal=True),
        "attention, window": lambda: flash_attention(q, k, k, causal=True, window=64, softcap=30.0),
        "attention, sequences": lambda: flash_attention_varlen(tokens, others, others, ends, ends, 156),
        "decode attention": lambda: decode_attention(one, keys, keys, end),
        "decode attention, int8": lambda: decode_attention(one, codes, codes, end, **eight),
        "rms norm": lambda: norm(x, None, None, w, None, None, 1e-6, False, True),
        "add and norm": lambda: norm(x, x, None, w, None, None, 1e-6, False, True),
        "rotate": lambda: rotary(one, keys[:, :, :1], angles, angles, False),
        "gate": lambda: gated_activation(x, x, "silu"),
    }
    for name, store in stores.items():
        own = (one, keys[:, :, :1], keys[:, :, :1], angles, angles, None, None)
        found[name] = lambda own=own, store=store: append_kv(*own, store, 1e-6, False, False)
    return found


def plain(launched: list[tuple]) -> list[list[Any]]:
    """Grid, kernel and arguments of what was launched; of tensors, whose addresses differ each time, the kind."""
    import torch

    kept = [(*args[:6], *args[9:]) for args in launched]  # without metadata and hooks
    return [[(v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for v in args] for args in kept]


def main() -> None:
    """Prints {name: [launches, seconds of the first call, microseconds of another]}."""
    from triton.runtime import driver

    driver.set_active(Driver())
    found = {}
    for name, launch in launches().items():
        Launcher.launched.clear()
        start = time.perf_counter()
        launch()
        first, count = time.perf_counter() - start, len(Launcher.launched)
        launch()
        before, again = Launcher.launched[:count], Launcher.launched[count:]
        assert plain(before) == plain(again), f"{name}: launched {plain(again)} after {plain(before)}"
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(50):
                launch()
            best = min(best, (time.perf_counter() - start) / 50)
        found[name] = [count, first, 1e6 * best]
    print(json.dumps(found))


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run([sys.executable, HERE], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_launcher_reaches_the_driver(timed: dict[str, list[float]]) -> None:
    assert len(timed) == 27
    split = {"int8 products": 2, "float8 products": 2}
    assert {name: count for name, (count, *_) in timed.items() if count != 1} == split


def test_a_launch_costs_little(timed: dict[str, list[float]]) -> None:
    """Loose bounds, for machines that are busy: they find what makes a launch several times as expensive."""
    assert {name: cost for name, (_, first, cost) in timed.items() if first > 30 or cost > 200} == {}


if __name__ == "__main__":
    main()
