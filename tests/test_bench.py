"""The benchmarks measure what they say: on a CPU, and on a GPU whose clock is a fake one."""

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm.formats import parse_format

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
bench, measure, peers, plots, providers, report, results, targets = (
    importlib.import_module(name)
    for name in ("bench_quant_matmul", "measure", "peers", "plots", "providers", "report", "results", "targets")
)


class FakeGpu:
    """Stands for `measure.Cuda`. Its clock moves as calls say; a replay takes as long as what was captured."""

    def __init__(self, fails: bool = False, writes: bool = True) -> None:
        self.now, self.fails, self.writes, self.replayed, self.captured = 0.0, fails, writes, [], []

    def spend(self, name: str, seconds: float, y: Any = None) -> Any:
        self.now += seconds
        self.captured.append(name)
        return y

    def event(self) -> Any:
        class Event(float):
            def elapsed_time(self, later: float) -> float:
                return 1e3 * (later - self)

        return Event(self.now)

    def synchronize(self) -> None: ...

    def warm(self, work: Callable[[], Any]) -> None:
        work()
        self.warmed = list(self.captured)

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        start, self.captured = self.now, []
        y = work()
        took, calls, self.now = self.now - start, tuple(self.captured), start
        good = y.clone() if isinstance(y, Tensor) else y

        def replay() -> Any:
            self.now += took
            self.replayed.append(calls)
            if isinstance(y, Tensor) and self.writes:
                y.copy_(good)
            return y

        return replay


def test_a_summary_is_the_median_and_what_lies_around_it() -> None:
    found = measure.summary([float(i) for i in range(100, -1, -1)], 10, "graph")
    assert found == (5.0, 1.0, 9.0, 101, 10, "graph")
    assert measure.summary([3.0], 1, "host")[:3] == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    "copies, seconds, want", [(6, 1e-3, 4), (6, 6e-5, 7), (1, 1.0, 20), (600, 1.0, 1), (7, 0, 68)]
)
def test_graphs_hold_whole_rounds_of_at_least_20_calls(copies: int, seconds: float, want: int) -> None:
    assert measure.rounds(copies, seconds) == want
    assert copies * want >= measure.CALLS and (copies * want <= measure.MOST_CALLS or want == 1)


def test_copies_exceed_the_caches() -> None:
    assert measure.copies(35_000_000, 200_000_000) == 6
    assert measure.copies(1 << 40) == 1 and measure.copies(0, 100) == 100
    assert measure.COLD_GPU >= 200_000_000


def test_a_rotation_becomes_a_graph_over_all_its_copies() -> None:
    gpu = FakeGpu()
    runner = measure.ready([lambda i=i: gpu.spend(f"copy {i}", 1e-6) for i in range(3)], gpu)
    assert gpu.warmed == ["copy 0", "copy 0", "copy 1", "copy 2"]  # no copy is run for the first time in a graph
    gpu.replayed.clear()
    runner.replay()
    (calls,) = gpu.replayed
    assert runner.mode == "graph" and runner.calls == len(calls) == 402  # 3 us a round, 400 us a replay
    assert calls == ("copy 0", "copy 1", "copy 2") * 134


def test_what_cannot_be_captured_is_timed_eagerly_and_says_so() -> None:
    gpu = FakeGpu(fails=True)
    runner = measure.ready([lambda: gpu.spend("a", 1e-3)] * 3, gpu)
    assert (runner.mode, runner.calls) == ("eager", 21)
    assert runner.why == "no CUDA graph: operation not permitted when stream is capturing"
    timing = measure.measure({"a": runner}, "a", 0.0, gpu)["a"]
    assert timing.mode == "eager" and timing.median == pytest.approx(1e-3)

    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure.ready([broken], FakeGpu())


def test_replays_go_in_turns_with_the_baseline() -> None:
    gpu = FakeGpu()
    times = {"b": 2e-5, "x": 1e-5, "y": 4e-5}
    runners = {n: measure.ready([lambda n=n, t=t: gpu.spend(n, t)], gpu) for n, t in times.items()}
    gpu.replayed.clear()
    found = measure.measure(runners, "b", 0.0, gpu)
    assert [calls[0] for calls in gpu.replayed[:6]] == ["b", "b", "x", "b", "y", "b"]  # the first is not timed
    assert {name: t.median for name, t in found.items()} == pytest.approx(times)
    assert {name: t.samples for name, t in found.items()} == {"b": 90, "x": 30, "y": 30}


