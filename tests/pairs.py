"""A model and its double: one of them is patched, the other says what is right."""

import copy

import torch
from close import assert_close
from families import build, ids, rough

import fastllm

PADDINGS = {"none": [0, 0], "left": [3, 0], "right": [0, -4]}
OPTIONS = {"decode": False, "quiet": True}


def made(family, dtype=torch.float32):
    """A model that computes attention by itself, and its double."""
    model = rough(build(family, dtype, every_expert=family in ("mixtral", "gpt-oss")))
    model.set_attn_implementation("eager")
    return model, copy.deepcopy(model)


def mask(padding, tokens=9):
    """1 where a token is, [2, tokens]; positive padding is on the left."""
    columns = torch.arange(tokens)
    rows = [(columns >= n) & (columns < tokens + min(n, 0)) for n in PADDINGS[padding]]
    return torch.stack(rows).long()


@torch.no_grad()
def answer(model, padding="none", **more):
    """What the model says about the tokens that are none: [tokens, V]."""
    seen = mask(padding)
    out = model(ids(), attention_mask=None if padding == "none" else seen, **more)
    return out[0][seen.bool()]


def counts(report):
    return " ".join("/".join(map(str, report.speedups.fusions.count(part))) for part in report.speedups.parts)


def fused(family="llama", dtype=torch.float32, **options):
    model, plain = made(family, dtype)
    fastllm.optimize(model, None, **{**OPTIONS, **options})
    return model, plain


def same(model, plain, dtype=torch.float32):
    assert_close(answer(model), answer(plain).double(), dtype=dtype)
