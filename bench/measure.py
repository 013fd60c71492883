"""One way to time calls, on a CPU and on a GPU: cold weights, candidates in turns, medians.

On a GPU each candidate is a CUDA graph of at least 20 calls that rotate over so many copies of its weight that each
call reads memory. Graphs are replayed in turns, the baseline before and after every candidate (A-B-A), each between
two events. On a CPU the calls themselves are taken in turns.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

COLD = 96 << 20  # bytes of weights to rotate over on a CPU: three times the largest cache that we expect
COLD_GPU = 200_000_000  # on a GPU at least, and four times its L2
CALLS, TURNS = 20, 30  # calls of a graph, replays of it, at least
REPLAY = 4e-4  # seconds that a replay should take: the events' own time and the graph's start then do not count
MOST_CALLS = 480  # of a graph, but for a single round over many copies: capturing one takes the host about 20 us

Rotation = Sequence[Callable[[], Any]]


class Timing(NamedTuple):
    """Seconds per call, over `samples` replays of `calls` calls. mode: "graph", "eager", "host" (the CPU's clock)."""

    median: float
    p10: float
    p90: float
    samples: int
    calls: int
    mode: str


class Runner(NamedTuple):
    """A rotation made ready: `replay()` makes `calls` calls and returns what the last gave. why: it is no graph."""

    replay: Callable[[], Any]
    calls: int
    mode: str
    why: str = ""


def summary(samples: Sequence[float], calls: int, mode: str) -> Timing:
    """The median and the 10th and 90th of a hundred of `samples`, seconds of one replay each."""
    each = sorted(sample / calls for sample in samples)

    def at(q: float) -> float:
        return each[round(q * (len(each) - 1))]

    return Timing(statistics.median(each), at(0.1), at(0.9), len(each), calls, mode)


def cold_bytes(device: str) -> int:
    """Bytes to rotate over so that no call finds its weight in a cache."""
    if device == "cpu":
        return COLD
    return max(COLD_GPU, 4 * torch.cuda.get_device_properties(0).L2_cache_size)


def copies(bytes_each: int, cold: int = COLD) -> int:
    """How many copies of a weight make it cold: each call then reads memory, as in a model."""
    return max(1, math.ceil(cold / max(1, bytes_each)))


def rounds(copies: int, seconds: float) -> int:
    """How often a graph goes over all copies, given that one round takes `seconds`: whole rounds, so all stay cold."""
    wanted = math.ceil(REPLAY / max(seconds, 1e-7))
    return max(1, math.ceil(CALLS / copies), min(wanted, MOST_CALLS // copies))


class Cuda:
    """The part of torch.cuda that timing needs; the tests put a clock of their own in its place."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def warm(self, work: Callable[[], Any]) -> None:
        """Run `work` on the stream that captures: libraries set up a stream when they first meet it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """A CUDA graph of `work`, as a function that replays it and returns what `work` returned."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            out = work()

        def replay() -> Any:
            graph.replay()
            return out

        return replay


def in_turn(rotation: Rotation, rounds: int) -> Callable[[], Any]:
    """A function that makes every call of `rotation`, `rounds` times over."""

    def work() -> Any:
        out = None
        for _ in range(rounds):
            for call in rotation:
                out = call()
        return out

    return work


def spent(work: Callable[[], Any], gpu: Any) -> float:
    """Seconds of the device, for one run of `work`."""
    before = gpu.event()
    work()
    after = gpu.event()
    gpu.synchronize()
    return before.elapsed_time(after) / 1e3


def ready(rotation: Rotation, gpu: Any) -> Runner:
    """`rotation` as a CUDA graph; run eagerly, and marked so, where it cannot be captured.

    What fails outside of a capture fails here.
    """
    gpu.warm(in_turn([rotation[0], *rotation], 1))  # compiles, tunes, and whatever a copy does when it first runs
    least = math.ceil(CALLS / len(rotation))
    eager = in_turn(rotation, least)
    try:
        replay, times = gpu.capture(eager), least
        replay()
        wanted = rounds(len(rotation), spent(replay, gpu) / least)
        if wanted > least:
            replay, times = gpu.capture(in_turn(rotation, wanted)), wanted
    except RuntimeError as error:
        gpu.synchronize()  # raises if the device itself is in error, which no later call would survive
        why = str(error).partition("\n")[0]
        return Runner(eager, least * len(rotation), "eager", f"no CUDA graph: {why}")
    return Runner(replay, times * len(rotation), "graph")


def order(names: Sequence[str], baseline: str) -> list[str]:
    """A turn: the baseline before, between and after the others."""
    others = [name for name in names if name != baseline]
    return [baseline, *(name for other in others for name in (other, baseline))]


def measure(
    calls: dict[str, Rotation] | dict[str, Runner], baseline: str, seconds: float = 0.4, gpu: Any = None
) -> dict[str, Timing]:
    """The time of a call of each entry, taken in turns with `baseline`, so that noise falls on all alike.

    gpu: None for rotations of calls on a CPU; a `Cuda` for what `ready` made of them. seconds: to spend on an entry,
    beyond 30 replays each.
    """
    if gpu is None:
        samples = taken(calls, seconds)
        return {name: summary(found, 1, "host") for name, found in samples.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, turn = time.perf_counter(), order(list(calls), baseline)
    turns = 0
    while turns < TURNS or time.perf_counter() - start < seconds * len(calls):
        calls[baseline].replay()  # the host gets ahead of the device, which then never waits between two events
        marks = [(name, gpu.event(), calls[name].replay(), gpu.event()) for name in turn]
        gpu.synchronize()
        for name, before, _, after in marks:
            times[name].append(before.elapsed_time(after) / 1e3)
        turns += 1
    return {name: summary(found, calls[name].calls, calls[name].mode) for name, found in times.items()}


def taken(calls: dict[str, Rotation], seconds: float) -> dict[str, list[float]]:
    """Seconds of single calls on a CPU, in turns; the order of a turn is drawn anew each time.

    What ran before decides what is in the caches. An entry is a rotation of equivalent calls, each with a weight of
    its own.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for rotation in calls.values():
        rotation[0]()
    turn, start, chance = 0, time.perf_counter(), random.Random(0)
    while turn < 5 or time.perf_counter() - start < seconds * len(calls):
        for name in chance.sample(list(calls), len(calls)):
            rotation = calls[name]
            call = rotation[turn % len(rotation)]
            before = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - before)
        turn += 1
    return times


def error_of(y: Tensor, want: Tensor) -> float:
    """|y - want| / |want|, Frobenius, in float64 sums. NaN, a wrong shape or dtype give NaN, which passes no bound."""
    if y.shape != want.shape or not y.is_floating_point():
        return float("nan")
    norm = torch.linalg.vector_norm(want, dtype=torch.float64)
    return (torch.linalg.vector_norm(y.to(want.dtype) - want, dtype=torch.float64) / norm).item()
