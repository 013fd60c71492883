"""What surrounds the measurements of a GPU: targets, pages, pictures, stages, the search for tiles. None needs one."""

import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import ROOT, FakeGpu, importlib, plots, report, targets

from fastllm.formats import parse_format
from fastllm.kernels.quant_matmul import config

gpu, stages, tune, space, crossover = (
    importlib.import_module(name) for name in ("gpu", "stages", "tune_quant_matmul", "tune_space", "crossover")
)
BANDWIDTH = 3e12
HEAD = {
    "ceilings": {"bandwidth": BANDWIDTH, "copy": 2.9e12, "read": BANDWIDTH},
    "launch": {"launch_us": {"fastllm": 12.0}, "new_shape_s": 0.8},
    "grouped_x": 3.5,
}
SHAPES = [(8192, 8192), (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)]
ROWS = [1, 2, 8, 16, 32, 64, 128, 1024, 4096]


def canned(slower: float = 1.0) -> list[dict[str, Any]]:
    """Rows in which every target is met, or, with everything of fastllm slower, missed."""
    rows = []
    for format, bits in (("int4-g128", 4), ("int8", 8)):
        for N, K in SHAPES:
            for M in ROWS:
                size = N * K * bits // 8
                own = slower * size / (0.9 * BANDWIDTH) * max(1, M / 32)
                dense = own / slower * (4.0 if M == 1 else 2.4 if M <= 64 else 1.2 if M <= 128 else 0.95)
                seconds = {"bf16": dense, "fastllm": own, "GemLite": 2.1 * own / slower, "fastllm w8a8": dense / 1.5}
                seconds["fastllm w8a8"] *= slower
                rows.append({
                    "format": format, "N": N, "K": K, "M": M, "layout": "planar", "baseline": "bf16",
                    "dtype": "bfloat16", "seconds": seconds, "bytes": {"fastllm": size, "bf16": 4 * size},
                    "error": {}, "wrong": {}, "absent": {"Marlin": ["no wheel"]},
                    "eager": {"GemLite": "no CUDA graph: x"},
                })  # fmt: skip
    return rows


def test_every_target_can_be_met_and_missed() -> None:
    good = targets.verdicts(canned(), HEAD)
    assert [v.what for v in good if v.said != "met"] == []
    bad_head = {**HEAD, "launch": {"launch_us": {"fastllm": 16.0}, "new_shape_s": 1.1}, "grouped_x": 2.9}
    bad = targets.verdicts(canned(3.0), bad_head)
    flat = next(v for v in bad if "longer than M=1" in v.what)
    assert [v.what for v in bad if v.said != "missed"] == [flat.what]
    rows = [{**r, "seconds": {**r["seconds"], "fastllm": r["seconds"]["fastllm"] * (1.1 if r["M"] == 8 else 1)}}
            for r in canned()]  # fmt: skip
    assert targets.flatness(rows) == pytest.approx(0.1)
    assert {v.said for v in targets.verdicts([], {})} == {"not measured"}


def test_the_sum_over_the_layers() -> None:
    rows = canned()
    one = {(r["N"], r["K"]): r["seconds"]["fastllm"] for r in rows if r["M"] == 1 and r["format"] == "int8"}
    want = 32 * sum(seconds for shape, seconds in one.items() if shape != (8192, 8192))
    assert targets.layer_sum(rows, "int8", "fastllm") == pytest.approx(want)
    assert targets.layer_sum([r for r in rows if r["K"] != 14336], "int8", "fastllm") is None
    assert targets.layers_ratio(rows, "int8", "bf16") == pytest.approx(4.0)
    assert targets.mean([2.0, 8.0, None]) == pytest.approx(4.0) and targets.mean([None]) is None


def test_the_page_says_all() -> None:
    page = report.markdown(canned(), HEAD)
    for part in (
        "| int4-g128 | 8192 x 8192 | planar | 4.00 |",
        "| GemLite | 1.90 |",
        "Marlin (int4-g128, int8): no wheel",
        "GemLite (int4-g128, int8): timed eagerly: no CUDA graph",
        "| 90% |",
        "| met |",
    ):
        assert part in page, part
    wrong = {**canned()[0], "wrong": {"fastllm": 0.5}}
    wrong["seconds"] = {"bf16": 1.0}
    assert "WRONG" in report.left_out([wrong]) and report.cell(wrong) == "wrong"
    faster = {**canned()[0], "seconds": {"bf16": 4.0, "fastllm": 2.0, "GemLite": 1.0}}
    assert report.cell(faster) == "2.00 (GemLite 4.00)"


