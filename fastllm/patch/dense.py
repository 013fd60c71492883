"""`to_dense`: back to plain layers, with the weights that the packed ones stand for."""

import copy
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..nn import PackedLinear, QuantExperts
from ..nn.linear import move_hook
from .apply import is_patched, unwrapped
from .errors import NotSupportedError


def to_dense(model: Any) -> Any:
    """Make every sparse and quantized layer a plain one, with the weight that it stands for. Returns the model.

    What `save_pretrained` then writes is a dense checkpoint, as large as before, which everything loads. The model is
    not optimized any more, and the weights that it had before are gone.

    Raises NotSupportedError for a model without such layers, and for quantized experts.
    """
    inner: Any = unwrapped(model)
    found = {n: m for n, m in inner.named_modules() if isinstance(m, PackedLinear)}
    if not found and not is_patched(inner):
        raise NotSupportedError("the model has no sparse or quantized layer; nothing to make dense")
    if adapted := next((name for name, m in inner.named_modules() if hasattr(m, "base_layer")), None):
        raise NotSupportedError(f"{adapted} has adapters, which are for the packed layer beneath; unload() them first")
    if experts := [name for name, m in inner.named_modules() if isinstance(m, QuantExperts)]:
        raise NotSupportedError(f"{experts[0]} has quantized experts, which stay; fastllm.restore(model) undoes them")
    patch = inner.__dict__.pop("_fastllm", None)
    if patch is not None:
        patch.speedups.undo()
        if patch.hook is not None:
            patch.hook.detach()
    hook = inner.__dict__.get("hf_quantizer")
    if hook is not None:  # of a checkpoint that was loaded packed
        hook.detach()
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if isinstance(head, PackedLinear):  # it is not what the embedding is
        untie(inner)
    for name, layer in found.items():
        inner.set_submodule(name, _dense(layer, None if patch is None else patch.originals.get(name)))
    return model


def untie(model: Any) -> None:
    """Let the head have a weight of its own, here and in whatever is saved."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    for module in model.modules():
        if getattr(module, "all_tied_weights_keys", None):
            module.all_tied_weights_keys = {}


def _dense(layer: Any, original: nn.Module | None) -> nn.Module:
    weight = layer.dequantize()
    if original is not None:
        new: Any = copy.copy(original)  # with parameters of its own
        new._parameters = dict(original._parameters)
    elif layer.transposed:
        new = Conv1D(layer.out_features, layer.in_features)
    else:
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    new.weight = nn.Parameter(weight.t().contiguous() if layer.transposed else weight)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    if hook := getattr(layer, "_hf_hook", None):
        move_hook(hook, new)
    return new.train(layer.training)
