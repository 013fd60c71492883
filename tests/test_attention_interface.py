"""fastllm's attention through transformers' door: models with every kind of mask that they make, and every cache."""

import copy

import pytest
import torch
from close import assert_close, assert_equal
from families import VOCABULARY, build, ids, rough
from pairs import PADDINGS, answer, mask
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from fastllm import KVCache
from fastllm.patch.attention import NAME, register

FAMILIES = ["llama", "gpt2", "gemma3", "gemma2", "gpt-oss", "bert", "mistral", "starcoder2", "phi3", "phi", "glm"]


def pair(family):
    """The model with fastllm's attention, and its double with transformers' own, which is all in plain sight."""
    register()
    model = rough(build(family, torch.float32, every_expert=family == "gpt-oss"))
    plain = copy.deepcopy(model)
    model.set_attn_implementation(NAME), plain.set_attn_implementation("eager")
    return model, plain


def check(model, plain, padding="none", **given):
    assert_close(answer(model, padding, **given), answer(plain, padding, **given).double(), dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding(family):
    model, plain = pair(family)
    for padding in PADDINGS:
        check(model, plain, padding)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert"])
def test_holes(family):
    model, plain = pair(family)
    seen = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1, 1, 0]])
    with torch.no_grad():
        got, want, without = (
            m(ids(), attention_mask=given)[0][seen.bool()]
            for m, given in ((model, seen), (plain, seen), (plain, torch.ones_like(seen)))
        )
    assert_close(got, want.double(), dtype=torch.float32)
    assert (want - without).norm() > 1e-3 * want.norm()


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_packed_sequences(family):
    model, plain = pair(family)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 0, 1]])
    check(model, plain, position_ids=positions, use_cache=False)
    with torch.no_grad():
        got = model(ids(), position_ids=positions, use_cache=False).logits
        alone = model(ids()[:1, 4:]).logits
    assert_close(got[:1, 4:], alone.double(), dtype=torch.float32)


def test_masks_of_ones_own():
    model, plain = pair("llama")
    seen = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    seen |= torch.eye(9, dtype=torch.bool)
    added = torch.zeros(2, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = plain(ids(), attention_mask=added).logits.double()
        for given in (seen, added, torch.where(seen, 0.0, -torch.inf)):
            assert_close(model(ids(), attention_mask=given).logits, want, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"int32 \[B, 1, 1, 2 or 3\], got \[2, 1, 9, 9\]"):
        model(ids(), attention_mask=seen.int())


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=14),
    "fastllm": KVCache,
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt-oss"])
def test_caches(family, cache):
    """Bit by bit, within and beyond the window: a few tokens at a time, and one by one."""
    model, plain = pair(family)
    tokens = ids(2, 12)
    for padding in PADDINGS:
        seen = mask(padding, 12)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        held = CACHES[cache](model.config)
        with torch.no_grad():
            want = plain(tokens, attention_mask=seen, position_ids=positions).logits
            for start, end in ((0, 3), (3, 5), (5, 6), (6, 10), (10, 11), (11, 12)):
                here = slice(start, end)
                given = None if padding == "none" else seen[:, :end]
                out = model(
                    tokens[:, here], attention_mask=given, position_ids=positions[:, here], past_key_values=held
                )
                real = seen[:, here].bool()
                assert_close(out.logits[real], want[:, here][real].double(), dtype=torch.float32)


def encoder_decoder(kind):
    register()
    torch.manual_seed(0)
    more = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2, "vocab_size": VOCABULARY}
    if kind == "t5":
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        model = T5ForConditionalGeneration(T5Config(**sizes, **more)).eval()
    else:
        layers = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIZES.items()}
        model = BartForConditionalGeneration(BartConfig(d_model=64, **layers, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    plain = copy.deepcopy(model)
    model.set_attn_implementation(NAME), plain.set_attn_implementation("eager")
    return model, plain


SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_with_a_decoder(kind):
    model, plain = encoder_decoder(kind)
    for outside in PADDINGS:
        for inside in PADDINGS:
            given = {"attention_mask": mask(outside, 7), "decoder_attention_mask": mask(inside)}
            with torch.no_grad():
                got, want = (m(ids(2, 7), decoder_input_ids=ids(), **given).logits for m in (model, plain))
            real = mask(inside).bool()
            assert_close(got[real], want[real].double(), dtype=torch.float32)
    options = {"attention_mask": mask("left", 7), "max_new_tokens": 8, "do_sample": False}
    for more in ({}, {"num_beams": 2}):
        assert_equal(model.generate(ids(2, 7), **options, **more), plain.generate(ids(2, 7), **options, **more))
