"""`write_gptq`: a model with packed layers as a GPTQ checkpoint, for readers that know no other."""

import re
from os import PathLike
from typing import Any

from transformers import PreTrainedModel

from ..formats import Format, IntFormat
from ..nn import QuantLinear
from .gptq import METHOD, V1, GptqLayer
from .save import CacheScales, SaveHook, Storage


class GptqStorage(Storage):
    """How each packed layer of a model is to be stored: all of them in one format."""

    def __init__(self, model: PreTrainedModel, cache_scales: CacheScales | None = None):
        """cache_scales are not stored: the format has no place for them."""
        head = model.get_output_embeddings()
        self.head = next((name for name, module in model.named_modules() if module is head), None)
        self.formats: dict[Format, str] = {}  # that are stored, and a layer of each
        super().__init__(model)

    def _scheme(self, name: str, layer: QuantLinear) -> Any:
        format, (N, K), per_word = layer.format, layer.shape, 32 // layer.format.bits
        if name == self.head:
            self.why[name] = "readers of GPTQ want the output head dense"
        elif layer.transposed:
            self.why[name] = "its weight is [in, out], which the format does not know"
        elif N % per_word or K % format.group_of(K) or K % per_word:
            self.why[name] = f"[{N}, {K}] does not divide into groups of {format.group} and words of {per_word}"
        elif self.names.converted(f"{name}.weight"):
            self.why[name] = "its checkpoint name belongs to several weights"
        else:
            self.formats.setdefault(format, name)
            return GptqLayer(format.bits, format.group, format.symmetric)
        return None

    def _experts_scheme(self) -> Any:
        scheme = None
        for name, module in self.experts.items():
            patterns = self.names.experts(name, "gate_up_proj" if module.shell.has_gate else "up_proj") or []
            for layer in module.layers():
                format, (N, K), per_word = layer.format, layer.shape, 32 // layer.format.bits
                if not patterns:
                    self.why[name] = "its experts have no checkpoint names of their own"
                elif N // len(patterns) % per_word or K % format.group_of(K) or K % per_word:
                    self.why[name] = (
                        f"[{N}, {K}] does not divide into groups of {format.group} and words of {per_word}"
                    )
            if name not in self.why:
                format = module.layers()[0].format
                self.formats |= {layer.format: name for layer in module.layers()}
                scheme = GptqLayer(format.bits, format.group, format.symmetric)
        return scheme

    def config(self) -> dict[str, Any] | None:
        if not self.formats:
            return None
        first = next(iter(self.formats))
        return {
            "quant_method": METHOD,
            "bits": first.bits,
            "group_size": first.group or -1,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": V1,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["fastllm"]},
            **self._dense_rules(),
        }

    def _dense_rules(self) -> dict[str, Any]:
        """What tells readers which layers are dense: GPTQModel and vLLM by patterns, optimum by names in a block."""
        dense = [name for name in self.dense if name != self.head]
        if not dense:
            return {}
        packed, left = (
            {_in_block(name) for name in names}
            for names in ([name for name, (_, scheme) in self.linears.items() if scheme is not None], dense)
        )
        rules: dict[str, Any] = {"dynamic": {f"-:^{re.escape(name)}$": {} for name in dense}}
        if packed and not packed & left and not self.experts:
            rules["modules_in_block_to_quantize"] = [sorted(packed)]
        return rules

    def refuse(self) -> None:
        for format, name in self.formats.items():
            if not isinstance(format, IntFormat) or not format.symmetric or format.activations:
                raise ValueError(
                    f"{name} is {format.name}, and GPTQ holds symmetric int4 and int8 weights: zero points in its "
                    "version 1 are read in two ways; use save_pretrained, or a format such as int4-g128"
                )
        if len(self.formats) != 1:
            found = ", ".join(f"{name} is {format.name}" for format, name in self.formats.items()) or "none is packed"
            raise ValueError(
                f"a GPTQ checkpoint holds one format for all layers, and here {found}; quantize them alike, or use "
                "save_pretrained"
            )


def _in_block(name: str) -> str:
    """The name without that of the block: "mlp.up_proj" of "model.layers.0.mlp.up_proj"."""
    return re.sub(r"^.*?\.\d+\.", "", name)


class GptqHook(SaveHook):
    storage = GptqStorage


def write_gptq(model: PreTrainedModel, folder: str | PathLike[str], **kwargs: Any) -> None:
    """Write `model`, with layers of one symmetric format, int4 or int8, to `folder` as a GPTQ checkpoint.

    It is in version 1 of the format, in the original order of inputs (`desc_act: false`), which GPTQModel and vLLM
    read; so does `fastllm.load`, to the bit. Scales are stored in float16 where that holds them exactly. A packed
    output head is stored dense, as are layers that GPTQ cannot hold, with a warning. kwargs go to `save_pretrained`.

    Raises ValueError, naming a layer, for formats with zero points or rounded activations, and for several formats.
    Source of the format: https://github.com/AutoGPTQ/AutoGPTQ.
    """
    hook = GptqHook.attach(model)
    try:
        model.save_pretrained(folder, **kwargs)
    finally:
        hook.detach()
