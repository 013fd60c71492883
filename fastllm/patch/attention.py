"""fastllm's attention among those of transformers: the function, and the mask that belongs to it.

Both are registered under one name, for transformers drops the mask of a function that has none registered. The name
holds neither "flash", by which transformers would take it for another library's, nor "/".
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

from ..nn.attend import attend, is_compact, refuse_unknown

NAME = "fastllm"
RECORD = "_fastllm_record"  # where a module finds the list that notes its calls, while it is being looked at
FALLBACKS = "_fastllm_fallbacks"  # where it finds the set of reasons for which torch's own attention ran


def register() -> None:
    """Make `model.set_attn_implementation("fastllm")` possible. Once is enough; more often does no harm."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, compact_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' contract: query [B, Hq, T, D], key and value [B, Hkv, L, D] -> ([B, T, Hq, Dv], None).

    attention_mask: what `compact_mask` returned, or a dense one. With dropout, or if the weights of the attention are
    asked for, torch's attention runs, and the model's report says so; that one knows neither softcap nor sinks, so
    with them ValueError is raised, as it is for arguments that are not known here.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    options: dict[str, Any] = {
        "causal": is_causal,
        "scale": scaling,
        "window": sliding_window,
        "softcap": softcap,
        "sinks": s_aux,
    }
    record: Any = getattr(module, RECORD, None)
    if record is not None:
        record.append((query, key, value, options, position_bias, kwargs))
    reasons = [
        why for why, here in (("dropout", dropout > 0), ("output_attentions", kwargs.get("output_attentions"))) if here
    ]
    if reasons:
        module.__dict__.setdefault(FALLBACKS, set()).update(reasons)
        if softcap or s_aux is not None:
            raise ValueError(
                f"{' and '.join(reasons)} with softcap or sinks: torch's attention knows neither; "
                'model.set_attn_implementation("eager") does'
            )
        mask = dense_mask(attention_mask, query, key, is_causal, sliding_window)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal and mask is None, position_bias, **kwargs
        )
    refuse_unknown(kwargs)
    if position_bias is not None:
        mask = dense_mask(attention_mask, query, key, is_causal, sliding_window)
        attention_mask = position_bias if mask is None else add_bias(mask, position_bias)
    y = attend(query, key, value, attention_mask, **options)
    return y.transpose(1, 2).contiguous(), None


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[nn.Module, list]]:
    """While it lasts, each module notes its calls of the attention function: (q, k, v, options, bias, others)."""
    records: dict[nn.Module, list] = {module: [] for module in model.modules()}
    for module, calls in records.items():
        module.__dict__[RECORD] = calls
    try:
        yield records
    finally:
        for module in records:
            module.__dict__.pop(RECORD, None)


def add_bias(mask: Tensor, bias: Tensor) -> Tensor:
    """The additive mask of both."""
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias


def dense_mask(mask: Tensor | None, q: Tensor, k: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """Bool [B or 1, 1, T, L], True: attend, for a compact mask or none; other masks as they are."""
    T, L = q.shape[2], k.shape[2]
    if mask is not None and not is_compact(mask):
        return mask
    if mask is None and not (causal and T > 1):
        return None
    keys = torch.arange(L, device=q.device)
    start: Any = 0
    end: Any = L
    if mask is not None:
        start, end = (t[..., None] for t in mask[..., :2].unbind(-1))  # [B, 1, 1, 1]
    rows = torch.arange(T, device=q.device)[:, None] + (end - T)
    seen = (keys >= start) & (keys < end)
    if causal:
        seen = seen & (keys <= rows)
    if window is not None:
        seen = seen & (keys > rows - window) & (causal | (keys < rows + window))
    return seen.expand(-1, -1, T, -1) if seen.ndim == 4 else seen[None, None]


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass: None, compact, or bool [B, 1, T, L], whichever is the smallest that says all.

    attention_mask: bool [B, tokens seen], False: padding. Compact is int32 [B, 1, 1, 2]: the first key of each row,
    and the end of its keys, on which the diagonal ends where there is one; and, as a third number, a sliding window.
    """
    kind, window = kind_of(mask_function)
    if torch.compiler.is_compiling() and attention_mask is not None:
        kind = "other"  # where the padding lies is only known when it runs
    given = dict(kwargs, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function, device=device)
    given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    if kind == "other":
        return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **given)
    end = q_offset + q_length - kv_offset if kind == "causal" else kv_length
    start: int | Tensor = 0
    if attention_mask is not None:
        seen = attention_mask[:, kv_offset : kv_offset + kv_length]
        start, last, whole = _stretch(seen)
        # padding behind the tokens: its queries see the tokens alone, which no diagonal says
        if not whole or kind == "causal" and bool((last < end).any()):
            return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **given)
        if kind == "full":
            end = last
    skip = allow_is_causal_skip if kind == "causal" else allow_is_bidirectional_skip
    if skip and attention_mask is None and not isinstance(end, Tensor) and end == kv_length and window is None:
        return None
    rows = torch.empty(batch_size, 1, 1, 2 if window is None else 3, dtype=torch.int32, device=device)
    rows[:, 0, 0, 0], rows[:, 0, 0, 1] = start, end
    if window is not None:
        rows[:, 0, 0, 2] = window
    return rows


def _stretch(seen: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Of bool [B, L]: where the first True of each row is, where the last ends, and whether all between are True."""
    L = seen.shape[1]
    numbers = seen.int()
    first = numbers.argmax(1)
    count = numbers.sum(1)
    last = L - numbers.flip(1).argmax(1)
    return first, torch.where(count > 0, last, 0), bool(((count == 0) | (last - first == count)).all())


def kind_of(mask_function: Callable) -> tuple[str, int | None]:
    """("causal" | "full" | "other", sliding window or None) of a mask function of transformers."""
    if mask_function is causal_mask_function:
        return "causal", None
    if mask_function is bidirectional_mask_function:
        return "full", None
    if torch.compiler.is_compiling():
        return "other", None  # what a function closes over cannot be traced
    parts = _cell(mask_function, and_masks(causal_mask_function), "mask_functions")
    if parts is not None and len(parts) == 2 and causal_mask_function in parts:
        other = parts[0] if parts[1] is causal_mask_function else parts[1]
        window = _cell(other, sliding_window_overlay(1), "sliding_window")
        if window is not None:
            return "causal", window
    return "other", None


def _cell(function: Callable, like: Callable, name: str) -> Any:
    """The variable `name` that `function` closes over, if its code is that of `like`; else None."""
    code = getattr(function, "__code__", None)
    if code is None or code is not like.__code__ or name not in code.co_freevars:
        return None
    cells: Any = function.__closure__
    return cells[code.co_freevars.index(name)].cell_contents
