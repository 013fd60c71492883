"""`fastllm.quantize` from a checkpoint on disk to another: the same result, little memory, and interrupts."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import fastllm
from fastllm.checkpoints.coding import CheckpointError
from fastllm.checkpoints.mapped import Mapped, load_mapped
from fastllm.compress import calibrate, stream

ASK = {"weights": "int4-g32", "lm_head": False, "min_coverage": 0, "quiet": True}
PLAIN = {"attention": False, "fuse": False, "decode": False}


def ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(1, 60, (rows, 80), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny.build("llama", num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "bert"])
def test_it_makes_what_a_model_in_memory_becomes(family: str, method: str, tmp_path: Path) -> None:
    tiny.build(family).save_pretrained(tmp_path / "dense")
    model = tiny.load(family, tmp_path / "dense")
    report = fastllm.quantize(model, method=method, calib=ids(), **ASK)
    told = fastllm.quantize(tmp_path / "dense", method=method, calib=ids(), out=tmp_path / "out", **ASK)
    assert told.plan == report.plan and told.memory_after <= report.memory_after
    if told.has_vocabulary:
        assert told.accuracy.kl == pytest.approx(report.accuracy.kl, rel=0.1)  # rows of other batches
    model.save_pretrained(tmp_path / "twin")
    mine, theirs = weights(tmp_path / "out"), weights(tmp_path / "twin")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "twin")]
    assert configs[0] == configs[1]
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out", "twin"}
    loaded = fastllm.load(tmp_path / "out", **PLAIN)
    assert torch.equal(loaded(ids())[0], model(ids())[0])


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_after_an_interrupt_it_goes_on(family: str, method: str, tmp_path: Path, monkeypatch) -> None:
    tiny.build(family, num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    done: list[int] = []
    block = calibrate._quantize_block

    def count(blocks, index, *args):
        if index == stop:
            raise KeyboardInterrupt
        done.append(index)
        return block(blocks, index, *args)

    monkeypatch.setattr(calibrate, "_quantize_block", count)
    for stop in (1, 2, 3):
        call = lambda: fastllm.quantize(tmp_path / "dense", method=method, calib=ids(), out=tmp_path / "out", **ASK)  # noqa: E731
        if stop < 3:
            with pytest.raises(KeyboardInterrupt):
                call()
            assert (
                not (tmp_path / "out").exists() and (tmp_path / "out.unfinished" / "block-00000.safetensors").exists()
            )
        else:
            call()
    assert done == [0, 1, 2]
    stop = None
    fastllm.quantize(tmp_path / "dense", method=method, calib=ids(), out=tmp_path / "whole", **ASK)
    mine, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert mine.keys() == whole.keys() and all(torch.equal(mine[name], whole[name]) for name in mine)


def test_other_work_is_not_gone_on_with(dense: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stream.os, "rename", stop)  # at the very end
        with pytest.raises(KeyboardInterrupt):
            fastllm.quantize(dense, calib=ids(), out=tmp_path / "out", **ASK)
    changes = (
        ({"calib": ids(3)}, "data"),
        ({"weights": "int4-g64"}, "formats"),
        ({"method": "awq"}, "method"),
        ({"dtype": torch.float16}, "dtype"),
    )
    for change, what in changes:
        with pytest.raises(ValueError, match=f"other work .it differs in {what}"):
            fastllm.quantize(dense, out=tmp_path / "out", **{"calib": ids(), **ASK, **change})
    config = (dense / "config.json").read_text()
    (dense / "config.json").write_text(json.dumps(json.loads(config) | {"rms_norm_eps": 1e-4}))
    with pytest.raises(ValueError, match="differs in files"):
        fastllm.quantize(dense, out=tmp_path / "out", calib=ids(), **ASK)
    with (tmp_path / "out.unfinished" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is at work"):
            fastllm.quantize(dense, out=tmp_path / "out", calib=ids(), **ASK)


def test_an_interrupt_at_the_very_end_costs_nothing(dense: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stream.os, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            fastllm.quantize(dense, calib=ids(), out=tmp_path / "out", **ASK)
        patched.setattr(calibrate, "_quantize_block", stop)  # not needed again
        patched.setattr(stream.os, "rename", os.replace)
        (dense / "preprocessor_config.json").write_text("{}")
        os.utime(dense)
        with pytest.raises(ValueError, match="differs in files"):  # one more file that it might depend on
            fastllm.quantize(dense, calib=ids(), out=tmp_path / "out", **ASK)
        (dense / "preprocessor_config.json").unlink()
        report = fastllm.quantize(dense, calib=ids(), out=tmp_path / "out", **ASK)
    assert f"saved: {tmp_path / 'out'}" in str(report)
    fastllm.load(tmp_path / "out", **PLAIN)


def test_what_lies_beside_comes_along_and_classifiers_work(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "causal")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal", num_labels=3, dtype=torch.bfloat16)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text('{"a": 1}')
    rows = {"input_ids": ids(), "attention_mask": torch.arange(80).repeat(4, 1) >= 70}  # padding on the left
    report = fastllm.quantize(tmp_path / "dense", calib=[rows], out=tmp_path / "out", **ASK)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"a": 1}'
    assert report.accuracy.tokens == 1 and len(report.plan.chosen) >= 14
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    assert type(load_mapped(tmp_path / "dense")[0]).__name__ == "LlamaModel"


def test_refusals(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="where should"):
        fastllm.quantize(dense, calib=ids(), **ASK)
    with pytest.raises(ValueError, match="is the model itself"):
        fastllm.quantize(dense, calib=ids(), out=dense, **ASK)
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        fastllm.quantize(tmp_path / "absent", calib=ids(), out=tmp_path / "out", **ASK)
    with pytest.raises(ValueError, match="out= goes with the path"):
        fastllm.quantize(tiny.build("llama"), calib=ids(), out=tmp_path / "out", **ASK)
    with pytest.raises(ValueError, match="prompt= goes with a model"):
        fastllm.quantize(dense, calib=ids(), out=tmp_path / "out", prompt=ids(1), **ASK)
    with pytest.raises(ValueError, match="max_loss measures a model in memory"):
        fastllm.quantize(dense, max_loss=0.1, calib=ids(), out=tmp_path / "out", **ASK)
    with pytest.raises(TypeError, match="needs the tokenizer"):
        fastllm.quantize(dense, out=tmp_path / "out", **ASK)
    fastllm.quantize(dense, calib=ids(), out=tmp_path / "out", **ASK)
    with pytest.raises(ValueError, match="is not empty"):
        fastllm.quantize(dense, calib=ids(), out=tmp_path / "out", **ASK)
    with pytest.raises(ValueError, match="quantized already, by 'compressed-tensors'"):
        fastllm.quantize(tmp_path / "out", calib=ids(), out=tmp_path / "again", **ASK)
    (dense / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        fastllm.quantize(dense, calib=ids(), out=tmp_path / "again", **ASK)


def test_mapped_weights_are_those_of_the_files(dense: Path) -> None:
    model, source = load_mapped(dense)
    want = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in want.state_dict().items())
    name = "model.layers.1.mlp.up_proj.weight"
    assert source is not None and model.get_parameter(name).data_ptr() == source.tensors[name].data_ptr()
    before = (dense / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.get_parameter(name).zero_()
    assert (dense / "model.safetensors").read_bytes() == before
    source.release()
    assert torch.equal(model.get_parameter(name), want.get_parameter(name))
    assert load_mapped(dense, torch.float32)[0].dtype == torch.float32
    assert Mapped([]).tensors == {}


MEASURE = """
import sys, threading, time
import torch, fastllm
from fastllm.compress import stream

