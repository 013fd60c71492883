"""A small trained model, on which good quantization can be told from bad: bytes in, bytes out."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fastllm.compress.blocks import Blocks
from fastllm.compress.calibrate import Layer, find_groups, observe
from fastllm.compress.samples import batches
from fastllm.compress.statistics import Statistics
from fastllm.diagnose import perplexity
from fastllm.formats import Format, parse_format

DATA = Path(__file__).parent / "data"
WINDOW = 256


def trained(dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(DATA / "tiny-llama", dtype=dtype).eval()


def text(name: str, tokens: int) -> Tensor:
    """The first bytes of "calibration" or "validation"."""
    raw = bytearray((DATA / f"tiny-llama-{name}.bin").read_bytes()[:tokens])
    return torch.frombuffer(raw, dtype=torch.uint8).long()


def calibration(samples: int = 48) -> Tensor:
    return text("calibration", samples * WINDOW)


def quality(model, windows: int = 40) -> float:
    """Perplexity per byte."""
    return perplexity(model, text("validation", windows * WINDOW), None, window=WINDOW, bos=None).value


def linears(model, format: str | Format) -> dict[str, Layer]:
    return {
        name: Layer(module, parse_format(format))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


@cache
def observed(samples: int = 16) -> dict[str, tuple[Tensor, Statistics]]:
    """By the name of each linear layer of the model as it is: its weight, and what goes into it."""
    model = trained()
    layers = linears(model, "int8")
    blocks = Blocks(model, batches(calibration(samples), None, 256, samples, WINDOW))
    found = {}
    for index in range(len(blocks)):
        mine = {name: layer for name, layer in layers.items() if name.startswith(blocks.name(index) + ".")}
        groups = find_groups(blocks, index, mine)
        for group, seen in zip(groups, observe(blocks, index, mine, groups, True), strict=True):
            found |= {name: (layers[name].weight, seen) for name in group.names}
        blocks.advance(index)
    return found


def outliers(rows: int = 4096) -> tuple[Tensor, Tensor]:
    """(w [192, 256], x [rows, 256]): inputs that depend on each other, four of them fifty times as large."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(192, 256, generator=generator) / 16
    x = torch.randn(rows, 256, generator=generator) @ (
        torch.eye(256) + 0.3 * torch.randn(256, 256, generator=generator) / 16
    )
    x[:, [3, 70, 131, 200]] *= 50
    return w, x
