"""The blocks of a model, run one by one: what goes into each, and what comes out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .samples import Batch

SHOWN = 64  # tokens of an answer that are compared
Watcher = Callable[[str, Tensor, Tensor | None], bool]


class _Stop(Exception):
    """The forward pass has come as far as it is wanted."""


class Blocks:
    """The decoder, or encoder, blocks of a model, with the hidden states that have come so far.

    hidden: of each batch, on the CPU if the model is elsewhere. advance() takes them through a block as it is now.
    """

    def __init__(self, model: Any, batches: list[Batch]):
        """Runs the model up to its first block. ValueError if it has no list of such blocks."""
        self.model, self.batches = model, batches
        self.prefix, self.layers = find_blocks(model)
        self.device = next(self.layers[0].parameters()).device
        self.hidden: list[Tensor] = []
        self._given: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        with torch.no_grad():
            for batch in batches:
                self._enter(batch)

    def __len__(self) -> int:
        return len(self.layers)

    def name(self, index: int) -> str:
        """Of a block within the model."""
        return f"{self.prefix}.{index}"

    def advance(self, index: int) -> None:
        """Replace the hidden states by what a block makes of them."""
        with torch.no_grad():
            for i in range(len(self.batches)):
                self.hidden[i] = self.answer(index, i).to("cpu")

    def watch(self, index: int, layers: Mapping[str, nn.Module], seen: Watcher, batches: int | None = None) -> None:
        """Run a block on every batch, or the first few, and show `seen` what `layers` are given, in their order.

        seen(name of the layer, x [..., K], which rows count: bool [...] or None for all) tells whether that was the
        last of interest: the rest of the block is then left out.
        """
        counted: list[Tensor | None] = [None]

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def call(module: nn.Module, args: tuple[Any, ...]) -> None:
                if seen(name, args[0], _rows(counted[0], args[0])):
                    raise _Stop

            return call

        handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
        try:
            with torch.no_grad():
                for i in range(len(self.batches) if batches is None else min(batches, len(self.batches))):
                    counted[0] = self.batches[i].seen
                    try:
                        self.answer(index, i)
                    except _Stop:
                        continue
        finally:
            for handle in handles:
                handle.remove()

    def answer(self, index: int, batch: int) -> Tensor:
        """What a block makes of one batch."""
        args, kwargs = self._given[self._kind(self.batches[batch])][index]
        return _first(self.layers[index](self.hidden[batch].to(self.device), *args, **kwargs))

    def outcome(self, hidden: Tensor | None = None) -> Tensor:
        """What the model answers to the beginning of the first sample, float32 [T, V], T <= 64, without padding.

        hidden: what its blocks make of the first batch; None: they run.
        """
        batch = self.batches[0]
        if hidden is None:
            found: list[Tensor] = []

            def last(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
                found.append(_first(type(module).forward(module, x, *args, **kwargs)))
                raise _Stop

            with torch.no_grad(), self.replaced(self.layers[-1:], [last]), suppress(_Stop):
                self._run(getattr(self.model, self.model.base_model_prefix, self.model), batch)
            hidden = found[0]
        seen = torch.ones_like(batch.ids[0]) if batch.seen is None else batch.seen[0]
        shown = seen.nonzero()[:SHOWN, 0]
        state = hidden[:1, shown.to(hidden.device)].to(self.device)

        def stub(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (state,) if self._pairs else state

        with torch.no_grad(), self.replaced(self.layers, [stub] * len(self.layers)):
            out = self._run(self.model, Batch(batch.ids[:1, shown], None))
        logits = getattr(out, "logits", None)
        return (out.last_hidden_state if logits is None else logits).flatten(0, -2).float()

    def _run(self, model: Any, batch: Batch) -> Any:
        mask = None if batch.seen is None else batch.seen.to(self.device).long()
        options = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        return model(input_ids=batch.ids.to(self.device), attention_mask=mask, **options)

    def _kind(self, batch: Batch) -> Any:
        """Batches of one kind are given the same masks and positions."""
        return batch.ids.shape if batch.seen is None else id(batch.seen)

    def _enter(self, batch: Batch) -> None:
        """Note what the blocks are given with this batch: they are replaced by stubs, which hand on their input."""
        kind, states, given = self._kind(batch), [], []
        pairs = [False]

        def first(module: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            states.append(hidden)
            if kind in self._given:
                raise _Stop
            given.append((args, _kept(kwargs)))
            if self._pairs is None:
                self._pairs = isinstance(type(module).forward(module, hidden, *args, **kwargs), tuple)
            pairs[0] = self._pairs
            return (hidden,) if pairs[0] else hidden

        def later(module: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            given.append((args, _kept(kwargs)))
            return (hidden,) if pairs[0] else hidden

        with self.replaced(self.layers, [first, *[later] * (len(self.layers) - 1)]):
            with suppress(_Stop):
                self._run(getattr(self.model, self.model.base_model_prefix, self.model), batch)
        self.hidden.append(states[0].to("cpu"))
        if kind not in self._given:
            self._given[kind] = given

    @staticmethod
    @contextmanager
    def replaced(modules: Iterable[nn.Module], forwards: Iterable[Callable[..., Any]]) -> Iterator[None]:
        """Let the modules run `forwards`, each given the module itself first."""
        before = [(module, module.__dict__.get("forward")) for module in modules]
        try:
            for (module, _), forward in zip(before, forwards, strict=True):
                module.__dict__["forward"] = forward.__get__(module)
            yield
        finally:
            for module, old in before:
                if old is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = old

    _pairs: bool | None = None  # whether blocks give tuples


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, the list of blocks): of all lists of alike modules, not within another one, that with most weights."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(m) for m in module}) != 1:
            continue
        size = sum(p.numel() for p in module.parameters())
        if best is None or size > best[0]:
            best = size, name, module
    if best is None:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks, which calibration goes through one by one; "
            'fastllm.optimize(method="hqq") needs no data'
        )
    return best[1], best[2]


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _kept(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a block without caches."""
    return {k: v for k, v in kwargs.items() if k not in ("past_key_values", "past_key_value", "use_cache")}


def _rows(seen: Tensor | None, x: Tensor) -> Tensor | None:
    """Which rows of x [B, T, K] are no padding; None if all, or if x has lost that order (experts)."""
    return seen.to(x.device) if seen is not None and x.shape[:2] == seen.shape else None
