"""The op `fastllm::append_kv`: all that happens between the projections and attention.

Heads of q and k are normalized if the model does that, turned by their position, and the new keys and values written
into the cache, quantized if it is. On a GPU that is one launch (kernels/append_kv.py), safe to capture into a graph.
"""

from typing import Any

import torch
from torch import Tensor

from ..kv_formats import KV_FORMATS, KVFormat
from .library import define_fused, is_traced, is_watched
from .norm import FAST, check_norm, cpu_rms, rms
from .rotary import check_rotary, cpu_rotary, cpu_turn, one_tensor, turn


def append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | int,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    cast_first: bool = False,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    format: str | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """rotary(rms_norm(q)) [B, Hq, S, D], contiguous; rotary(rms_norm(k)) and v are written into the cache.

    q, k, v: [B, Hq, S, D], [B, Hkv, S, D], [B, Hkv, S, Dv], of one dtype; usually views of one projection's output
    cos, sin, interleaved: as in `rotary`; None and None for heads that are not turned
    q_weight, k_weight, eps, cast_first: as in `rms_norm`, over D; None for heads that are not normalized
    k_cache, v_cache: [B, Hkv, L, D] and [B, Hkv, L, Dv], or with a block table pages [pages, Hkv, page_size, ...]; of
        q's dtype, or in `format`, a name in fastllm.kv_formats.KV_FORMATS, with k_scale and v_scale
    slots: places of the new tokens in their sequences, int32 or int64 [S] or [B, S]; negative: not written. Or the
        first place of all rows, as a number.
    block_table: int32 [B, max_pages]: the pages that a sequence's slots lie in, page_size to a page

    What is written has been rounded to q's dtype after the norm and after the rotation, and then quantized. A slot
    beyond the end is an error on the CPU; on a GPU, where to ask would mean to wait, it is not written. Gradients
    reach q through the result; nothing flows back from the cache. ValueError for operands that do not fit.
    """
    place, first = (slots, 0) if isinstance(slots, Tensor) else (None, slots)
    operands: tuple[Any, ...] = (q, k, v, cos, sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale)
    operands += (place, first, block_table, format, eps, cast_first, interleaved)
    if is_traced(q) and place is not None and place.ndim == 1 and block_table is None:
        return _traced(*operands)
    if is_watched(q, k, v, q_weight, k_weight):
        return torch.ops.fastllm.append_kv(*operands)
    return _forward(*operands)


