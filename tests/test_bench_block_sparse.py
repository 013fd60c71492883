"""The benchmark of block-sparse weights: its targets can be met and missed, and what is wrong is not timed."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import ROOT, FakeGpu

bench, gpu = (importlib.import_module(name) for name in ("bench_block_sparse", "gpu"))


def canned(factor: float = 1.0) -> list[dict[str, Any]]:
    """Rows in which every target is just met, or not, by `factor`."""
    rows = []
    for B in (32, 64, 128):
        for sparsity, times in ((0.5, 0.9), (0.6, 1.45), (0.8, 2.3), (0.9, 3.6)):
            for M in (1, 16, 2048):
                seconds = {"bf16": 1e-4, "fastllm": 1e-4 / (times * factor)}
                rows.append({"N": 4096, "K": 4096, "M": M, "block": B, "sparsity": sparsity, "seconds": seconds})
    return rows


def test_every_target_can_be_met_and_missed() -> None:
    assert [v.said for v in bench.verdicts(canned())] == ["met"] * 5
    assert [v.said for v in bench.verdicts(canned(0.6))] == ["missed"] * 5
    assert [v.said for v in bench.verdicts([])] == ["not measured"] * 5
    assert [v.limit for v in bench.verdicts([])][:3] == [1.4, 2.2, 3.5]
    page = bench.markdown(canned(), "cuda")
    assert "| 4096 x 4096 | 2048 | 64 | 100 | 0.90 | 1.45 | 2.30 | 3.60 |" in page and "| met |" in page
    assert "| met |" not in bench.markdown(canned(), "cpu")


def test_the_weight_has_the_share_of_blocks() -> None:
    dense, mask = bench.weight(256, 512, 32, 0.8, "cpu")
    assert mask.shape == (8, 16) and mask.sum() == round(0.2 * 128)
    assert bench.pack_blocks(dense, mask, 32).values.ne(0).all()
    assert dense.ne(0).sum() == mask.sum() * 32 * 32


def test_it_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MOST_COPIES", 2)
    options = ["--device", "cpu", "--shapes", "64x128", "--sparsity", "0.5", "--rows", "1,3", "--seconds", "0"]
    bench.main([*options, "--out", str(tmp_path), "--blocks", "32,64", "--paths"])
    rows = json.loads((tmp_path / "block_sparse.json").read_text())["rows"]
    assert [(r["block"], r["M"]) for r in rows] == [(64, 1), (64, 3), (32, 1), (32, 3)]
    assert set(rows[0]["seconds"]) == {"bf16", "fastllm", "by_rows", "by_groups", "by_blocks", "sparse_bsr float32"}
    assert (tmp_path / "block_sparse.md").read_text() in capsys.readouterr().out
    bench.main([*options, "--out", str(tmp_path), "--budget", "0"])
    assert "not measured, the budget is spent: 64 x 128, blocks of 64, 50%" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "block_sparse_matmul", lambda x, *w: x.new_zeros(len(x), 64))
    monkeypatch.setattr(bench, "MOST_COPIES", 1)
    args = bench.arguments(["--device", "cpu", "--seconds", "0"])
    with pytest.raises(SystemExit, match="64 x 128, blocks of 64, M=1: fastllm: relative error 1.0e"):
        list(bench.bench(64, 128, 64, 0.5, [1], args, None))


def test_a_gpu_gets_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose clock the calls move: the ratio is that of what was captured."""
    clock, linear, own = FakeGpu(), bench.linear, bench.block_sparse_matmul
    monkeypatch.setattr(bench, "linear", lambda *a: clock.spend("bf16", 3e-4, linear(*a)))
    monkeypatch.setattr(bench, "block_sparse_matmul", lambda *a: clock.spend("fastllm", 1e-4, own(*a)))
    monkeypatch.setattr(bench, "cold_bytes", lambda device: 1 << 15)
    for name in ("weight", "torch.randn"):
        where, _, last = name.rpartition(".")
        owner = torch if where else bench
        made = getattr(owner, last)
        on_cpu = (lambda *a, made=made, **k: made(*a, **k | {"device": "cpu"})) if where else (
            lambda N, K, B, s, device, made=made: made(N, K, B, s, "cpu"))  # fmt: skip
        monkeypatch.setattr(owner, last, on_cpu)
    args = bench.arguments(["--device", "cpu", "--seconds", "0"])
    rows = list(bench.bench(64, 128, 32, 0.5, [1, 2], args, clock))
    assert [row["mode"]["fastllm"] for row in rows] == ["graph", "graph"]
    assert [row["seconds"]["bf16"] / row["seconds"]["fastllm"] for row in rows] == pytest.approx([3.0, 3.0])


def test_the_stages_of_sparse_weights(tmp_path: Path) -> None:
    found = gpu.PARTS["sparse"](tmp_path, 9)
    assert found[-1].seconds is None and found[-1].name in gpu.SPARSE_REPORTS
    named = [part for stage in found for part in stage.command if part.endswith(".py")]
    assert {"tests/test_kernel_block_sparse.py", "tests/test_block_sparse.py"} < set(named)
    assert all((ROOT / part).exists() for part in named)
    (tmp_path / "block_sparse.md").write_text("| what blocks took |")
    results = [importlib.import_module("stages").Result("block sparse", "ok", 3.0, "")]
    assert "what blocks took" in gpu.told(results, tmp_path)