def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) << 10

most = 0
def watch():
    global most
    while True:
        most = max(most, own())
        time.sleep(0.004)

torch.set_num_threads(1)
stream.SHARD = 1 << 21  # as large as a quantized block, as it is for models of their usual size
threading.Thread(target=watch, daemon=True).start()
small, large, out = sys.argv[1:]
ids = torch.arange(1, 257).view(2, 128) % 60
for number, model in enumerate((small, small, large)):  # the first time counts what libraries take on first use
    most = 0
    fastllm.quantize(model, "int4-g32", calib=ids, quiet=True, min_coverage=0, out=f"{out}{number}")
    print(most)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    """A model of ten blocks takes hardly more than one of a single block."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "dtype": torch.float32}
    for name, count in (("small", 1), ("large", 10)):
        tiny.build("llama", num_hidden_layers=count, **sizes).save_pretrained(tmp_path / name)
    block = sum(t.nbytes for k, t in weights(tmp_path / "large").items() if k.startswith("model.layers.0."))
    assert sum(t.nbytes for t in weights(tmp_path / "large").values()) > 10 * block > 75e6
    folders = [str(tmp_path / name) for name in ("small", "large", "out")]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the process, and is not counted
    command = [sys.executable, "-c", MEASURE, *folders]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    _, one, ten = map(int, answer.stdout.split())
    assert ten < one + 0.5 * block, f"{one / 1e6:.0f} MB and {ten / 1e6:.0f} MB for blocks of {block / 1e6:.0f} MB"
    assert AutoConfig.from_pretrained(tmp_path / "out2").num_hidden_layers == 10
