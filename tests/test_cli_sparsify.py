"""`fastllm sparsify`: packed and dense checkpoints from the command line, and what it complains of."""

from pathlib import Path

import pytest
import torch
from test_cli import TEXT, complaint, figures, model
from transformers import AutoModelForCausalLM

import fastllm
from fastllm.cli import main
from fastllm.nn import BlockSparseLinear, QuantLinear, SparseLinear

__all__ = ["model"]  # a fixture


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT)
    return ["--calib", str(text), "--samples", "4", "--length", "32"]


def logits(path: str | Path, stock: bool = False) -> torch.Tensor:
    found = AutoModelForCausalLM.from_pretrained(path).eval() if stock else fastllm.load(path, quiet=True)
    with torch.no_grad():
        return found(torch.arange(3, 20)[None]).logits.float()


@pytest.mark.parametrize(
    "options, kind, format",
    [
        ([], SparseLinear, "16:32"),
        (["--pattern", "2:4", "--method", "wanda", "--no-repair"], SparseLinear, "2:4"),
        (["--values", "int8", "--lm-head", "int8"], SparseLinear, "16:32-int8"),
        (["--pattern", "block32@0.5", "--method", "magnitude"], BlockSparseLinear, "block32"),
    ],
)
def test_packed_and_dense(options, kind, format, model, data, tmp_path, capsys):
    packed, dense = str(tmp_path / "packed"), str(tmp_path / "dense")
    found = figures(tmp_path, "sparsify", model, packed, *data, *options)
    said = capsys.readouterr().out
    assert "stored in" in said and "saved" in said and "MB of weights to" in said
    assert found["model"] == model and found["out"] == packed and found["report"]["notes"]
    assert found["saved_bytes"] == sum(f.stat().st_size for f in Path(packed).glob("*.safetensors"))
    loaded = fastllm.load(packed, quiet=True)
    layers = [m for m in loaded.modules() if isinstance(m, kind)]
    assert len(layers) == 14 and {m.format.name for m in layers} == {format}
    assert isinstance(loaded.lm_head, QuantLinear) == ("--lm-head" in options)
    more = figures(tmp_path, "sparsify", model, dense, *data, *options, "--dense")
    assert more["saved_bytes"] > found["saved_bytes"]
    # the sums of a product with zeros and of one without have another order, in bfloat16
    torch.testing.assert_close(logits(dense, stock=True), logits(packed), rtol=0.05, atol=0.03)
    run = figures(tmp_path, "run", packed, "-p", "w1 w2", "--new-tokens", "3")
    assert len(run["runs"]) == 1


def test_half_of_each_row_is_dense_anyway(model, data, tmp_path):
    for options in ([], ["--dense"]):
        out = tmp_path / f"out{len(options)}"
        figures(tmp_path, "sparsify", model, str(out), *data, "--pattern", "0.5", "--ratios", "owl", *options)
        weights = AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp.up_proj.weight
        assert 0.3 < float((weights == 0).float().mean()) < 0.7


def test_weights_with_zeros(model, data, tmp_path):
    """A dense checkpoint with zeros becomes a packed one, without data."""
    dense, packed = str(tmp_path / "dense"), str(tmp_path / "packed")
    figures(tmp_path, "sparsify", model, dense, *data, "--pattern", "2:4", "--dense")
    figures(tmp_path, "sparsify", dense, packed, "--pattern", "2:4", "--method", "zeros")
    assert any(isinstance(m, SparseLinear) for m in fastllm.load(packed, quiet=True).modules())
    torch.testing.assert_close(logits(packed), logits(dense, stock=True), rtol=0.05, atol=0.03)


def test_dense_means_all_of_it(model, data, tmp_path):
    out = tmp_path / "out"
    options = ["--pattern", "0.5", "--method", "magnitude", "--no-repair", "--lm-head", "int8", "--dense"]
    figures(tmp_path, "sparsify", model, str(out), *data, *options)
    assert "quantization_config" not in (out / "config.json").read_text()


def test_complaints(model, data, tmp_path, capsys):
    out, full = tmp_path / "out", tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for expected, options in {
        "unknown pattern '4:8'": ["--pattern", "4:8"],
        "between 0 and 1": ["--pattern", "1.5"],
        "how many blocks go?": ["--pattern", "block64"],
        "sparse values cannot be fp8-a8": ["--values", "fp8"],
        "only 2:4 and k:32": ["--values", "int8", "--pattern", "0.5"],
        "keeps as much everywhere": ["--ratios", "owl", "--pattern", "2:4"],
        "unknown weight format 'int3'": ["--lm-head", "int3"],
        "weights are not zero where 16:32 keeps none": ["--method", "zeros"],
        "no such file": ["--calib", "absent.txt"],
        "--device cuda:99": ["--device", "cuda:99"],
    }.items():
        assert expected in complaint(capsys, "sparsify", model, str(out), *data, *options)
        assert not out.exists()
    assert "not empty" in complaint(capsys, "sparsify", model, str(full))
    assert "overwritten" in complaint(capsys, "sparsify", model, model)
    with pytest.raises(SystemExit):
        main(["sparsify", model, str(out), "--method", "wonder"])
    with pytest.raises(SystemExit):
        main(["sparsify", model])


def test_a_bad_pattern_is_told_before_the_model_is_loaded(tmp_path, capsys):
    """Of a model that is not there, nothing can be loaded."""
    said = complaint(capsys, "sparsify", str(tmp_path / "absent"), str(tmp_path / "out"), "--pattern", "4:8")
    assert "unknown pattern" in said


def test_layers_can_be_chosen(model, data, tmp_path):
    options = ["--include", "*.mlp.*", "--exclude", "*down*", "--min-coverage", "0"]
    found = figures(tmp_path, "sparsify", model, str(tmp_path / "out"), *data, *options)
    assert sum(d["format"] == "16:32" for d in found["report"]["decisions"]) == 4
