"""Attention under a mask as transformers hands it over: none, dense, or the compact one of `patch.attention`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.decode_config import MOST_QUERIES
from ..ops.attention import attention
from ..ops.decode_attention import decode_attention

# Keyword arguments that modules pass on, and that change nothing about what attention computes.
HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "num_items_in_batch",
    "logits_to_keep",
    "deterministic",
}


def refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that has a value and a meaning that is not known here."""
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in HARMLESS)
    if unknown:
        raise ValueError(
            f"fastllm's attention does not know {', '.join(unknown)}, and would be wrong without; "
            'model.set_attn_implementation("sdpa") goes back to torch\'s'
        )


def is_compact(mask: Tensor | None) -> bool:
    """Whether `mask` is int32 [B, 1, 1, 2 or 3]: first key and end of keys of each row, and a sliding window."""
    return mask is not None and mask.dtype == torch.int32


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, Hq, T, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv] -> [B, Hq, T, Dv].

    mask: None: causal or full; compact; or bool (True: attend) or additive, broadcast to [B, Hq, T, L], which then
    says all: `causal` and `window` no longer count, for they are in it. The causal diagonal ends at the last key.
    """
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
    T = q.shape[2]
    if mask is None or mask.dtype == torch.int32:
        if mask is not None:
            if mask.shape[1:3] != (1, 1) or mask.shape[3] not in (2, 3):
                raise ValueError(f"a compact mask is int32 [B, 1, 1, 2 or 3], got {list(mask.shape)}: was it cut?")
            if mask.shape[3] == 3 and window is None:
                window = int(mask[0, 0, 0, 2])  # the module did not say it, only the mask does
            options |= bounds(mask, k.shape[2])
        watched = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if q.is_cuda and T <= MOST_QUERIES and (causal or T == 1) and not watched:
            end = options.pop("kv_end", None)
            if end is None:
                end = torch.full((len(q),), k.shape[2], dtype=torch.int32, device=q.device)
            return decode_attention(q, k, v, end, window=window, **options)
        return attention(q, k, v, causal=causal and (T > 1 or window is not None), window=window, **options)
    if mask.shape[-1] > k.shape[2]:
        mask = mask[..., : k.shape[2]]
    return attention(q, k, v, mask=mask, **options)


def bounds(mask: Tensor, keys: int) -> dict[str, Tensor]:
    """kv_start and kv_end of a compact mask, without those that say nothing, where that is free to know.

    An end beyond the keys counts tokens that a sliding cache has dropped: the keys are the last.
    """
    start, end = mask[:, 0, 0, 0], mask[:, 0, 0, 1]
    if start.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = end.tolist()
        if min(ends) >= keys and all(first <= last - keys for first, last in zip(start.tolist(), ends, strict=True)):
            return {}
    gone = (end - keys).clamp(min=0)
    return {"kv_start": (start - gone).clamp(min=0), "kv_end": end - gone}
