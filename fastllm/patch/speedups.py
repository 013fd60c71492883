"""What `optimize` does beside the weights: attention, fused modules, the decoding loop; checked before they stay."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..decode.cache import KVCache, windows
from ..decode.generate import NO_GRAPH, OUTSIDE, FastGenerate
from ..decode.loop import forward
from ..nn.fused import FusedAttention
from ..probe import outputs
from . import attention as own
from .fuse import PARTS, Fusions, find

WORST = 0.2  # of the root mean square of the logits: what rounding does to tiny models; a lost mask does more
CHECKED = 16  # tokens for which answers are compared, a dozen times


def parts_to_fuse(fuse: bool | str | tuple[str, ...], decode: bool | str) -> tuple[str, ...]:
    """What `fuse` stands for. Raises ValueError for an unknown part, and for an unknown way to decode."""
    parts = PARTS if fuse is True else (fuse,) if isinstance(fuse, str) else tuple(fuse or ())
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"fuse={unknown}: known are {', '.join(PARTS)}, True and False")
    if decode not in (True, False, "compile"):
        raise ValueError(f'decode={decode!r}: known are True, False and "compile"')
    return parts


class Speedups:
    """The three, of one model. `undo` takes them away, in whatever state they are."""

    def __init__(
        self, model: Any, attention: bool, fuse: bool | str | tuple[str, ...], kv_cache: str | None, decode: bool | str
    ):
        """The arguments are those of `optimize`. Raises ValueError as `parts_to_fuse` and `KVCache` do."""
        self.model, self.attention, self.decode, self.kv_cache = model, attention, decode, kv_cache
        self.parts = parts_to_fuse(fuse, decode)
        if kv_cache is not None:
            KVCache(model.config, kv_cache)
        self.fusions = Fusions()
        self.loop: FastGenerate | None = None
        self.before: str | None = None
        self.refused: dict[str, str] = {}  # "attention", "decode": why it is left as it is

    def apply(self, ids: Tensor) -> None:
        """Do what was asked for, as far as the model gives the same answer to the first of ids [1, T]."""
        ids = ids[:, :CHECKED]
        if self.decode and ids.is_cuda:
            from ..kernels.tickets import take_tickets  # needs Triton

            take_tickets(1, ids.device)  # ahead of any capture, transformers' own as well: none could be made then
        if self.attention:
            self._try("attention", lambda: self._set_attention(ids))
        if self.parts:
            parts = self.parts if self.before is not None else tuple(p for p in self.parts if p != "attention")
            self.fusions = find(self.model, ids, parts)
            self.fusions.install()
        if self.decode or self.kv_cache is not None:
            self._try("decode", lambda: self._set_loop(ids))

    def _try(self, name: str, change: Callable[[], None]) -> None:
        try:
            change()
        except _Refused as why:
            self.refused[name] = str(why)

    def _set_attention(self, ids: Tensor) -> None:
        model = self.model
        can = getattr(type(model), "_can_set_attn_implementation", None)
        if can is None or not model._can_set_attn_implementation():
            raise _Refused("its attention does not go through transformers' attention interface")
        want, padded = outputs(model, ids), _padded(model, ids)
        own.register()
        self.before = model.config._attn_implementation
        model.set_attn_implementation(own.NAME)
        try:
            error = max(_error(outputs(model, ids), want), _error(_padded(model, ids), padded))
        except ValueError as why:
            error, reason = float("inf"), str(why)
        else:
            reason = f"the model's answer changes, by {error:.2g} of its size"
        if not error <= WORST:
            self._reset_attention()
            raise _Refused(reason)

    def _reset_attention(self) -> None:
        if self.before is not None:
            self.model.set_attn_implementation(self.before)
            self.before = None

    def _set_loop(self, ids: Tensor) -> None:
        model = self.model
        if not (getattr(model, "can_generate", lambda: False)() and hasattr(model, "generate")):
            raise _Refused("it does not generate")
        if "generate" in model.__dict__:
            raise _Refused("it has a `generate` of its own")
        if self.before is None:
            raise _Refused("it needs fastllm's attention")
        if model.config.is_encoder_decoder:
            raise _Refused("it has an encoder, whose keys the cache does not hold")
        try:
            loop = FastGenerate(model, self.kv_cache, compiled=self.decode == "compile")
            error = _loop_error(model, ids)
        except ValueError as why:
            raise _Refused(str(why)) from why
        if not error <= WORST:
            raise _Refused(f"with fastllm's cache the model's answer changes, by {error:.2g} of its size")
        model.generate = loop.generate
        self.loop = loop

    def undo(self) -> None:
        if self.loop is not None:
            self.model.__dict__.pop("generate", None)
        self.fusions.undo()
        self._reset_attention()
        for module in self.model.modules():
            module.__dict__.pop(own.FALLBACKS, None)

    @property
    def idle(self) -> bool:
        """Whether none of them was asked for."""
        return not (self.attention or self.parts or self.decode or self.kv_cache)

    @property
    def fallbacks(self) -> set[str]:
        """Reasons for which torch's attention ran since."""
        found: set[str] = set()
        return found.union(*(m.__dict__.get(own.FALLBACKS, ()) for m in self.model.modules()))

    def lines(self) -> list[str]:
        """For the report."""
        lines = []
        if self.attention:
            why = self.refused.get("attention")
            lines.append(
                f"attention: left as it is ({why})" if why else f"attention: fastllm's, in place of {self.before}"
            )
            if self.fallbacks:
                lines[-1] += f"; torch's ran for {', '.join(sorted(self.fallbacks))}"
        counts = {part: self.fusions.count(part) for part in self.parts}
        if self.parts:
            told = [f"{done} of {all_} {part}s" for part, (done, all_) in counts.items() if all_]
            lines.append(f"fused: {', '.join(told) or 'nothing'}")
        for reason, names in self.fusions.reasons().items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"not fused {names[0]}{more}: {reason}")
        if self.decode or self.kv_cache is not None:
            why = self.refused.get("decode")
            lines.append(f"generate: transformers' own loop ({why})" if why else f"generate: {self._loop_line()}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The same, with plain values. generate: whether the loop is fastllm's."""
        counts = {part: self.fusions.count(part) for part in self.parts}
        used = {"attention": self.before is not None, "generate": self.loop is not None}
        return {
            **{name: {"fastllm": here, "reason": self.refused.get(_KEYS[name])} for name, here in used.items()},
            "fused": {part: {"fused": done, "of": all_} for part, (done, all_) in counts.items()},
            "not_fused": self.fusions.reasons(),
            "kv_cache": self.kv_cache,
            "fallbacks": sorted(self.fallbacks) + (self.loop.reasons if self.loop else []),
        }

    def _loop_line(self) -> str:
        assert self.loop is not None
        line = f"fastllm's loop, {self.kv_cache or 'dense'} keys and values"
        line += ", by torch.compile" if self.loop.compiled else ""
        stepped = [why for why in self.loop.reasons if why in (NO_GRAPH, OUTSIDE)]
        if others := [why for why in self.loop.reasons if why not in stepped]:
            line += f"; transformers' own ran for {', '.join(others)}"
        if stepped:
            line += f"; without a graph for {', '.join(stepped)}"
        return line


_KEYS = {"attention": "attention", "generate": "decode"}


class _Refused(Exception):
    """Why something is left as it is."""


def _error(got: Tensor, want: Tensor) -> float:
    """The root mean square of the difference, over that of `want`, both float32; where `want` is finite."""
    seen = want.isfinite()
    difference, size = (got - want)[seen].square().mean().sqrt(), want[seen].square().mean().sqrt()
    return float(difference / size.clamp(min=1e-30))


def _behind(ids: Tensor, padding: int) -> Tensor:
    """ids [1, T] and, below, its beginning behind so many tokens of padding: [2, T].

    The beginning, because without its first token many a model is chaotic: roundings change its answer.
    """
    return torch.cat((ids, torch.cat((ids[:, :padding], ids[:, : ids.shape[1] - padding]), 1)))


def _padded(model: Any, ids: Tensor) -> Tensor:
    """The answer to ids [1, T] and, beside it, to its first half behind padding: float32 [tokens, V]."""
    T = ids.shape[1]
    half = T // 2
    ids = _behind(ids, half)
    mask = torch.ones(2, T, dtype=torch.int64, device=ids.device)
    mask[1, :half] = 0
    with torch.no_grad():
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        out = model(input_ids=ids, attention_mask=mask, **decoder)
    logits = getattr(out, "logits", None)
    answer = out.last_hidden_state if logits is None else logits
    return torch.cat((answer[0], answer[1, half:])).float() if not decoder else answer.flatten(0, 1).float()


def _check_windows(model: Any, records: dict[nn.Module, list]) -> None:
    """The loop hands over no mask that tells of a window: modules must, and as the config does for the cache."""
    wanted = windows(model.config)
    for module, calls in records.items():
        twin = getattr(module.__dict__.get("forward"), "__self__", None)
        options = [call[3] for call in calls] or ([twin.options] if isinstance(twin, FusedAttention) else [])
        index = getattr(module, "layer_idx", None)
        for window in (option["window"] for option in options):
            if isinstance(index, int) and index < len(wanted) and window != wanted[index]:
                raise ValueError(
                    f"layer {index} tells its attention of a window of {window}, its config of {wanted[index]}"
                )


def _loop_error(model: Any, ids: Tensor) -> float:
    """How far the loop's logits are from those of one forward pass, a padded row beside a full one."""
    T = min(ids.shape[1], CHECKED)
    if T < 4:
        return 0.0
    ids = _behind(ids[:, :T], T // 4)
    starts = torch.tensor([0, T // 4], dtype=torch.int32, device=ids.device)
    mask = (torch.arange(T, device=ids.device) >= starts[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        with own.recorded(model) as records:
            want = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()
        _check_windows(model, records)
        cache, error, at = KVCache(model.config), 0.0, T // 2
        rows = torch.stack((starts, torch.zeros_like(starts)), 1)[:, None, None]
        for start, end in [(0, at), *((t, t + 1) for t in range(at, T))]:
            rows[..., 1] = end
            got = forward(model, ids[:, start:end], positions[:, start:end], rows, cache, {})
            error = max(error, _error(got.float(), want[:, end - 1]))
    return error
