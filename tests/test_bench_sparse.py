"""The benchmark of sparse weights: its targets can be met and missed, what is wrong is not timed, a CPU is refused."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import ROOT, FakeGpu

bench, gpu = (importlib.import_module(name) for name in ("bench_sparse", "gpu"))


def canned(factor: float = 1.0) -> list[dict[str, Any]]:
    """Rows in which every target is just met, or not, by `factor`."""
    times = {"int8": 1.9, "16:32": 1.35, "2:4": 1.45, "16:32-int8": 2.4, "2:4-int8": 2.4, bench.LIBRARY: 1.25}
    rows = []
    for M in (1, 4, 1024):
        seconds = {"bf16": 1e-4, "int8": 1e-4 / times["int8"]}
        seconds |= {name: 1e-4 / (t * factor) for name, t in times.items() if name != "int8"}
        rows.append({"N": 4096, "K": 14336, "M": M, "seconds": seconds})
    return rows


def test_every_target_can_be_met_and_missed() -> None:
    assert [v.said for v in bench.verdicts(canned())] == ["met"] * 7
    assert [v.said for v in bench.verdicts(canned(0.7))] == ["missed"] * 7
    assert [v.said for v in bench.verdicts([])] == ["not measured"] * 7
    page = bench.markdown(canned())
    assert "| 4096 x 14336 | 1 | 100.0 | 1.90 | 1.35 | 1.45 |" in page and page.count("| met |") == 7


@pytest.mark.parametrize("M", [1, 3])
def test_all_candidates_run_and_are_right(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MOST_COPIES", 2)
    row = bench.bench(64, 128, M, "cpu", "", 0.0, None)
    assert list(row["seconds"]) == ["bf16", "int8", *bench.FORMATS] and not row["absent"]
    assert all(0 <= error < bench.BOUND for error in row["error"].values())
    weight = {name: size - 2 * M * (64 + 128) for name, size in row["bytes"].items()}
    columns = 64 * 128
    assert weight["bf16"] == 2 * columns and weight["int8"] == columns + 2 * 64
    assert weight["16:32"] == weight["2:4"] == columns * 9 // 8
    assert weight["2:4-int8"] == columns * 5 // 8 + 2 * 64
    assert set(bench.bench(64, 128, M, "cpu", "2:4", 0.0, None)["seconds"]) == {"bf16", "2:4", "2:4-int8"}


def test_the_library_may_be_absent_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MOST_COPIES", 1)
    monkeypatch.setattr(bench, "LIBRARY_ROWS", 3)
    row = bench.bench(64, 128, 3, "cpu", bench.LIBRARY, 0.0, None)
    assert list(row["seconds"]) == ["bf16"] and list(row["absent"]) == [bench.LIBRARY]

    def broken(w: torch.Tensor) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(bench, "int8", broken)
    with pytest.raises(RuntimeError, match="broken"):
        bench.bench(64, 128, 1, "cpu", "int8", 0.0, None)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "sparse_matmul", lambda x, *w: x.new_zeros(len(x), 64))
    monkeypatch.setattr(bench, "MOST_COPIES", 1)
    with pytest.raises(SystemExit, match="64 x 128, M=1: 16:32: relative error 1.0e"):
        bench.bench(64, 128, 1, "cpu", "16:32", 0.0, None)


def test_as_graphs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MOST_COPIES", 2)
    row = bench.bench(64, 128, 1, "cpu", "16:32", 0.0, FakeGpu())
    assert set(row["mode"].values()) == {"graph"}


def test_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        bench.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_it_is_a_stage_of_the_gpu_script(tmp_path: Path) -> None:
    found = {stage.name: stage for stage in gpu.PARTS["sparse"](tmp_path, 9)}
    assert "bench/bench_sparse.py" in found["sparse"].command and (ROOT / "bench/bench_sparse.py").exists()
    assert "tests/test_lanes.py" in gpu.tests(gpu.SPARSE_TESTS) and gpu.SPARSE_REPORTS["sparse"] == "sparse.md"
    assert not [path for path in gpu.tests(gpu.SPARSE_TESTS) if "compile" in path]
