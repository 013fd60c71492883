"""`KVCache` against its definition: the history of all rows, kept whole, beside transformers' own cache."""

import copy
import random

import pytest
import tiny
import torch
from close import assert_close, assert_equal
from torch import Tensor
from transformers import AutoConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fastllm import KVCache
from fastllm.decode.cache import FIRST, SLACK, KVLayer
from fastllm.kv_formats import KV_FORMATS
from fastllm.ops.attention_reference import reference

B, HKV, HQ, D, DV = 2, 2, 4, 64, 128
FORMATS = [None, *KV_FORMATS]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def config(kind: str = "gemma3_text", **settings):
    """Of two layers: one with a window, one without."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma3_text" else {}
    return AutoConfig.for_model(kind, **(tiny.SIZES | {"head_dim": D} | kinds | settings))


def make(format: str | None = None, window: int | None = None, slots: int = 0) -> KVLayer:
    return KVLayer(None if format is None else KV_FORMATS[format], window, slots)


def chunk(T: int, batch: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, HKV, T, D), torch.randn(batch, HKV, T, DV)


def rounded(x: Tensor, format: str | None) -> Tensor:
    """x as `format` holds it."""
    return x if format is None else KV_FORMATS[format].dequantize(*KV_FORMATS[format].quantize(x), x.dtype)


class History:
    """Every row that a layer was given and did not take back, rounded once: what the layer holds is its end."""

    def __init__(self, layer: KVLayer):
        self.layer, self.format = layer, layer.format and layer.format.name
        self.k, self.v = chunk(0)

    def add(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = (
            torch.cat((self.k, rounded(k, self.format)), 2),
            torch.cat((self.v, rounded(v, self.format)), 2),
        )

    def update(self, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """T tokens more; what comes back, and the mask sizes told before, are held to the history. (new, returned)"""
        new = chunk(T)
        count, offset = self.layer.get_mask_sizes(T)
        got = self.layer.update(*new)
        self.add(*new)
        total = self.k.shape[2]
        assert offset + count == total == self.layer.get_seq_length()
        assert count >= min(total, (self.layer.window or total) - 1 + T), "a key inside the window is gone"
        assert_equal(got[0], self.k[:, :, offset:])
        assert_equal(got[1], self.v[:, :, offset:])
        return *new, *got

    def crop(self, tokens: int) -> None:
        self.layer.crop(-tokens)
        keep = self.k.shape[2] - tokens
        self.k, self.v = self.k[:, :, :keep], self.v[:, :, :keep]
        assert self.layer.get_seq_length() == keep


# windows: smaller than a chunk, those for which FIRST slots are too few and too many, wider than all
WINDOWS = [None, 8, 100, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, FIRST - SLACK, 150, 500))]


@pytest.mark.parametrize("slots", [0, 300])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("format", FORMATS)
def test_any_chunks_come_back_as_transformers_cache_gives_them(format, window, slots):
    layer, own = make(format, window, slots), DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    history, rng = History(layer), random.Random(f"{format} {window} {slots}")
    for T in [rng.choice([5, 150, 320]), *rng.choices([1, 1, 1, 2, 17, 60, 200], k=40)]:
        k, v, *got = history.update(T)
        for mine, theirs in zip(got, own.update(rounded(k, format), rounded(v, format)), strict=True):
            assert_equal(mine[:, :, -theirs.shape[2] :] if window else mine, theirs)
    if window == 8:
        assert layer.keys.shape[2] <= max(2 * (window + SLACK), FIRST), "a window's memory grows"


@pytest.mark.parametrize("window", [None, 8, 100])
@pytest.mark.parametrize("format", [None, "int8"])
def test_tokens_are_taken_back(format, window):
    history, rng = History(make(format, window)), random.Random(f"{format} {window}")
    for _ in range(60):
        T = rng.choice([1, 3, 20, 90])
        history.update(T)
        history.crop(rng.choice([0, 1, min(T, SLACK) - 1, min(T, SLACK)]))


def test_all_tokens_are_taken_back():
    history = History(make())
    history.update(5)
    history.crop(5)
    history.update(7)


def test_what_a_window_left_behind_cannot_come_back():
    history = History(make(window=8))
    for T in (150, 1, 1):
        history.update(T)
    with pytest.raises((ValueError, RuntimeError), match="80"):
        history.layer.crop(-80)


def test_a_positive_crop_is_no_number_of_tokens():
    """Up to transformers 5.17 it is the length to keep; later it is refused."""
    layer = make()
    layer.update(*chunk(10))
    with pytest.raises(ValueError, match="crop"):
        layer.crop(3)


@pytest.mark.parametrize("format", FORMATS)
def test_growing_copies_no_code_twice_and_keeps_all(format):
    history = History(layer := make(format))
    history.update(FIRST)
    before = [t.clone() for t in layer._stored()]
    slots = layer.keys.shape[2]
    history.update(1)
    assert layer.keys.shape[2] > slots
    for t, was in zip(layer._stored(), before, strict=True):
        assert_equal(t[:, :, :FIRST], was[:, :, :FIRST])


@pytest.mark.parametrize("format", list(KV_FORMATS))
def test_a_window_that_moves_rounds_nothing_again(format):
    history = History(layer := make(format, 8))
    history.update(100)
    held = [t[:, :, :100].clone() for t in layer._stored()]
    while not layer.dropped:
        history.update(7)
    kept = 100 - layer.dropped
    assert 0 < kept < 100
    for t, was in zip(layer._stored(), held, strict=True):
        assert_equal(t[:, :, :kept], was[:, :, layer.dropped :])


@pytest.mark.parametrize("format", list(KV_FORMATS))
def test_rows_are_stored_as_the_format_says(format):
    layer, (k, v) = make(format), chunk(9)
    layer.update(k, v)
    stored = layer._stored()
    want = [
        codes_or_scale
        for pair in zip(*map(KV_FORMATS[format].quantize, (k, v)), strict=True)
        for codes_or_scale in pair
    ]
    for t, was in zip(stored, want, strict=True):
        assert_equal(t[:, :, :9], was)
    got = layer.update(*chunk(1))[0][:, :, :9]
    assert 0 < (got - k).abs().max() < (0.03 if format == "int8" else 0.3), "not rounded, or wrongly"


@pytest.mark.parametrize("format", FORMATS)
def test_unwritten_slots_are_poison_and_never_leak(format):
    layer = make(format, slots=64)
    k, v = chunk(5)
    layer.update(k, v)
    poison = layer.keys if format is None else layer.k_scale
    assert poison[:, :, 5:].isnan().all(), "the premise of this test"
    q = torch.randn(B, HQ, 1, D)
    assert layer.attend(q, None, causal=True).isfinite().all()
    for t in layer.update(*chunk(1)):
        assert t.shape[2] == 6 and t.isfinite().all()
    layer.crop(-3)
    for t in layer.update(*chunk(2)):
        assert t.shape[2] == 5 and t.isfinite().all()


STEPS = [*range(1, 21, 2), 2, 16, 18, 1, 1, 40, 1]


@pytest.mark.parametrize("kind", ["plain", "padded", "all options"])
@pytest.mark.parametrize("window", [None, 8, 100, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", FORMATS)
def test_attend(format, window, kind):
    """append and attend, against the reference on all rows that ever came."""
    starts = torch.tensor([0, 13 if kind == "padded" else 7], dtype=torch.int32)
    mask = None if kind == "plain" else torch.zeros(B, 1, 1, 2, dtype=torch.int32)
    options = {"scale": 0.05, "softcap": 2.0, "sinks": torch.randn(HQ)} if kind == "all options" else {}
    history = History(layer := make(format, window))
    for T in [150, *STEPS] if window == 8 else STEPS:
        q, (k, v) = torch.randn(B, HQ, T, D), chunk(T)
        if layer.append(q, k, v, cos=None, sin=None) is None:
            assert T > 2 * SLACK
            layer.update(k, v)
            history.add(k, v)
            continue
        history.add(k, v)
        total = history.k.shape[2]
        start = None
        if mask is not None:
            mask[:, 0, 0, 0], mask[:, 0, 0, 1] = starts, total
            start = starts
        got = layer.attend(q, mask, causal=True, window=window, **options)
        want = reference(q, history.k, history.v, causal=True, window=window, kv_start=start, **options)
        assert got.shape == (B, HQ, T, DV)
        assert_close(got, want.double(), dtype=torch.float32)


def test_append_returns_queries_as_the_model_wants_them():
    """Rotated and normalized; and what is stored is the same of the keys."""
    from fastllm.ops.norm import rms_norm
    from fastllm.ops.rotary import rotary

    layer, (k, v), q = make(slots=32), chunk(5), torch.randn(B, HQ, 5, D)
    angle = torch.rand(B, 5, D // 2) * 6
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    weights = torch.rand(2, D) + 0.5
    got = layer.append(q, k, v, cos=cos, sin=sin, q_weight=weights[0], k_weight=weights[1], eps=1e-5, cast_first=False)
    normed = [rms_norm(x, w, 1e-5, cast_first=False) for x, w in zip((q, k), weights, strict=True)]
    for mine, want in zip((got, layer.dense()[0]), rotary(*normed, cos, sin), strict=True):
        assert_close(mine, want.double(), dtype=torch.float32)
    assert_equal(layer.dense()[1], v)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_the_batch_are_moved(format):
    def held(change) -> Tensor:
        layer = make(format)
        layer.update(k, v)
        change(layer)
        assert layer.batch_size == len(layer.dense()[0])
        return torch.cat([x.flatten(2) for x in layer.dense()], -1)

    (k, v), order = chunk(5, batch=3), torch.tensor([2, 0, 0])
    as_it_is = held(lambda _: None)
    assert_equal(held(lambda c: c.reorder_cache(order)), as_it_is[order])
    assert_equal(held(lambda c: c.batch_repeat_interleave(2)), as_it_is.repeat_interleave(2, 0))
    assert_equal(held(lambda c: c.batch_select_indices(order[:2])), as_it_is[order[:2]])
    empty = make(format)
    empty.reorder_cache(order), empty.batch_repeat_interleave(2), empty.batch_select_indices(order)
    assert empty.get_seq_length() == 0 and empty.batch_size == -1


def test_reset_and_copies():
    cache = KVCache(config(sliding_window=8), "int8")
    for T in (100, 80):
        rows = [cache.update(*chunk(T), i)[0] for i in range(2)]
    twin = copy.deepcopy(cache)
    new = chunk(1)
    assert_equal(twin.update(*new, 0)[0], cache.update(*new, 0)[0])
    cache.update(*new, 1)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(3, 0) == (3, 0) == cache.get_mask_sizes(3, 1)
    k, v = chunk(3)
    assert_equal(cache.update(k, v, 0)[0], rounded(k, "int8"))
    assert twin.get_seq_length(1) == 180, "the copy is not its own"
    assert_equal(twin.update(*new, 1)[0][:, :, :180], rows[1])


def test_memory_is_counted_and_saved():
    sizes = {}
    for format in FORMATS:
        cache = KVCache(config("llama"), format, slots=256)
        assert cache.nbytes == 0
        for i in range(2):
            cache.update(*chunk(256), i)
        sizes[format] = cache.nbytes
    tokens = 2 * B * HKV * 256  # of both layers
    assert sizes[None] == tokens * 4 * (D + DV)
    assert sizes["int8"] == tokens * (D + DV + 2 * 4)
    assert sizes["int4"] == tokens * ((D + DV) // 2 + 2 * 2 * (D + DV) // 32)
    KVCache(config(), slots=10**6)  # nothing is allocated before it is needed