def test_pictures_are_drawn(tmp_path: Path) -> None:
    found = plots.draw(canned(), HEAD, tmp_path)
    assert [path.name for path in found] == ["quant_matmul_speedup.png", "quant_matmul_bandwidth.png"]
    for path in found:
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
    assert plots.draw([], HEAD, tmp_path) == []


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_stage_that_fails_or_hangs_does_not_stop_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LEAST", 0.1)
    child = f"import subprocess, sys, time; subprocess.Popen({script('import time; time.sleep(60)')!r}); print('on')\n"
    todo = [
        stages.Stage("bad", script("print('x' * 5000, flush=True); raise SystemExit('it broke')"), 20),
        stages.Stage("hangs", script(child + "sys.stdout.flush(); time.sleep(60)"), 1.0),
        stages.Stage("good", script("import sys; print('seconds', sys.argv[1:])") + ["{seconds}"], 30),
        stages.Stage("late", script("import os; print(os.environ['A'])"), None, more=True),
    ]
    found = stages.run_all(todo, 60, tmp_path / "log", {}, {"A": "more"})
    assert [result.state for result in found] == ["failed (exit status 1)", "stopped (over 1 s)", "ok", "ok"]
    assert (
        found[1].seconds < 20
        and "KeyboardInterrupt" in found[1].output
        and "on" in found[1].output
        and "seconds ['19']" in found[2].output
    )
    assert found[3].output == "more\n"
    assert "it broke" in (tmp_path / "log").read_text()
    assert "it broke" in stages.tails(found, 400) and len(stages.tails(found, 400)) < 600
    assert stages.table(found).splitlines()[2].startswith("good ") and not found[0].ok


def test_no_stage_begins_without_time(tmp_path: Path) -> None:
    (result,) = stages.run_all([stages.Stage("a", script("print(1)"), 30)], 5, tmp_path / "log", {}, {})
    assert result.state == "not begun (5 s are too little)" and not result.ok


def test_gpu_refuses_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (gpu, tune, importlib.import_module("launch"), importlib.import_module("gpu_smoke")):
        monkeypatch.setattr(sys, "argv", ["script"])
        with pytest.raises(SystemExit, match="CUDA GPU"):
            module.main()
    with pytest.raises(SystemExit, match="no .whl file"):
        gpu.install(tmp_path, "target")


def test_the_stages_fit_their_time_and_name_files_that_exist(tmp_path: Path) -> None:
    found = gpu.stages(tmp_path, 9)
    assert 300 < sum(stage.seconds or 0 for stage in found) <= 530 and found[-1].seconds is None
    assert sum(stage.seconds or 0 for stage in gpu.stages(tmp_path, 4.5)) <= 265
    named = [part for stage in found for part in stage.command if part.endswith(".py")]
    assert len(named) > 6 and all((ROOT / part).exists() for part in named)
    assert "tests/test_kernel_quant_matmul.py" in gpu.tests() and len(set(gpu.tests())) == len(gpu.tests())
    assert gpu.environment("/x")["PYTHONPATH"].startswith(f"{ROOT}:/x")
    assert [stage.name for stage in found if stage.more] == ["other libraries", "GemLite"]


def test_the_stages_of_attention_too(tmp_path: Path) -> None:
    found = gpu.PARTS["attention"](tmp_path, 9)
    assert 300 < sum(stage.seconds or 0 for stage in found) <= 450 and found[-1].seconds is None
    named = [part for stage in found for part in stage.command if part.endswith(".py")]
    assert len(named) > 12 and all((ROOT / part).exists() for part in named)
    assert set(gpu.REPORTS) < {stage.name for stage in found}
    (tmp_path / "decode.md").write_text("| what decoding took |")
    results = [stages.Result("decode attention", "ok", 3.0, ""), stages.Result("attention", "failed (1)", 3.0, "why")]
    text = gpu.told(results, tmp_path)
    assert "what decoding took" in text and "why" in text and text.endswith(stages.table(results))


def test_the_end_of_the_output_fits(tmp_path: Path) -> None:
    results = [
        stages.Result("int4 against cuBLAS", "ok", 3.0, "y" * 9999),
        stages.Result("kernel tests", "failed (exit status 1)", 3.0, "x" * 99999 + "the last line"),
        stages.Result("tuning", "ok", 3.0, "noise\nbest of each:\nint4-g128 M 1"),
    ]
    importlib.import_module("results").write(tmp_path / "quant_matmul.json", HEAD, canned())
    text = gpu.told(results, tmp_path)
    assert len(text) <= gpu.PRINTED + 10 and text.endswith(stages.table(results))
    for part in ("the last line", "best of each", "| met |", "8192 x 8192", "fastllm"):
        assert part in text, part
    assert "8192 x 8192" not in gpu.told([results[1]], tmp_path)  # not what an earlier run measured


