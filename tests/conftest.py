"""Ground rules for every test: kernels run anywhere, unwritten memory shows, nothing is fetched."""

import importlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, slowly; read when triton is first imported
os.environ["HF_HUB_OFFLINE"] = "1"  # what would fetch something fails at once; read when transformers is imported

torch.set_num_threads(1)  # the shapes are small: more threads would only wait for each other
torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN, so an unwritten output shows


@pytest.fixture
def device() -> str:
    """Where the op under test runs. The random seed is fixed."""
    torch.manual_seed(0)
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def opaque(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops stay ops under torch.compile, as they do on a GPU."""
    for name in ("append_kv", "decode_attention", "gated_activation", "norm", "quant_matmul", "rotary"):
        monkeypatch.setattr(importlib.import_module(f"fastllm.ops.{name}"), "is_traced", lambda x: False)
    torch._dynamo.reset()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
