"""A decoding step as a CUDA graph: from embedding to next token in one launch."""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from .loop import State, forward
from .sampling import ROWWISE, Sampler
from .static import StaticKVCache

SLOTS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)  # a graph serves all lengths up to one of them
BLOCK = 8  # steps that are launched before one looks whether all rows have ended
KEPT, KEPT_BYTES = 4, 1 << 32  # graphs of a model that are kept, and their caches; the newest whatever its size


class Replayable(Protocol):
    def replay(self) -> Any: ...


class Steps:
    """State, cache and graph for one batch size, number of slots and way of choosing tokens; used again and again."""

    def __init__(self, model: Any, state: State, cache: StaticKVCache, sampler: Sampler, extra: dict[str, Any]):
        self.model, self.state, self.cache, self.sampler, self.extra = model, state, cache, sampler, extra
        self.graph: Replayable | None = None
        self.before: list[tuple[Tensor, Tensor]] = []  # while it is captured: what a step changes, and its values

    def prefill(self, length: int) -> None:
        """Read the prompt of the state, `length` tokens, and choose the first token."""
        state = self.state
        starts = state.mask[:, 0, 0, :1]
        positions = (torch.arange(length, device=state.ids.device) - starts).clamp_(min=0)
        self.cache.filled.zero_()
        logits = forward(self.model, state.ids[:, :length], positions, state.mask, self.cache, self.extra)
        self.cache.advance(length)
        state.accept(self.sampler(logits, state.ids))

    def logits(self) -> Tensor:
        """Of the newest tokens, [B, V]."""
        state = self.state
        return forward(self.model, state.tokens, state.positions, state.mask, self.cache, self.extra)

    def step(self, logits: Callable[[], Tensor] | None = None) -> None:
        """What the graph holds. All that changes from one step to the next is in tensors that keep their place."""
        self.state.grow()
        found = (logits or self.logits)()
        self.cache.advance(1)
        self.state.accept(self.sampler(found, self.state.ids))

    def capture(self, capture: Callable[["Steps"], Replayable]) -> None:
        """Make the graph of a step, and leave all as it was before. RuntimeError if a step cannot be captured."""
        self.before = [(t, t.clone()) for t in (*self.state.tensors(), self.cache.filled)]
        try:
            self.graph = capture(self)
        finally:
            self.rewind()
            self.before = []

    def rewind(self) -> None:
        """As before the capture: steps that only warm up must not run out of slots."""
        for t, value in self.before:
            t.copy_(value)