@pytest.mark.parametrize("M", [1, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_tiles_tried_are_modest_and_fit(M: int, bits: int) -> None:
    problem, now = (M, 8192, 8192), config(M, 8192, 8192, bits)
    coarse = space.coarse(now, problem, bits, 90, 132)
    fine = space.fine(coarse[:4], problem, bits, 90, 132)
    for found in (coarse, fine):
        assert found[0] == now and 8 < len(set(found)) == len(found) < 250
        assert all(not space.complaints(tile, *problem, bits) for tile in found[1:])
        assert max(space.shared_bytes(tile, bits) for tile in found) <= 227 * 1024
    assert len({tile.num_stages for tile in fine}) > 2 and len({tile.BLOCK_N for tile in coarse}) == 2


def test_each_reason_against_a_tile() -> None:
    tile = config(64, 8192, 8192)
    for change, why in (
        ({"BLOCK_M": 256, "BLOCKS": 4, "PRESCALE": True, "num_stages": 5}, "shared memory"),
        ({"BLOCK_M": 128, "num_warps": 4}, "sums a thread"),
        ({"num_warps": 4}, "registers enough"),
        ({"BLOCK_M": 128}, "mostly empty"),
        ({"BLOCK_N": 64}, "too few for eight warps"),
        ({"PRESCALE": True}, "overwrite"),
        ({"SPLIT_K": 8, "BLOCKS": 8}, "steps are too few"),
        ({"SPLIT_K": 32}, "more programs than run at once"),
        ({"SPLIT_K": 7, "BLOCKS": 4}, "nothing to do"),
    ):
        moved = tile._replace(**change)
        assert why in "; ".join(space.complaints(moved, 64 if "BLOCK_M" not in why else 1, 8192, 8192, 4)), change


def test_the_best_tile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which 3 stages of narrow tiles with a split of 2 are best, and one tile is wrong."""
    fake = FakeGpu()

    def call(state: Any, x: torch.Tensor, bits: int, group: int, tile: Any) -> torch.Tensor:
        cost = 1 + (tile.BLOCK_N != 64) + abs(tile.SPLIT_K - 2) + 0.1 * abs(tile.num_stages - 5)
        wrong = tile.BLOCKS == 4
        y = state @ x.float().t()
        return fake.spend("call", 1e-5 * cost / (10 if wrong else 1), (y.t() * (2 if wrong else 1)).to(x.dtype))

    class Inline:
        def submit(self, work: Any, *args: Any) -> Future:
            future: Future = Future()
            future.set_result("OutOfResources" if args[-1].num_warps == 8 else "")
            return future

    def operands(problem: Any) -> Any:
        return tune.Packed("rest", tune.LAYOUTS["rest"]).prepare(problem)._replace(make=lambda: problem.dense)

    monkeypatch.setattr(tune, "call", call)
    monkeypatch.setattr(tune, "operands", operands)
    card = tune.Card(90, 4, "cpu", cold=1, dtype=torch.float32)
    rows = tune.tune(parse_format("int4-g128"), 8, card, Inline(), fake, 60.0, [(128, 1024), (256, 1024)])
    best = rows[0]["tile"]
    assert (best["BLOCK_N"], best["SPLIT_K"], best["num_stages"], best["num_warps"]) == (64, 2, 5, 4)
    assert best["BLOCKS"] != 4 and rows[0]["gain"] > 1 and list(rows[0]["relative"]) == ["128 x 1024", "256 x 1024"]
    assert "gain" in tune.line(rows[0]) and tune.first_of_each(rows) == rows[:1]


def test_a_mixture_is_compared_with_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = importlib.import_module("experts")
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128}
    monkeypatch.setattr(experts, "TOP", 2)
    given = (4, 3, None, "cpu", torch.bfloat16, 1)
    with torch.inference_mode():
        row = experts.compared(*given, **sizes)
        assert set(row["seconds"]) == {"loop", "fastllm"} and row["grouped_x"] > 0 and row["experts"] == 4
        right = experts.loop
        monkeypatch.setattr(experts, "loop", lambda *args: 1.1 * right(*args))
        with pytest.raises(SystemExit, match="differ"):
            experts.compared(*given, **sizes)


def test_whole_models_are_held_to_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = importlib.import_module("gpu_smoke")
    assert smoke.check("llama", {}, "int4", "cpu") == []
    monkeypatch.setattr(smoke.tiny, "dense_twin", lambda packed, like: like)  # the weights before they were rounded
    assert any("relative error" in why for why in smoke.check("llama", {}, "int4", "cpu"))


def test_where_dequantising_wins() -> None:
    def row(M: int, fused: float, dense: float) -> dict[str, Any]:
        seconds = {"bf16": 1.0, crossover.FUSED: fused, crossover.WHOLE: 3.0, crossover.CHUNKS: dense}
        return {"format": "int4-g128", "N": 8, "K": 8, "M": M, "seconds": seconds}

    rows = [row(64, 1.0, 2.0), row(128, 1.0, 0.9), row(256, 1.0, 1.1), row(512, 2.0, 1.1), row(1024, 2.0, 1.1)]
    assert crossover.from_which(rows, 8, 8) == 512
    assert crossover.from_which(rows[:1], 8, 8) is None
    assert "from M=512 on" in crossover.crossings(rows)
