"""Models to prune, what they answer, and all of their state."""

from typing import Any

import families
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

LAYERS = 4


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A tiny random model of four layers, whose norms and biases are not those of a model that was just made."""
    kind, settings = (families.FAMILIES | families.MORE_FAMILIES)[family]
    own: dict[str, Any] = {"n_layer" if kind == "gpt2" else "num_hidden_layers": LAYERS}
    if "layer_types" in settings:
        own["layer_types"] = families.KINDS * (LAYERS // 2)
    return families.rough(tiny.build(kind, seed, dtype, **(families.COMMON | settings | own | more)))


def data(rows: int = 8, length: int = 48) -> Tensor:
    """Token ids that follow each other by a rule of their own, [rows, length]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, families.VOCABULARY, (rows, length), generator=generator)


def state(model: Any) -> dict[str, Any]:
    """All that pruning changes: which parameters there are and what they hold, attributes, and the configuration."""
    plain = (int, float, str, bool, type(None))
    return {
        "parameters": {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()},
        "modules": [(name, id(m)) for name, m in model.named_modules()],
        "values": {n: {k: v for k, v in vars(m).items() if isinstance(v, plain)} for n, m in model.named_modules()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules()],
        "config": model.config.to_dict(),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if (
        any(a[key] != b[key] for key in ("modules", "values", "config", "hooks"))
        or a["parameters"].keys() != b["parameters"].keys()
    ):
        return False
    pairs = ((v, b["parameters"][name]) for name, v in a["parameters"].items())
    return all(v[0] == w[0] and torch.equal(v[1].nan_to_num(7e7), w[1].nan_to_num(7e7)) for v, w in pairs)


def cached_and_not(model: Any, ids: Tensor, steps: int = 6) -> tuple[Tensor, Tensor]:
    """Logits of the tokens that `generate` adds, with a cache of keys and values and without, [steps, V] each."""
    found = []
    for use_cache in (True, False):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.append(torch.cat(out.logits))
    return found[0], found[1]
