"""A cache whose tokens are counted on the device, so that a CUDA graph of a step can be replayed."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.decode_config import MOST_QUERIES
from ..kv_formats import KV_FORMATS, KVFormat
from ..nn.attend import attend
from ..ops.append_kv import append_kv
from ..ops.decode_attention import decode_attention
from .cache import KVCache, KVLayer, windows


class StaticKVLayer(KVLayer):
    """`KVLayer` with memory for a fixed number of tokens: attention has all slots, and a mask that says which count.

    filled: int64 [1], the tokens held, shared by all layers and moved on by whoever runs the model. Nothing is dropped
    where a window has passed.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, format: KVFormat | None, window: int | None, slots: int, filled: Tensor):
        super().__init__(format, None, slots)
        self.is_sliding = window is not None
        self.filled = filled

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._allocate(key_states.shape, value_states.shape, self.slots)
        if self.device.type == "cpu":
            for held in self._stored():
                held.zero_()  # compiled attention multiplies what it does not see by zero, and NaN would stay NaN
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, T, D] and return all slots, dense; what lies beyond the tokens held has no meaning."""
        self.append(key_states[:, :0], key_states, value_states, cos=None, sin=None)
        return self._all()

    def append(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        T = k.shape[2]
        slots = self.filled if T == 1 else self.filled + torch.arange(T, device=k.device)
        cos, sin = options.pop("cos"), options.pop("sin")
        return append_kv(q, k, v, cos, sin, self._keys(), self._values(), slots, **self._scales(), **options)

    def attend(
        self, q: Tensor, mask: Tensor | None, *, causal: bool, window: int | None = None, **options: Any
    ) -> Tensor:
        """As `KVLayer.attend`; the mask is compact, and tells where the keys of each row end."""
        if mask is None:
            raise ValueError("a static cache needs the compact mask, which tells how many of its slots are filled")
        if q.shape[2] > MOST_QUERIES:
            return attend(q, *self._all(), mask, causal=causal, window=window, **options)
        start, end = mask[:, 0, 0, 0], mask[:, 0, 0, 1]
        options |= self._scales()
        return decode_attention(q, self._keys(), self._values(), end, kv_start=start, window=window, **options)

    def _all(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, dense."""
        if self.format is None:
            return self._keys(), self._values()
        k, v, k_scale, v_scale = self._stored()
        return self.format.dequantize(k, k_scale, self.dtype), self.format.dequantize(v, v_scale, self.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots, 0

    def get_seq_length(self) -> Any:
        return self.filled[0]

    def get_max_length(self) -> int:
        return self.slots

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("tokens are not taken back from a static cache; use fastllm.KVCache")

    def reset(self) -> None:
        self.filled.zero_()


class StaticKVCache(KVCache):
    """`KVCache` for a fixed number of slots. filled: int64 [1] on the device; `advance` after each forward pass."""

    def __init__(self, config: Any, format: str | None, slots: int, device: torch.device):
        super().__init__(config, format)
        self.filled = torch.zeros(1, dtype=torch.int64, device=device)
        kind = None if format is None else KV_FORMATS[format]
        self.layers = [StaticKVLayer(kind, window, slots, self.filled) for window in windows(config)]

    def advance(self, tokens: int) -> None:
        self.filled.add_(tokens)