def _check_cache(
    x: Tensor, cache: Tensor, scale: Tensor | None, what: str, paged: bool, format: KVFormat | None
) -> None:
    """Raise ValueError unless rows of x [B, H, S, D] can go into the cache."""
    B, H, _, D = x.shape
    if format is None:
        width, dtype, want_scale = D, x.dtype, None
    else:
        if reasons := format.reasons(D):
            raise ValueError(f"{what} cannot be stored as {format.name}: {'; '.join(reasons)}")
        width, dtype = format.width(D), format.dtype
        want_scale = (*cache.shape[:3], *format.scale_shape(D))
    fits = cache.ndim == 4 and cache.shape[1] == H and cache.shape[3] == width and cache.dtype == dtype
    if not fits or not paged and cache.shape[0] != B or cache.stride(3) != 1 or cache.device != x.device:
        rows = f"[pages, {H}, page_size, {width}]" if paged else f"[{B}, {H}, L, {width}]"
        raise ValueError(
            f"{what}_cache must be {dtype} {rows} on {x.device}, with unit inner stride; got {cache.dtype} "
            f"{list(cache.shape)} on {cache.device}, strides {cache.stride()}"
        )
    if format is None or want_scale is None:
        if scale is not None:
            raise ValueError(f"{what}_scale is given, but no format that has scales")
        return
    if scale is None or scale.shape != want_scale or scale.dtype != format.scale_dtype or scale.device != x.device:
        got = "None" if scale is None else f"{scale.dtype} {list(scale.shape)} on {scale.device}"
        raise ValueError(f"{what}_scale must be {format.scale_dtype} {list(want_scale)} on {x.device}; got {got}")
    if scale.ndim == 5 and not scale[0, 0, :1].is_contiguous():
        raise ValueError(f"the last two dimensions of {what}_scale must be contiguous; got strides {scale.stride()}")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | None,
    first: int,
    table: Tensor | None,
) -> None:
    """Raise ValueError unless new tokens and places fit; that caches do is for `_check_cache`."""
    if not q.ndim == k.ndim == v.ndim == 4 or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must be [B, H, S, D] of one dtype; got {q.shape}, {k.shape} and {v.shape}")
    (B, _, S, D), (Bk, Hk, Sk, Dk), (Bv, Hv, Sv, Dv) = q.shape, k.shape, v.shape
    if not B == Bk == Bv or not S == Sk == Sv or Hk != Hv or D != Dk or D % 2 or Dv % 2:
        raise ValueError(
            f"q [B, Hq, S, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv] with D and Dv even are wanted; got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if k_cache.shape[0] != v_cache.shape[0] or k_cache.shape[2] != v_cache.shape[2]:
        raise ValueError(f"k_cache and v_cache differ in length: {list(k_cache.shape)} and {list(v_cache.shape)}")
    length = k_cache.shape[2]
    if table is not None:
        if table.dtype != torch.int32 or table.ndim != 2 or len(table) != B or table.stride(1) != 1:
            raise ValueError(f"block_table must be int32 [{B}, max_pages]; got {table.dtype} {list(table.shape)}")
        length *= table.shape[1]
    if slots is None:
        if not 0 <= first <= length - S:
            raise ValueError(f"{S} tokens from slot {first} on do not fit into {length} slots: make the cache longer")
    elif slots.dtype not in (torch.int32, torch.int64) or slots.shape not in ((S,), (B, S)):
        raise ValueError(f"slots must be int32 or int64 [{S}] or [{B}, {S}]; got {slots.dtype} {list(slots.shape)}")
    for name, t in (("k", k), ("v", v), ("slots", slots), ("block_table", table)):
        if t is not None and t.device != q.device:
            raise ValueError(f"{name} is on {t.device} and q on {q.device}: move one of them")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    slots: Tensor | None,
    first: int,
    table: Tensor | None,
    name: str | None,
    eps: float,
    cast_first: bool,
    interleaved: bool,
) -> Tensor:
    if name is not None and name not in KV_FORMATS:
        raise ValueError(f"format must be None or one of {', '.join(KV_FORMATS)}; got {name!r}")
    format = None if name is None else KV_FORMATS[name]
    _check(q, k, v, k_cache, v_cache, slots, first, table)
    _check_cache(k, k_cache, k_scale, "k", table is not None, format)
    _check_cache(v, v_cache, v_scale, "v", table is not None, format)
    check_norm(q, eps, None, q_weight, k_weight)
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin go together: give both, or neither")
    if cos is not None and sin is not None:
        check_rotary(q, k, cos, sin)
    if q.is_cuda and q.dtype in FAST:
        from ..kernels.append_kv import Store  # Triton is imported on first use
        from ..kernels.append_kv import append_kv as launch

        bits = format.bits if format else 16
        store = Store(k_cache, v_cache, k_scale, v_scale, slots, first, table, bits)
        return launch(q, k, v, cos, sin, q_weight, k_weight, store, eps, cast_first, interleaved)
    q, k = _cpu_heads(q, k, cos, sin, q_weight, k_weight, eps, cast_first, interleaved)
    slots, first = _run(slots, first)
    write(stored(k, v, k_cache, v_cache, k_scale, v_scale, format), slots, first, table)
    return q.contiguous()


