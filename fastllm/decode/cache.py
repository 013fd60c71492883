"""`KVCache`: keys and values of all layers, dense or quantized, in memory that grows by itself."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..kernels.decode_config import MOST_QUERIES
from ..kv_formats import KVFormat, kv_format
from ..ops.append_kv import append_kv
from ..ops.attention import attention
from ..ops.decode_attention import decode_attention

FIRST = 128  # slots of a layer that is not told how many it will need; doubled when they are full
SLACK = 64  # tokens beyond its window that a sliding layer keeps, so that as many can be taken back


class KVLayer(CacheLayerMixin):
    """Keys [B, Hkv, slots, D] and values [B, Hkv, slots, Dv] of one layer, as codes and scales if it has a format.

    Tokens lie in the order in which they came, `dropped` older ones, which a window no longer reaches, are gone.
    Everything is counted on the host: no tensor is read to learn a length.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, format: KVFormat | None = None, window: int | None = None, slots: int = 0):
        """format: how rows are stored, None: as they come. window: keys that a query sees. slots: to begin with."""
        super().__init__()
        self.format, self.window, self.slots = format, window, slots
        self.is_sliding = window is not None
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        self.length = self.dropped = 0  # tokens held, tokens gone
        self.record_past = False  # whether nothing may go, for it could be taken back: transformers sets and unsets it

    # What transformers asks of a layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._allocate(key_states.shape, value_states.shape, self._sized(max(self.slots, key_states.shape[2])))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, T, D] and return all that is held, dense: quantized rows are what they were rounded to."""
        T = key_states.shape[2]
        if self._make_room(key_states, value_states):
            self._write(key_states, value_states)
            return self.dense()
        # more than a window's memory: they are attended to once, and the last of them kept
        keep, new = self._kept(), (key_states, value_states)
        k, v = (torch.cat((held, self._rounded(x)), 2) for held, x in zip(self.dense(), new, strict=True))
        self.dropped, self.length = self.dropped + self.length + T - keep, 0
        self._write(key_states[:, :, -keep:], value_states[:, :, -keep:])
        return k, v

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next `update` returns, and how many tokens came before the first of them."""
        gone = self._surplus(query_length)
        return self.length - gone + query_length, self.dropped + gone

    def get_seq_length(self) -> int:
        return self.dropped + self.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; their number is given as a negative one, as transformers does.

        Raises ValueError for a positive one, and for more than a window that has moved on still holds.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers has tensors here
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) would be ambiguous: crop(-n) takes back the last n tokens")
        left = self.length + tokens_to_remove
        if left < (min(self.window - 1, self.dropped + left) if self.window and self.dropped else 0):
            raise ValueError(f"{-tokens_to_remove} tokens cannot be taken back: those before them are no longer held")
        self.length = left

    def activate_past_recording(self) -> None:
        """As transformers calls it before it takes back any number of tokens."""
        self.record_past = True

    def reset(self) -> None:
        self.length = self.dropped = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices.to(t.device)])

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0] if self.is_initialized else -1

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that it holds."""
        tensors = (self.keys, self.values, self.k_scale, self.v_scale)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    # What the fused attention asks of it.

    def append(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | None:
        """`fastllm.ops.append_kv` into this layer: q, with norm and rotation. None: too many for it, use `update`.

        q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv]; options: cos, sin, q_weight, k_weight ...
        """
        if not self._make_room(k, v):
            return None
        at, self.length = self.length, self.length + k.shape[2]
        cos, sin = options.pop("cos"), options.pop("sin")
        return append_kv(q, k, v, cos, sin, self._keys(), self._values(), at, **self._scales(), **options)

    def attend(
        self, q: Tensor, mask: Tensor | None, *, causal: bool, window: int | None = None, **options: Any
    ) -> Tensor:
        """The attention of the last T tokens, q [B, Hq, T, D], to all that is held -> [B, Hq, T, Dv].

        mask: None or compact (`fastllm.nn.attend`). options: scale, softcap, sinks.
        """
        T = q.shape[2]
        first = 0 if window is None else max(0, self.length - T + 1 - window)
        start = self._start(mask, first)
        if T > MOST_QUERIES or self.format is None and not q.is_cuda:
            k, v = self.dense(first)
            return attention(q, k, v, causal=T > 1, window=window if T > 1 else None, kv_start=start, **options)
        k, v, *scales = (t[:, :, first : self.length] for t in self._stored())
        end = torch.full((q.shape[0],), self.length - first, dtype=torch.int32, device=q.device)
        if self.format is not None:
            options |= {"k_scale": scales[0], "v_scale": scales[1], "format": self.format.name}
        return decode_attention(q, k, v, end, kv_start=start, window=window if T > 1 else None, **options)

    def _start(self, mask: Tensor | None, first: int) -> Tensor | None:
        """The first key of each row, of those held without the `first` of them; None: all are seen.

        The end that the mask gives is that of the tokens held, however it counts.
        """
        if mask is None:
            return None
        start, end = mask[:, 0, 0, 0], mask[:, 0, 0, 1]
        if start.device.type == "cpu":
            earlier = int(end[0]) - self.length + first
            return None if max(start.tolist()) <= earlier else (start - earlier).clamp_(min=0)
        return (start - (end - self.length + first)).clamp_(min=0)

    def dense(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, length - first, D] of the tokens held, without the `first` of them."""
        if self.format is None:
            return self.keys[:, :, first : self.length], self.values[:, :, first : self.length]
        k, v, k_scale, v_scale = (t[:, :, first : self.length] for t in self._stored())
        return self.format.dequantize(k, k_scale, self.dtype), self.format.dequantize(v, v_scale, self.dtype)

    # Memory.

    def _keys(self) -> Tensor:
        assert self.keys is not None
        return self.keys

    def _values(self) -> Tensor:
        assert self.values is not None
        return self.values

    def _scales(self) -> dict[str, Any]:
        """The scales and their format, as ops take them."""
        name = None if self.format is None else self.format.name
        return {"k_scale": self.k_scale, "v_scale": self.v_scale, "format": name}

    def _stored(self) -> tuple[Tensor, ...]:
        tensors = (self.keys, self.values, self.k_scale, self.v_scale)
        return tuple(t for t in tensors if t is not None)

    def _each(self, change: Any) -> None:
        if self.is_initialized:
            for name in ("keys", "values", "k_scale", "v_scale"):
                if (held := getattr(self, name)) is not None:
                    setattr(self, name, change(held))

    def _allocate(self, k_shape: torch.Size, v_shape: torch.Size, slots: int) -> None:
        B, H, _, D = k_shape
        Dv, format = v_shape[-1], self.format
        dtype = self.dtype if format is None else format.dtype
        for name, size in (("key", D), ("value", Dv)):
            width = size if format is None else format.width(size)
            setattr(self, name + "s", torch.empty(B, H, slots, width, dtype=dtype, device=self.device))
            if format is not None:
                if why := format.reasons(size):
                    raise ValueError(f"a cache of {format.name}: {', '.join(why)}; use int8, or none")
                shape = (B, H, slots, *format.scale_shape(size))
                scale = torch.empty(shape, dtype=format.scale_dtype, device=self.device)
                setattr(self, name[0] + "_scale", scale)

    def _kept(self) -> int:
        """Tokens that a window may still need, when the next one comes or some have been taken back."""
        assert self.window is not None
        return self.window - 1 + SLACK

    def _sized(self, slots: int) -> int:
        """How many slots to have where so many are needed: with a window, never more than serve it for long."""
        slots = max(slots, FIRST)
        return slots if self.window is None or self.record_past else min(slots, max(FIRST, 2 * (self.window + SLACK)))

    def _surplus(self, T: int) -> int:
        """How many of the tokens held go before T more come: those that a window has left behind, if they must."""
        if not self.is_initialized or self.window is None or self.length + T <= self._sized(self.length + T):
            return 0
        return max(0, self.length - self._kept())

    def _make_room(self, k: Tensor, v: Tensor) -> bool:
        """Room for k and v. False: they would fill a window's memory by themselves."""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        T, slots = k.shape[2], self.keys.shape[2]
        if gone := self._surplus(T):
            for t in self._stored():
                t[:, :, : self.length - gone] = t[:, :, gone : self.length].clone()
            self.length, self.dropped = self.length - gone, self.dropped + gone
        if self.length + T <= slots:
            return True
        most = self._sized(max(2 * slots, self.length + T))
        if self.length + T > most:
            return False
        self._each(lambda t: torch.cat((t, t.new_empty(*t.shape[:2], most - slots, *t.shape[3:])), 2))
        return True

    def _write(self, k: Tensor, v: Tensor) -> None:
        here = slice(self.length, self.length + k.shape[2])
        self.length = here.stop
        new = [k, v]
        if self.format is not None:
            (k, k_scale), (v, v_scale) = self.format.quantize(k), self.format.quantize(v)
            new = [k, v, k_scale, v_scale]
        for held, rows in zip(self._stored(), new, strict=True):
            held[:, :, here] = rows

    def _rounded(self, x: Tensor) -> Tensor:
        return x if self.format is None else self.format.dequantize(*self.format.quantize(x), x.dtype)


class KVCache(Cache):
    """A cache for `generate` and for any causal model of transformers whose layers are attention, full or sliding.

    Give it as `past_key_values`, or let `fastllm.optimize(model, kv_cache=...)` make one for each `generate`. It keeps
    dense rows by default; "int8" rounds each token's key and value of each head to 8 bits, "int4" to 4 in groups of 32
    (`fastllm.kv_formats`). Layers fused by `optimize` read the codes as they are; others are given dense rows.
    """

    def __init__(self, config: Any, format: str | None = None, slots: int = 0):
        """config: the model's. format: None, "int8" or "int4". slots: tokens to make room for at once.

        Raises ValueError for an unknown format, and for a model that has layers of another kind.
        """
        self.format = kv_format(format)
        if self.format is not None and (why := self.format.reasons(head_dim(config))):
            raise ValueError(f"kv_cache={format!r}: {', '.join(why)}")
        super().__init__(layers=[KVLayer(self.format, window, slots) for window in windows(config)])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        return sum(layer.nbytes for layer in self.layers)


def head_dim(config: Any) -> int:
    """The size of a head, as the model's config tells it."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def windows(config: Any) -> list[int | None]:
    """The sliding window of each layer of a causal model, None: it has none.

    Raises ValueError if a layer is not attention, or shares the keys of another.
    """
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return [window] * text.num_hidden_layers
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"layers of {', '.join(unknown)} keep something other than keys and values")
    if getattr(text, "num_kv_shared_layers", 0):
        raise ValueError("some layers share the keys and values of others")
    return [window if kind == "sliding_attention" else None for kind in kinds]
