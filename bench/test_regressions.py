"""A few representative times, for pytest-benchmark to keep and compare. Not part of the tests.

    python -m pytest bench/test_regressions.py --benchmark-autosave            (now)
    python -m pytest bench/test_regressions.py --benchmark-compare             (later, on the same machine)

Add `-m gpu` for the cases on a GPU, where a round is one replay of a CUDA graph over cold weights.
"""

import importlib
import sys
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm.formats import parse_format

pytest.importorskip("pytest_benchmark")
sys.path.insert(0, str(Path(__file__).parent))
measure, providers = importlib.import_module("measure"), importlib.import_module("providers")

CPU = [
    ("bf16", "int8", 1),
    ("int8", "int8", 1),
    ("int8", "int8", 64),
    ("int4", "int4-g32", 1),
    ("int4", "int4-g32", 64),
]
GPU = [("bf16", "int4-g128", 1), ("bf16", "int4-g128", 1024)] + [
    ("fastllm", format, M) for format in ("int4-g128", "int8") for M in (1, 16, 64, 256, 1024)
]
SHAPES = {"cpu": (2048, 640), "cuda": (8192, 8192)}


def rotation(name: str, format: str, M: int, device: str) -> list[Any]:
    """Calls of the dense product or of fastllm's choice, on cold copies of a weight; checked first."""
    problem = providers.Problem(parse_format(format), *SHAPES[device], torch.bfloat16, device)
    provider = providers.Dense(torch.bfloat16) if name == "bf16" else providers.Packed("fastllm")
    made = provider.prepare(problem)
    x = torch.randn(M, problem.K, dtype=torch.bfloat16, device=device)
    states = [made.make() for _ in range(measure.copies(made.bytes, measure.cold_bytes(device)))]
    assert measure.error_of(made.run(states[0], x), x.float() @ made.weight.t()) <= made.bound
    return [partial(made.run, state, x) for state in states]


@pytest.mark.parametrize("name, format, M", CPU, ids=lambda v: str(v))
def test_cpu(benchmark: Any, name: str, format: str, M: int) -> None:
    with torch.inference_mode():
        calls, turn = rotation(name, format, M, "cpu"), count()
        benchmark(lambda: calls[next(turn) % len(calls)]())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name, format, M", GPU, ids=lambda v: str(v))
def test_gpu(benchmark: Any, name: str, format: str, M: int) -> None:
    with torch.inference_mode():
        runner = measure.ready(rotation(name, format, M, "cuda"), measure.Cuda())
        assert runner.mode == "graph", runner.why
        benchmark.extra_info["calls"] = runner.calls

        def replay() -> None:
            runner.replay()
            torch.cuda.synchronize()

        benchmark.pedantic(replay, rounds=30, warmup_rounds=3)