def test_on_a_cpu_calls_are_timed_in_turns() -> None:
    done = []
    calls = {name: [lambda n=name, i=i: done.append((n, i)) for i in range(2)] for name in "ab"}
    found = measure.measure(calls, "a", 0.0)
    assert found["a"].mode == "host" and 0 < found["a"].p10 <= found["a"].median <= found["a"].p90 < 0.1
    assert found["a"].samples == 5 and len(done) == 12
    assert {i for n, i in done if n == "b"} == {0, 1}


def test_errors_that_must_not_pass() -> None:
    want = torch.randn(5, 7)
    assert measure.error_of(want.bfloat16(), want) < 5e-3
    assert measure.error_of(2 * want, want) == pytest.approx(1.0)
    for y in (want.roll(1, 0), want.clone().fill_(0)):
        assert measure.error_of(y, want) > 0.5
    bad = want.clone()
    bad[2, 3] = torch.nan
    for y in (bad, want[:4], want.long()):
        assert not measure.error_of(y, want) <= 1e9


def test_the_bandwidth_is_the_larger_of_copying_and_reading() -> None:
    bandwidths = importlib.import_module("ceilings").bandwidths
    assert bandwidths({"sum": 0.5, "amax": 0.4}, 1.0, 100) == {"copy": 200.0, "read": 250.0, "bandwidth": 250.0}
    assert bandwidths({"sum": 1.0}, 1.0, 100)["bandwidth"] == 200.0


class Scaled(providers.Provider):
    """The dense product times a number; raises for None."""

    def __init__(self, name: str, by: float | None, **more: Any) -> None:
        self.name, self.by = name, by
        self.__dict__.update(more)

    def reasons(self, *_: Any) -> list[str]:
        return ["it is Tuesday"] if self.name == "absent" else []

    def prepare(self, problem: Any) -> Any:
        def run(w: Tensor, x: Tensor) -> Tensor:
            if self.by is None:
                raise ValueError("not this one\nat all")
            return x @ w.t() * self.by

        return providers.Operands(problem.w.clone, run, 1000, problem.w.float(), providers.EXACT)


def row_of(asked: list[Any], gpu: Any = None, M: int = 3) -> dict[str, Any]:
    shape = bench.Shape(parse_format("int4-g32"), 64, 96, torch.bfloat16, "cpu", asked)
    shape.gpu = gpu
    return shape.row(M, 0.0)


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COLD", 30_000)


def test_a_row_times_only_what_is_right() -> None:
    good = [providers.Dense(torch.bfloat16), *providers.own("cpu")]
    bad = [Scaled("doubled", 2.0), Scaled("nan", math.nan), Scaled("raises", None), Scaled("absent", 1.0)]
    row = row_of([*good, *bad, Scaled("narrow", 1.0, most_rows=2), Scaled("fine", 1.0)])
    assert set(row["seconds"]) == {"bf16", "fastllm", "int4pack", "int4pack, dequantised", "fine"}
    assert row["wrong"]["doubled"] == pytest.approx(1.0, abs=0.01) and math.isnan(row["wrong"]["nan"])
    assert row["absent"]["raises"] == ["ValueError: not this one"] and row["absent"]["absent"] == ["it is Tuesday"]
    assert "beyond 2 rows" in row["absent"]["narrow"][0] and "int8pack" not in row["absent"]
    xy = 2 * 3 * (64 + 96)
    assert row["bytes"]["fine"] == 1000 + xy and row["bytes"]["fastllm"] == 64 * 96 // 2 + 64 * 3 * 2 + xy
    assert json.loads(json.dumps(row))["layout"] == "int4pack" and "fine" in bench.line(row)


def test_a_graph_must_write_every_element() -> None:
    asked = [providers.Dense(torch.bfloat16), Scaled("fine", 1.0)]
    assert set(row_of(asked, FakeGpu())["seconds"]) == {"bf16", "fine"}
    with pytest.raises(SystemExit, match="the dense product itself failed"):
        row_of(asked, FakeGpu(writes=False))
    assert set(row_of(asked, FakeGpu(fails=True))["eager"]) == {"bf16", "fine"}