def capture_cuda(steps: Steps) -> Replayable:
    """A CUDA graph of a step, which runs three times before: kernels are compiled, and libraries choose theirs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            steps.step()
            steps.rewind()
    current = torch.cuda.current_stream()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            steps.step()
    finally:
        torch.cuda.set_stream(current)  # where a capture fails, torch leaves its stream in place
    return graph


class Compiled:
    """A step whose forward pass torch.compile has made: on a CPU, in the place of a graph."""

    def __init__(self, steps: Steps):
        self.steps = steps
        # a limit meant for functions that are compiled again and again by mistake; each batch size is a function here
        with torch._dynamo.config.patch(recompile_limit=64):
            self.logits = torch.compile(steps.logits, fullgraph=True, dynamic=False)
            self.logits()

    def replay(self) -> None:
        # all that it could depend on keeps its place: `Graphs` looks whether the weights do
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            self.steps.step(self.logits)


def slots_for(tokens: int) -> int:
    """The number of slots of the graph that serves so many tokens."""
    return next((slots for slots in SLOTS if tokens <= slots), -(-tokens // SLOTS[-1]) * SLOTS[-1])


def signature(processors: Sequence[Any], do_sample: bool) -> tuple | None:
    """What a graph that chooses tokens in this way is known by; None if it cannot be in a graph.

    In it are processors that look at nothing but logits, and one that asks which tokens there are: it is shown all
    columns, of which those yet to come repeat the first token.
    """
    found: list[tuple] = [(do_sample,)]
    for p in processors:
        kind = type(p)
        settings = {name: value for name, value in vars(p).items() if not isinstance(value, Tensor)}
        alone = kind in ROWWISE or kind is hf.TopKLogitsWarper
        seen = kind is hf.RepetitionPenaltyLogitsProcessor and not settings.get("prompt_ignore_length")
        if not (alone or seen) or len(settings) != len(vars(p)):
            return None
        found.append((kind, *sorted((name, repr(value)) for name, value in settings.items())))
    return tuple(found)


class Graphs:
    """The graphs of one model, by what they are for; the longest unused one goes when there are too many.

    A model that has been moved or changed since needs new ones: `place` tells.
    """

    def __init__(self, model: Any, kv_cache: str | None, capture: Callable = capture_cuda):
        """capture: makes of `Steps` what is replayed: `capture_cuda` or `Compiled`."""
        self.model, self.kv_cache, self.capture = model, kv_cache, capture
        self.kept: dict[tuple, Steps] = {}
        self.place: tuple = ()
        self.busy = Lock()  # held while a graph is in use: its tensors serve one call at a time

    def where(self) -> tuple:
        """What changes when a weight is moved, or changed, of which others may have been made; and when an adapter
        is switched on or off: a step holds those that were on when it was captured."""
        # blocks of oneDNN's have no address that torch tells, tensors of inference mode no version
        weights = tuple(
            (id(p) if p.is_mkldnn else p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version)
            for p in self.model.parameters()
        )
        return weights, tuple(_adapters(m) for m in self.model.modules() if "_disable_adapters" in m.__dict__)

    def __getstate__(self) -> dict[str, Any]:
        """A copied model makes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("kept", "place", "busy")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, kept={}, place=(), busy=Lock())

    def make_room(self) -> None:
        """Let go of the caches that are too much."""
        while len(self.kept) > 1 and sum(steps.cache.nbytes for steps in self.kept.values()) > KEPT_BYTES:
            self.kept.pop(next(iter(self.kept)))

    def steps(
        self,
        ids: Tensor,
        columns: int,
        starts: Tensor,
        eos: Tensor | None,
        pad: Tensor | None,
        sampler: Sampler,
        extra: dict,
    ) -> Steps | None:
        """Ready for a prompt, ids [B, T]; None if the sampler cannot be in a graph."""
        how = () if self.capture is Compiled else signature(sampler.processors, sampler.do_sample)
        if how is None:
            return None
        sampler.looks = self.capture is Compiled
        if (place := self.where()) != self.place:
            self.kept.clear()
            self.place = place
        ends = None if eos is None else (tuple(eos.tolist()), None if pad is None else int(pad))
        slots = slots_for(columns)
        key = (len(ids), slots, how, ends, tuple(sorted(extra)))
        steps = self.kept.pop(key, None)
        if steps is None:
            state = State(ids, slots, starts, eos, pad)
            cache = StaticKVCache(self.model.config, self.kv_cache, slots, ids.device)
            steps = Steps(self.model, state, cache, sampler, extra)
            if len(self.kept) >= KEPT:
                self.kept.pop(next(iter(self.kept)))
        else:
            steps.state.begin(ids, starts)
            steps.sampler = sampler
        self.kept[key] = steps
        return steps


def _adapters(layer: Any) -> tuple:
    """Which adapters PEFT uses in a layer of its own, how strongly, and whether merged or chosen row by row."""
    scaling, hooks = tuple(getattr(layer, "scaling", {}).items()), tuple(layer._forward_pre_hooks)
    return layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters), scaling, hooks


class Watch:
    """Whether all rows have ended, told a block late, so that no one waits for the device."""

    def __init__(self, state: State):
        self.state, on_gpu = state, state.ids.is_cuda
        self.flag = torch.ones((), dtype=torch.bool, pin_memory=on_gpu)
        self.event = torch.cuda.Event() if on_gpu else None
        self.asked = False

    def ended(self) -> bool:
        """What was asked for the last time; and ask again."""
        if self.event is not None and self.asked:
            self.event.synchronize()
        ended = self.asked and not bool(self.flag)
        self.flag.copy_(self.state.unfinished.any(), non_blocking=True)
        if self.event is not None:
            self.event.record()
        self.asked = True
        return ended


def run_graph(steps: Steps, length: int, columns: int, stops: Sequence[Callable], streamer: Any) -> Tensor:
    """As `loop.run`, by replaying a graph. length: of the prompt. columns: when to stop at the latest."""
    state, prompt = steps.state, length
    watch, one_by_one = Watch(state), bool(stops) or streamer is not None
    while True:
        block = 1
        if length == prompt:
            steps.prefill(prompt)
        else:
            assert steps.graph is not None
            block = 1 if one_by_one else min(BLOCK, columns - length)
            for _ in range(block):
                steps.graph.replay()
        length += block
        if streamer is not None:
            streamer.put(state.newest())
        state.ask(stops, length)
        ended = not bool(state.unfinished.any()) if one_by_one else state.eos is not None and watch.ended()
        if length == columns or ended:
            break
    if streamer is not None:
        streamer.end()
    return state.ids[:, : length if one_by_one else trim(state, prompt, length)]


def trim(state: State, prompt: int, length: int) -> int:
    """Where the last row to end has its end token, of what may be a block too far."""
    if state.eos is None:
        return length
    ends = torch.isin(state.ids[:, prompt:length], state.eos).cpu()
    last = torch.where(ends.any(1), ends.int().argmax(1) + 1, length - prompt)
    return prompt + int(last.max())
