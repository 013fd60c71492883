"""Activations of 8 bits: what is written is read by transformers alone, where fastllm cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_activations_saved import quantized
from tiny import output, tokens
from torch import Tensor, nn

from fastllm.nn import QuantLinear

READER = """
import json, sys
sys.modules["fastllm"] = None
import torch, transformers
from safetensors.torch import save_file
transformers.utils.logging.set_verbosity_error()
request, out = json.load(open(sys.argv[1])), {}
for i, path in enumerate(request["paths"]):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        out[f"{i}"] = model.eval()(torch.tensor(request["ids"]))[0].contiguous()
    out |= {f"{i}.{name}": p.detach().clone() for name, p in model.named_parameters() if name.endswith("_proj.weight")}
save_file(out, sys.argv[2])
"""


class AsCompressedTensors(nn.Module):
    """How that library computes a layer: like ours, but of int8 a row's largest becomes 127.5, cut to 127 or -128."""

    def __init__(self, layer: QuantLinear):
        super().__init__()
        self.weight, self.bias, self.rounds = layer.dequantize(), layer.bias, layer.format.activations

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds == "fp8":
            scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
            x = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
        elif self.rounds:
            scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127.5
            x = (x / scale).round().clamp(-128, 127) * scale
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.peers
def test_stock_transformers_reads_it(tmp_path: Path) -> None:
    """Weights to the bit; the output to float32's precision, once its way of rounding activations is allowed for."""
    settings: dict[str, Any] = {"dtype": torch.float32}
    models = [
        quantized(**settings),
        quantized(lm_head="int8-a8", attention_bias=True, **settings),
        quantized("gemma3_text", tie_word_embeddings=True, **settings),
        quantized("mixtral", **settings),
        quantized(kind="fp8", lm_head="fp8", attention_bias=True, **settings),
        quantized("gemma3_text", kind="fp8", tie_word_embeddings=True, **settings),
    ]
    paths = [str(tmp_path / str(i)) for i in range(len(models))]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(path)
    (tmp_path / "in.json").write_text(json.dumps({"ids": tokens().tolist(), "paths": paths}))
    arguments = [str(tmp_path / "in.json"), str(tmp_path / "out.safetensors")]
    subprocess.run([sys.executable, "-c", READER, *arguments], check=True, cwd=tmp_path)
    out = load_file(arguments[1])
    for i, model in enumerate(models):
        model._fastllm.speedups.undo()  # to their order of float32 operations, which 8 bits make visible
        ours, got = output(model), out[f"{i}"]
        kinds = {layer.format.name for layer in model.modules() if isinstance(layer, QuantLinear)}
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                if f"{i}.{name}.weight" in out:
                    assert torch.equal(out[f"{i}.{name}.weight"], layer.dequantize()), name
                model.set_submodule(name, AsCompressedTensors(layer))
        theirs = output(model)
        assert theirs.isfinite().all() and (got - theirs).norm() < 1e-3 * theirs.norm()
        if "int8-a8" in kinds:
            assert (
                4e-3 * ours.norm() < (got - ours).norm() < 0.1 * ours.norm()
            )  # which the bound above would have seen
        else:  # the library divides by 448 as we do; heads of int8 are multiplied in bfloat16
            assert (got - ours).norm() < (4e-3 if "int8" in kinds else 1e-3) * ours.norm()
        for layer in model.modules():
            if isinstance(layer, AsCompressedTensors):
                layer.rounds = None
        assert (got - output(model)).norm() > 4e-3 * ours.norm(), "that activations are rounded is seen"