@pytest.mark.parametrize("format", ["int4-g128", "int8", "int8-g128-asym"])
def test_whoever_cannot_run_says_why(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    parsed = parse_format(format)
    for provider in [*providers.own("cuda")[1:4], *peers.peers(slow=True)]:
        found = provider.reasons(parsed, 256, 256, torch.bfloat16, "cpu")
        assert found and all(len(why) > 10 for why in found), provider.name
    names = [provider.name for provider in [*providers.own("cuda"), *peers.peers(slow=True)]]
    assert len(set(names)) == len(names)
    absent = [p.name for p in peers.peers(True) if "installed" in str(p.reasons(parsed, 256, 256, torch.half, "cuda"))]
    assert len(absent) == 9 - 1  # all but tinygemm, which is torch's, and Marlin, which has no wheel


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounded_activations_are_held_to_a_bound_of_their_own(kind: str) -> None:
    (provider,) = [p for p in providers.own("cuda") if getattr(p, "kind", "") == kind]
    format = parse_format("int8")
    assert provider.reasons(parse_format("int4"), 64, 96, torch.bfloat16, "cpu")
    problem = providers.Problem(format, 64, 256, torch.bfloat16, "cpu")
    made, x = provider.prepare(problem), torch.randn(5, 256, dtype=torch.bfloat16)
    want = x.float() @ made.weight.t()
    assert providers.EXACT < measure.error_of(made.run(made.make(), x), want) <= made.bound
    assert not measure.error_of(made.run(made.make(), 1.05 * x), want) <= made.bound


MOST_TILES = 528  # of a launch that splits sums, on 132 multiprocessors


def test_graphs_never_run_out_of_counters() -> None:
    tickets = importlib.import_module("fastllm.kernels.tickets")
    one = providers.fresh_tickets()
    assert one is not providers.fresh_tickets()
    for copies in (*range(1, 700), 1000):  # what is captured to find the number of rounds, and what is captured then
        first = math.ceil(measure.CALLS / copies)
        again = measure.rounds(copies, 1e-9)
        launches = (first + again * (again > first)) * copies
        assert launches * MOST_TILES < tickets.CHUNK


@pytest.mark.peers
@pytest.mark.parametrize("provider", [peers.TorchAO(8), peers.TorchAO(8, "dynamic"), peers.BitsAndBytes(8)])
def test_peers_compute_what_their_weights_say(provider: Any) -> None:
    pytest.importorskip({"T": "torchao", "B": "bitsandbytes"}[type(provider).__name__[0]])
    problem = providers.Problem(parse_format("int8"), 64, 256, torch.bfloat16, "cpu")
    made, x = provider.prepare(problem), torch.randn(5, 256, dtype=torch.bfloat16)
    with torch.inference_mode():
        y = made.run(made.make(), x)
    assert measure.error_of(y, x.float() @ made.weight.t()) <= made.bound
    assert measure.error_of(made.weight, problem.w.float()) <= providers.QUANTIZED[8]


def test_results_are_named_after_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert results.device_name("cuda") == "nvidia-h100-80gb-hbm3"
    assert results.device_name().startswith("cpu-")
    assert results.versions()["torch"]
    monkeypatch.setattr(results.shutil, "which", lambda _: None)
    assert results.smi() == {}


def test_rows_measured_again_replace_the_old_ones() -> None:
    old = [{"format": "int8", "N": 1, "K": 1, "M": M, "old": True} for M in (1, 2)]
    new = [{**old[0], "dtype": "bfloat16", "old": False}, {**old[0], "dtype": "float16", "old": False}]
    assert bench.merged(old, new) == [new[0], old[1], new[1]]


def test_the_arguments() -> None:
    args = bench.arguments(["--device", "cuda", "--out", "x", "--shapes", "64x32,8x8", "--rows", "1,2"])
    assert args.shapes == [(64, 32), (8, 8)] and args.rows == [1, 2] and args.peers == "fast"
    assert [p.name for p in bench.candidates(args)][:2] == ["bf16", "fastllm"]
    assert "GemLite" in [p.name for p in bench.candidates(args)]
    args.only = "gemlite,fused"
    assert [p.name for p in bench.candidates(args)] == ["bf16", "fastllm", "fused kernel", "GemLite"]
    cpu = bench.arguments(["--device", "cpu", "--out", "x"])
    assert cpu.formats == "int8,int4-g32,int4-g128,int8-a8" and not [p for p in bench.candidates(cpu) if p.peer]


def test_the_committed_page_is_made_from_the_committed_rows() -> None:
    paths = sorted(ROOT.glob("bench/results/*/quant_matmul.json"))
    assert paths
    for path in paths:
        found = json.loads(path.read_text())
        assert path.with_suffix(".md").read_text() == report.markdown(found["rows"], found), path
