"""The decoding loop: one token after the other, with as little as possible between them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache
from .sampling import Sampler


class State:
    """All that a step reads and writes; tensors keep their place, so that a CUDA graph of a step can be replayed.

    ids:       int64 [B, columns]: the tokens so far; columns to come repeat the first
    column:    int64 [1]: how many columns are filled
    tokens:    int64 [B, 1]: the newest
    positions: int64 [B, 1]: theirs, from the first token of the row that is no padding
    mask:      int32 [B, 1, 1, 2]: the first key of each row, and the end of its keys
    unfinished: bool [B]: rows that have not come to an end token
    """

    def __init__(self, ids: Tensor, columns: int, starts: Tensor, eos: Tensor | None, pad: Tensor | None):
        """ids [B, T]: the prompt. starts int32 [B]: padding before each row. eos: end tokens. pad: what follows."""
        B, device = len(ids), ids.device
        self.ids = torch.empty(B, columns, dtype=torch.int64, device=device)
        self.column = torch.empty(1, dtype=torch.int64, device=device)
        self.tokens, self.positions = self.ids.new_empty(B, 1), self.ids.new_empty(B, 1)
        # starts and ends lie apart, each where a multiple of 16 bytes is, as kernels like their operands
        self.mask = torch.empty(2, -(-B // 4) * 4, dtype=torch.int32, device=device)[:, :B].t()[:, None, None]
        self.unfinished = torch.empty(B, dtype=torch.bool, device=device)
        self.eos, self.pad = eos, pad
        self.begin(ids, starts)

    def begin(self, ids: Tensor, starts: Tensor) -> None:
        """Start with a prompt, of the same number of rows, in the same memory."""
        T = ids.shape[1]
        self.ids[:, :T], self.ids[:, T:] = ids, ids[:, :1]
        self.column.fill_(T)
        self.tokens.copy_(ids[:, -1:])
        self.positions.copy_(T - 1 - starts[:, None])
        self.mask[:, 0, 0, 0], self.mask[:, 0, 0, 1] = starts, T
        self.unfinished.fill_(True)

    def tensors(self) -> list[Tensor]:
        """Those that a step changes."""
        return [self.ids, self.column, self.tokens, self.positions, self.mask, self.unfinished]

    def accept(self, tokens: Tensor) -> None:
        """Take the chosen tokens [B] as the newest, or padding in rows that are at their end."""
        if self.pad is not None:
            tokens = torch.where(self.unfinished, tokens, self.pad)
        if self.eos is not None:
            self.unfinished.logical_and_((tokens[:, None] != self.eos).all(1))
        self.tokens.copy_(tokens[:, None])
        self.ids.index_copy_(1, self.column, self.tokens)
        self.column.add_(1)
        self.positions.add_(1)

    def newest(self) -> Tensor:
        """The newest tokens [B], on the CPU, for keeps."""
        return self.tokens[:, 0].to("cpu", copy=True)

    def ask(self, stops: Sequence[Callable], length: int) -> None:
        """End the rows that transformers' criteria say have ended with the `length` tokens so far."""
        for stop in stops:
            # some answer for each row, some with one bool for all
            self.unfinished.logical_and_(torch.logical_not(torch.as_tensor(stop(self.ids[:, :length], None))))

    def grow(self) -> None:
        """The newest tokens are about to be read: their keys will be the last."""
        self.mask[..., 1].add_(1)


def prefill(model: Any, state: State, cache: KVCache, length: int, sampler: Sampler, extra: dict[str, Any]) -> None:
    """Read the prompt, but for what the cache holds already, and choose the first token."""
    past = cache.get_seq_length()
    if past >= length:  # the last token is read again, for its logits
        cache.crop(length - 1 - past)
        past = length - 1
    ids = state.ids[:, past:length]
    starts = state.mask[:, 0, 0, :1]
    positions = (torch.arange(past, length, device=ids.device) - starts).clamp_(min=0).to(torch.int64)
    logits = forward(model, ids, positions, state.mask, cache, extra)
    state.accept(sampler(logits, state.ids[:, :length]))


def step(model: Any, state: State, cache: KVCache, length: int, sampler: Sampler, extra: dict[str, Any]) -> None:
    """Read the newest token, of a sequence that is `length` long with it, and choose the next."""
    state.grow()
    logits = forward(model, state.tokens, state.positions, state.mask, cache, extra)
    state.accept(sampler(logits, state.ids[:, :length]))


def forward(model: Any, ids: Tensor, positions: Tensor, mask: Tensor, cache: KVCache, extra: dict[str, Any]) -> Tensor:
    """The logits [B, V] after the last of ids [B, T]."""
    out = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **extra,
    )
    return out.logits[:, -1]


def run(
    model: Any,
    state: State,
    cache: KVCache,
    length: int,
    sampler: Sampler,
    stops: Sequence[Callable],
    streamer: Any,
    extra: dict[str, Any],
) -> Tensor:
    """Tokens until every row has ended, the columns are full, or `stops` (transformers' criteria) say so: [B, T].

    length: that of the prompt. extra: arguments of every forward pass.
    """
    columns, watch = state.ids.shape[1], state.eos is not None
    read = prefill
    while True:
        read(model, state, cache, length, sampler, extra)
        read, length = step, length + 1
        if streamer is not None:
            streamer.put(state.newest())
        if stops:
            state.ask(stops, length)
        if length == columns or (watch or stops) and not bool(state.unfinished.any()):
            break
    if streamer is not None:
        streamer.end()
    return state.ids[:, :length]
