"""The attention function and the mask function that transformers calls, by themselves."""

from types import SimpleNamespace

import pytest
import torch
from close import assert_close, assert_equal
from families import ids
from pairs import PADDINGS, mask
from test_attention_interface import pair
from transformers import DynamicCache, LlamaConfig
from transformers import masking_utils as hf
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask, create_causal_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from fastllm.patch.attention import NAME, attention_forward, compact_mask, dense_mask, kind_of, register

# The mask by itself.


def config(implementation):
    return LlamaConfig(attn_implementation=implementation, vocab_size=8)


def dense_twin(make, padding, queries, keys, **more):
    """The mask of `make` as fastllm gives it, made dense; and transformers' own, as dense as it ever is."""
    embeds = torch.zeros(2, queries, 8)
    seen = None if padding == "none" else mask(padding, keys)
    cache = None
    if make is create_causal_mask and keys > queries:
        cache = DynamicCache()
        cache.update(torch.zeros(2, 1, keys - queries, 1), torch.zeros(2, 1, keys - queries, 1), 0)
    given = {"inputs_embeds": embeds, "attention_mask": seen, "past_key_values": cache, **more}
    compact = make(config(NAME), **given)
    skip = "allow_is_causal_skip" if make is create_causal_mask else "allow_is_bidirectional_skip"
    want = make(config("sdpa"), **given, **{skip: False})
    q, k = torch.zeros(2, 1, queries, 1), torch.zeros(2, 1, keys, 1)
    return compact, dense_mask(compact, q, k, make is create_causal_mask, None), want


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("queries, keys", [(9, 9), (4, 9), (1, 9)])
def test_compact_masks_say_what_dense_ones_do(padding, queries, keys):
    register()
    compact, got, want = dense_twin(create_causal_mask, padding, queries, keys)
    real = mask(padding, keys)[:, keys - queries :].bool()
    if padding == "none":
        assert compact is None
    if got is None:
        assert queries == 1 and want.all()
    else:
        assert_equal(got.expand(2, 1, queries, keys)[:, 0][real], want[:, 0][real])
    if padding == "left":
        assert compact.dtype == torch.int32 and compact[:, 0, 0].tolist() == [[3, keys], [0, keys]]
    if padding == "right":  # padding sees the tokens alone, which no diagonal says
        assert_equal(compact, want)


@pytest.mark.parametrize("padding", PADDINGS)
def test_compact_masks_of_both_directions(padding):
    register()
    compact, got, want = dense_twin(create_bidirectional_mask, padding, 9, 9)
    if padding == "none":
        assert compact is None
    else:
        assert compact.shape == (2, 1, 1, 2)
        assert_equal(got.expand_as(want), want)


def test_what_a_compact_mask_cannot_say_is_dense():
    register()

    def prefix(batch, head, q, k):
        return k < 4

    for more in ({"or_mask_function": prefix}, {"and_mask_function": prefix}):
        compact, _, want = dense_twin(create_causal_mask, "left", 9, 9, **more)
        assert compact.dtype == torch.bool
        assert_equal(compact, want)
    model, plain = pair("llama")
    given = create_causal_mask(config("sdpa"), torch.zeros(2, 9, 8), mask("right"), None, or_mask_function=prefix)
    added = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
    with torch.no_grad():
        got, want = model(ids(), attention_mask=given).logits, plain(ids(), attention_mask=added).logits
    assert_close(got[mask("right").bool()], want[mask("right").bool()].double(), dtype=torch.float32)


def test_the_kind_of_a_mask_function():
    causal, window = hf.causal_mask_function, hf.sliding_window_causal_mask_function(5)
    assert kind_of(causal) == ("causal", None) and kind_of(window) == ("causal", 5)
    assert kind_of(hf.bidirectional_mask_function) == ("full", None)
    others = [
        hf.chunked_causal_mask_function(4, torch.zeros(1)),
        hf.or_masks(causal, window),
        hf.and_masks(causal, hf.bidirectional_mask_function),
        hf.and_masks(causal, hf.sliding_window_overlay(3), hf.sliding_window_overlay(5)),
        hf.sliding_window_bidirectional_mask_function(5),
        hf.packed_sequence_mask_function(torch.zeros(1, 4)),
        hf.add_offsets_to_mask_function(causal, 1, 0),
        lambda batch, head, q, k: k <= q,
        SimpleNamespace(),
    ]
    assert all(kind_of(other) == ("other", None) for other in others)


def test_a_sliding_window_is_a_third_number():
    window = hf.sliding_window_causal_mask_function(5)
    rows = compact_mask(2, 3, 7, 8, 4, window, torch.ones(2, 11, dtype=torch.bool), device="cpu")
    assert rows.dtype == torch.int32 and rows[:, 0, 0].tolist() == [[0, 7, 5]] * 2
    assert_equal(
        dense_mask(rows, torch.zeros(2, 1, 3, 1), torch.zeros(2, 1, 7, 1), True, 5),
        hf.sdpa_mask(2, 3, 7, 8, 4, window, torch.ones(2, 11, dtype=torch.bool), allow_is_causal_skip=False),
    )


