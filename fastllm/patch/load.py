"""`load`: a checkpoint's model with packed layers, and all that `optimize` does beside the weights."""

from os import PathLike
from typing import Any

from transformers import PreTrainedModel

from .. import checkpoints
from ..kv_formats import kv_format
from ..nn import BlockSparseLinear, PackedLinear, QuantLinear
from ..ops import layouts_of
from ..probe import outputs, probe, reads_tokens
from .accuracy import agreement
from .apply import Patch
from .plan import as_it_is
from .report import Report, memory
from .speedups import CHECKED, Speedups, parts_to_fuse


def load(
    path: str | PathLike[str],
    *,
    attention: bool = True,
    fuse: bool | str | tuple[str, ...] = True,
    kv_cache: str | None = None,
    decode: bool | str = True,
    **settings: Any,
) -> PreTrainedModel:
    """The model of the checkpoint `path`, in evaluation mode, as `from_pretrained` gives it but fast.

    path:     a local folder with a checkpoint of compressed-tensors, GPTQ, AWQ (gemm) or bitsandbytes (nf4), whose
              layers stay packed; or with a dense one, which `weights` quantizes tensor by tensor, so that it is never
              in memory as a whole (None: it stays dense, and as it is: `fastllm.optimize` does the rest); or a GGUF
              file, which is loaded dense
    attention, fuse, kv_cache, decode: as in `fastllm.optimize`, for models with packed layers
    settings: dtype, of what is not packed; device_map; weights, activations, group_size, method, lm_head, include and
              exclude, as in `fastllm.optimize`, for dense checkpoints; quiet: no progress; auto_class: a class with
              `from_pretrained`, by default the one that config.json names; all others go to `from_pretrained`
              (`fastllm.checkpoints.load` has them one by one)

    The model can be saved with `save_pretrained`, and `fastllm.restore` leaves it with nothing but packed layers.
    Raises FileNotFoundError, ImportError where `gguf` is missing, or ValueError (CheckpointError is one) naming the
    layer or file, the numbers and what to do.
    """
    parts_to_fuse(fuse, decode)
    kv_format(kv_cache)  # complains before anything is read
    model: Any = checkpoints.load(path, **settings)
    text = model.config.get_text_config()
    packed = any(isinstance(module, PackedLinear) for module in model.modules())
    if not packed or not reads_tokens(model) or text is not model.config:
        return model
    speedups = Speedups(model, attention, fuse, kv_cache, decode)
    plan = as_it_is(model)
    for decision in plan.decisions:
        layer = model.get_submodule(decision.name)
        if isinstance(layer, BlockSparseLinear):
            decision.runs = f"{layer.format.name}, {layer.runs}"
        elif isinstance(layer, QuantLinear):
            decision.runs = f"{layer.format.name}, {layouts_of(layer.format)[layer.layout].runs}"
    patch = Patch(Report(model, plan, keep=True), speedups)
    patch.loaded = True
    ids = probe(model, None)[:, :CHECKED]
    before = outputs(model, ids)
    speedups.apply(ids)
    patch.report.accuracy = agreement(before, outputs(model, ids), patch.report.has_vocabulary, real=False)
    patch.report.memory_after = memory(model)
    model._fastllm = patch
    return model
