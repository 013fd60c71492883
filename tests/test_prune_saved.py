"""`fastllm.prune` from a checkpoint to another, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_cases import build, data
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fastllm
from fastllm.cli import main
from fastllm.cli.prune import layers
from fastllm.compress import prune_model

WORDS = [f"w{i}" for i in range(500)]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A folder with a small model, its tokenizer, and a file of another kind."""
    folder = tmp_path / "dense"
    build("llama", torch.bfloat16).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    (tmp_path / "text.txt").write_text(" ".join(WORDS[(7 * i * i) % 500] for i in range(600)))
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(data(2, 9)).logits


def test_a_checkpoint_becomes_a_smaller_one(dense: Path, tmp_path: Path) -> None:
    before = (dense / "model.safetensors").read_bytes()
    asked: dict[str, Any] = {"layers": 1, "ffn": 0.5, "heads": 0.5, "calib": data(), "quiet": True}
    report = fastllm.prune(dense, out=tmp_path / "out", **asked)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto").eval()
    told = fastllm.prune(model, **asked)
    assert report.saved == str(tmp_path / "out") and report.saved in str(report) and report.after == told.after
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "out"), model(data(2, 9)).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w7")["input_ids"] == [4, 10]
    assert (tmp_path / "out/preprocessor_config.json").is_file()
    assert (dense / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out", "text.txt"}


def test_dtype_and_text(dense: Path, tmp_path: Path) -> None:
    report = fastllm.prune(
        dense, ffn=0.5, calib=tmp_path / "text.txt", out=tmp_path / "out", dtype=torch.float32, quiet=True
    )
    assert logits(tmp_path / "out").dtype == torch.float32 and report.tokens > 500


def test_where_nothing_can_go_is_told_first(dense: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"where should the pruned .*dense go\? prune\(path, out=folder\)"):
        fastllm.prune(dense, ffn=0.5)
    with pytest.raises(ValueError, match="is not empty; name a new directory"):
        fastllm.prune(str(dense), ffn=0.5, out=tmp_path)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_model, "bring_along", stop)
    with pytest.raises(KeyboardInterrupt):
        fastllm.prune(dense, ffn=0.5, out=tmp_path / "out", calib=data(), quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "text.txt"}


def test_the_command(dense: Path, tmp_path: Path, capsys) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    asked = ["--layers", "0.25", "--ffn", "0.3", "--heads", "0.5", "--calib", str(tmp_path / "text.txt")]
    assert (
        main(["prune", str(dense), str(out), *asked, "--length", "64", "--json", str(figures), "--device", "cpu"]) == 0
    )
    shown = capsys.readouterr().out
    assert "4 -> 3" in shown and f"saved: {out}" in shown and "256 -> 192" in shown
    told = json.loads(figures.read_text())
    assert told["report"]["settings"]["num_attention_heads"] == [4, 2] and told["saved_bytes"] > 0
    assert told["report"]["after"]["parameters"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(out).parameters()
    )
    assert not logits(out).isnan().any()


@pytest.mark.parametrize(
    "asked, match",
    [
        (["--ffn", "1.5"], "ffn=1.5: give the share"),
        ([], "what is to be removed?"),
        (["--layers", "some"], "--layers some: give a share such as 0.25"),
        (["--ffn", "0.5", "--calib", "nowhere.txt"], "--calib nowhere.txt: there is no such file"),
        (["--ffn", "0.5", "--device", "cuda:99"], "cuda"),
    ],
)
def test_what_the_command_complains_of(asked: list[str], match: str, dense: Path, tmp_path: Path, capsys) -> None:
    assert main(["prune", str(dense), str(tmp_path / "out"), *asked]) == 2
    assert match in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given, means", [(None, None), ("0.25", 0.25), ("2", 2), ("3,7", [3, 7]), ("5,", [5]), ("1.0", 1.0)]
)
def test_layers_are_a_share_a_number_or_some(given: str | None, means: Any) -> None:
    assert layers(given) == means and type(layers(given)) is type(means)