def _cpu_heads(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cast_first: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """q and k normalized and turned: both at once, where they lie side by side. q is never part of an operand."""
    same = q.dtype in FAST and (cos is None or sin is None or cos.dtype == sin.dtype == q.dtype)
    both = one_tensor(q, k) if same and q_weight is not None and k_weight is not None and q.numel() else None
    if both is None or q_weight is None or k_weight is None:
        if q_weight is None and cos is None:
            q = q.clone()
        q = q if q_weight is None else cpu_rms(q, q_weight, eps, cast_first)
        k = k if k_weight is None else cpu_rms(k, k_weight, eps, cast_first)
        return (q, k) if cos is None or sin is None else cpu_rotary(q, k, cos, sin, interleaved)
    heads = (q.shape[1], k.shape[1])
    both = cpu_rms(both if cast_first else both.float(), None, eps, False)
    for part, weight in zip(both.split_with_sizes(heads, 1), (q_weight, k_weight), strict=True):
        part.mul_(weight)
    if both.dtype != q.dtype:
        both = both.to(q.dtype)
    if cos is not None and sin is not None:
        both = cpu_turn(both, cos, sin, interleaved)
    q, k = both.split_with_sizes(heads, 1)
    return q, k


def _run(slots: Tensor | None, first: int) -> tuple[Tensor | None, int]:
    """Slots that follow each other, in all rows alike, as (None, the first of them): the CPU can look."""
    if slots is None or not slots.numel() or slots.is_cuda or slots.ndim == 2 and len(slots) > 1:
        return slots, first
    if slots.numel() == 1:
        found = [int(slots)]
    else:
        found = slots.flatten().tolist()
    if found[0] >= 0 and found == list(range(found[0], found[0] + len(found))):
        return None, found[0]
    return slots, first


def stored(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    format: KVFormat | None,
) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the cache, and what of k and v [B, H, S, ...] goes into each."""
    if format is None or k_scale is None or v_scale is None:
        return [(k_cache, k), (v_cache, v)]
    if k.shape == v.shape:  # at once: half the operators
        (k, v), (k_scales, v_scales) = (both.unbind(0) for both in format.quantize(torch.stack((k, v))))
    else:
        (k, k_scales), (v, v_scales) = format.quantize(k), format.quantize(v)
    return [(k_cache, k), (k_scale, k_scales), (v_cache, v), (v_scale, v_scales)]


def write(parts: list[tuple[Tensor, Tensor]], slots: Tensor | None, first: int, table: Tensor | None) -> None:
    """Write rows [B, H, S, ...] into tensors of the cache, at their slots. ValueError for slots beyond it."""
    (cache, new), *_ = parts
    B, _, S, size = *new.shape[:3], cache.shape[2]
    if table is None and slots is None:
        if first + S > size:
            raise ValueError(f"slot {first + S - 1} is beyond the {size} of the cache: make it longer")
        for to, rows in parts:
            to.narrow(2, first, S).copy_(rows)
        return
    places = torch.arange(first, first + S, device=new.device) if slots is None else slots.long()
    places = places.expand(B, S)
    row, token = (places >= 0).nonzero(as_tuple=True)
    at, page = places[row, token], row
    length = size if table is None else size * table.shape[1]
    if not new.is_cuda and len(at) and int(at.max()) >= length:
        raise ValueError(f"slot {int(at.max())} is beyond the {length} of the cache: make it longer")
    if table is not None:
        page, at = table[row, at // size].long(), at % size
    for to, rows in parts:
        to[page, :, at] = rows[row, :, token]


def _define(*operands: Any) -> Tensor:
    """The definition of the op."""
    q, k, v, cos, sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, slots, first, table, *_ = operands
    name, eps, cast_first, interleaved = operands[-4:]
    format = None if name is None else KV_FORMATS[name]
    q, k = _heads(q, k, cos, sin, q_weight, k_weight, eps, cast_first, interleaved)
    with torch.no_grad():
        parts = stored(k.detach(), v.detach(), k_cache, v_cache, k_scale, v_scale, format)
        write(parts, slots, first, table)
    return q.clone(memory_format=torch.contiguous_format)


def _traced(*operands: Any) -> Tensor:
    """The definition for slots [S] that are all written, without a step that looks at them."""
    q, k, v, cos, sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, slots, *_ = operands
    name, eps, cast_first, interleaved = operands[-4:]
    q, k = _heads(q, k, cos, sin, q_weight, k_weight, eps, cast_first, interleaved)
    format = None if name is None else KV_FORMATS[name]
    for to, rows in stored(k, v, k_cache, v_cache, k_scale, v_scale, format):
        to.index_copy_(2, slots.long(), rows)
    return q.contiguous()


def _heads(
    q: Tensor, k: Tensor, cos: Any, sin: Any, q_weight: Any, k_weight: Any, eps: float, cast_first: bool, paired: bool
) -> tuple[Tensor, Tensor]:
    """q and k, normalized and turned, by definition."""
    q = q if q_weight is None else rms(q, q_weight, eps, cast_first)
    k = k if k_weight is None else rms(k, k_weight, eps, cast_first)
    return (q, k) if cos is None else (turn(q, cos, sin, paired), turn(k, cos, sin, paired))


def _like(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_NEW = "Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight"
_CACHE = "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale"
_PLACE = "Tensor? slots, SymInt first, Tensor? block_table, str? format"
_HOW = "float eps, bool cast_first, bool interleaved"
define_fused(f"append_kv({_NEW}, {_CACHE}, {_PLACE}, {_HOW}) -> Tensor", _forward, _define, _like)
