"""A stand-in for a CUDA graph where there is no GPU: it records a step's operators, and runs them again.

As with a graph, all that Python decided while it was recorded is fixed, results go to the memory that they had then,
and whoever looks at a value raises RuntimeError.
"""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastllm.decode.graph import Steps

LOOKS = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default", "aten.is_nonzero.default"}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if str(func) in LOOKS:
            raise RuntimeError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            results = tensors(out)
            is_view = results and all(t.untyped_storage().data_ptr() in given for t in results)
            if is_view and not func._schema.is_mutable:
                continue  # it shows what has changed
            for old, new in zip(results, tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def capture(steps: Steps) -> Recorder:
    """What `fastllm.decode.graph.capture_cuda` does, on a CPU."""
    for _ in range(3):
        steps.step()
        steps.rewind()
    recorder = Recorder()
    with recorder:
        steps.step()
    return recorder