def test_both_halves_are_registered_under_a_name_that_means_nothing_else():
    register()
    assert ALL_MASK_ATTENTION_FUNCTIONS[NAME] is compact_mask
    assert "flash" not in NAME and "/" not in NAME and "eager" not in NAME


# The function by itself.


def operands(dtype=torch.float32, queries=6, keys=6):
    generator = torch.Generator().manual_seed(4)
    shapes = ((2, 4, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attention_module(causal=True):
    m = torch.nn.Module().eval()
    m.is_causal, m.num_key_value_groups = causal, 2
    return m


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries, keys", [(6, 6), (3, 8), (1, 8)])
def test_the_function_is_transformers_own(causal, queries, keys):
    q, k, v = operands(queries=queries, keys=keys)
    rows = torch.arange(queries)[:, None] + keys - queries
    hidden = (torch.arange(keys) > rows) & causal
    added = torch.zeros(queries, keys).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
    m = attention_module(causal)
    want = eager_attention_forward(m, q, k, v, added, scaling=0.3)[0]
    for given in (None, added, ~hidden[None, None]):
        got, weights = attention_forward(m, q, k, v, given, scaling=0.3)
        assert_close(got, want.double(), dtype=torch.float32)
        assert weights is None and got.is_contiguous() and got.shape == (2, queries, 4, 16)
    got, other = (attention_forward(m, q, k, v, None, scaling=0.3, is_causal=way)[0] for way in (causal, not causal))
    assert_close(got, want.double(), dtype=torch.float32)
    assert torch.equal(other, got) == (queries == 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_position_bias_is_added(causal, padding):
    q, k, v = operands()
    bias = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    rows = torch.tensor([[2, 6], [0, 6]], dtype=torch.int32)[:, None, None] if padding == "left" else None
    hidden = torch.ones(6, 6).triu(1).bool() & causal
    if padding == "left":
        hidden = hidden[None, None] | (torch.arange(6) < rows[..., :1])
    m = attention_module(causal)
    added = bias.masked_fill(hidden, torch.finfo(torch.float32).min)
    want = eager_attention_forward(m, q, k, v, added, scaling=0.3)[0]
    got = attention_forward(m, q, k, v, rows, scaling=0.3, position_bias=bias)[0]
    first = 2 if padding == "left" else 0
    assert_close(got[:, first:], want[:, first:].double(), dtype=torch.float32)


def test_what_it_does_not_know_it_refuses():
    q, k, v = operands()
    m = attention_module()
    with pytest.raises(ValueError, match="does not know cu_seq_lens_q, temperature, and would be wrong without"):
        attention_forward(m, q, k, v, None, temperature=2.0, cu_seq_lens_q=torch.zeros(1))
    given = {"position_ids": torch.zeros(1), "use_cache": True, "cu_seq_lens_q": None}
    assert_equal(attention_forward(m, q, k, v, None, **given)[0], attention_forward(m, q, k, v, None)[0])
    for more in ({"softcap": 2.0}, {"s_aux": torch.zeros(4)}):
        with pytest.raises(ValueError, match="dropout with softcap or sinks"):
            attention_forward(m, q, k, v, None, dropout=0.1, **more)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_dropout_is_torchs(padding):
    q, k, v = operands()
    m, rows = attention_module(), torch.tensor([[2, 6], [0, 6]], dtype=torch.int32)[:, None, None]
    given = None if padding == "none" else rows
    torch.manual_seed(0)
    got = attention_forward(m, q, k, v, given, dropout=0.5, sliding_window=3)[0]
    assert m.__dict__["_fastllm_fallbacks"] == {"dropout"}
    dense = dense_mask(given, q, k, True, 3)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    torch.manual_seed(0)
    want = torch.nn.functional.scaled_dot_product_attention(q, *wide, dense, dropout_p=0.5).transpose(1, 2)
    assert_close(got[1], want[1].double(), dtype=torch.float32)
    rate = torch.stack([attention_forward(m, q, k, torch.ones_like(v), given, dropout=0.5)[0] for _ in range(200)])
    assert abs(rate[:, 1].mean() - 1) < 0.05


def test_gradients_are_those_of_transformers_own():
    hidden = torch.ones(6, 6).triu(1).bool()
    added = torch.zeros(6, 6).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
    grads = []
    for function, given in ((attention_forward, None), (eager_attention_forward, added)):
        inputs = [t.requires_grad_() for t in operands()]
        function(attention_module(), *inputs, given, scaling=0.3)[0].square().sum().backward()
        grads.append([t.grad for t in inputs])
    for got, want in zip(*grads, strict=True):
        assert_close(got, want.double(), dtype=torch.float32)
