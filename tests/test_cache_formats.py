"""Caches in whole models: which have one, how much of the answer its format costs, and that it is really used."""

import copy

import pytest
import torch
from close import assert_close, assert_equal
from generating import Pair, build, greedy, pair, prompt
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fastllm
from fastllm import KVCache

HEADS = {"head_dim": 64}  # 4 bits come in groups of 32 of each half
# Of the RMS of the logits. Rounding to 8 bits costs a row of n numbers about max / 127 / 12**0.5 = 0.7 per cent of its
# RMS, to 4 bits about 8 per cent; keys and values of two layers, through norms that keep the size of things.
BOUNDS = {"int8": (0.0005, 0.03), "int4": (0.01, 0.4)}


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "gemma2", "gpt-oss"])
def models(request) -> Pair:
    every = {"num_experts_per_tok": 4} if request.param == "gpt-oss" else {}  # rounding cannot change a token's route
    return pair(request.param, **HEADS, **every)


def logits(model, format: str | None, given: dict, chunk: int = 7) -> torch.Tensor:
    """Of all tokens, given in chunks and then one by one, through a cache: [B, T, V]."""
    cache, ids, mask = KVCache(model.config, format), given["input_ids"], given["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found, cuts = [], [0, chunk, 2 * chunk, *range(2 * chunk + 1, ids.shape[1] + 1)]
    with torch.no_grad():
        for a, b in zip(cuts, cuts[1:], strict=False):
            out = model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache)
            found.append(out.logits)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(found, 1)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("format", BOUNDS)
def test_how_far_the_answer_moves(models, format):
    given = prompt(1, 24)
    with torch.no_grad():
        want = models.plain(**given).logits
    assert_close(logits(models.fast, None, given), want.double(), worst=1e-3, rms=1e-4, dtype=torch.float32)
    least, most = BOUNDS[format]
    assert least < error(logits(models.fast, format, given), want) < most


@pytest.mark.parametrize("format", [None, *BOUNDS])
def test_models_without_fused_attention_get_dense_rows(models, format):
    """And answer as those that read the codes, in a padded batch, too."""
    given = prompt(3, 24)
    seen = given["attention_mask"].bool()
    got, want, dense = (
        logits(model, kind, given)[seen]
        for model, kind in ((models.plain, format), (models.fast, format), (models.fast, None))
    )
    if format is None:
        assert_close(got, want.double(), worst=1e-3, rms=1e-4, dtype=torch.float32)
    else:  # the last bit of a key may push it to the next code
        assert error(got, want) < 0.2 * error(want, dense)


@pytest.mark.parametrize("format", BOUNDS)
def test_generate_uses_it(format):
    """Whichever loop runs: by what the cache is, and by what the answers are."""
    models = pair("llama", kv_cache=format, **HEADS)
    given = prompt(3)
    said = greedy(models.fast, **given)
    own = KVCache(models.plain.config, format)
    assert_equal(greedy(models.plain, **given, past_key_values=own), said)
    details = {"return_dict_in_generate": True, "output_logits": True}
    out = greedy(models.fast, **given, **details)
    assert_equal(out.sequences, said)
    for kwargs in ({}, {"num_beams": 2}, {"prefill_chunk_size": 5}):
        cache = greedy(models.fast, **given, **details, **kwargs).past_key_values
        assert isinstance(cache, KVCache) and cache.format.name == format
    want = greedy(models.plain, **given, **details).logits[0]
    least, most = BOUNDS[format]
    assert least < error(out.logits[0], want) < most
    cache = greedy(models.fast, **given, **details, past_key_values=KVCache(models.plain.config)).past_key_values
    assert cache.format is None, "a cache that is given is the one that is used"


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3-moe"])
def test_other_families_generate_with_it(family):
    settings = {} if family == "gpt2" else HEADS
    models = pair(family, kv_cache="int8", **settings)
    given = prompt(4)
    want = greedy(models.plain, **given, past_key_values=KVCache(models.plain.config, "int8"))
    assert_equal(greedy(models.fast, **given), want)


def test_beams_are_moved_with_their_scales():
    """Beams on codes and scales give what beams on the dense rows of an unpatched model give."""
    for format in BOUNDS:
        models = pair("llama", kv_cache=format, **HEADS)
        settings = {**prompt(2), "num_beams": 4, "num_return_sequences": 3}
        want = greedy(models.plain, **settings, past_key_values=KVCache(models.plain.config, format))
        assert_equal(greedy(models.fast, **settings), want)


def test_memory():
    sizes = {}
    for format in (None, *BOUNDS):
        model = build("llama", **HEADS)
        cache = KVCache(model.config, format)
        greedy(model, **prompt(2), past_key_values=cache)
        sizes[format] = cache.nbytes
    assert sizes["int8"] < 0.27 * sizes[None] and sizes["int4"] < 0.16 * sizes[None]  # of float32


def test_a_copy_of_the_cache_is_another_beginning():
    """One prompt read once, answers to several questions."""
    model = pair("gemma3", kv_cache="int8").fast
    given = prompt(1, 40)
    cache = KVCache(model.config, "int8")
    with torch.no_grad():
        model(given["input_ids"][:, :30], past_key_values=cache)
    for seed in (1, 2):
        ids = torch.cat((given["input_ids"][:, :30], prompt(1, 8, seed)["input_ids"]), 1)
        want = greedy(model, input_ids=ids)
        assert_equal(greedy(model, input_ids=ids, past_key_values=copy.deepcopy(cache)), want)
    assert cache.get_seq_length() == 30


def test_what_cannot_be_is_said_at_once():
    model = build("llama")
    with pytest.raises(ValueError, match="32.*64"):
        fastllm.optimize(model, None, kv_cache="int4", quiet=True)
    with pytest.raises(ValueError, match="int3.*int8"):
        fastllm.optimize(model, None, kv_cache="int3", quiet=True)
    assert greedy(model, **prompt()).shape == (1, 25) and not hasattr(model, "_fastllm")


def test_windows_are_those_of_transformers_cache():
    """Of every causal model that transformers has, by the settings that it starts with."""
    served = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            own = AutoConfig.for_model(kind)
            layers = DynamicCache(config=own).layers
        except (AttributeError, ImportError, KeyError, TypeError, ValueError, StrictDataclassError):
            continue  # it cannot be made of nothing
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        try:
            got = [layer.window for layer in KVCache(own).layers]
        except ValueError:
            continue
        assert plain, f"{kind} keeps something else than keys and values"
        assert got == [getattr(layer, "sliding_window", None) for layer in layers], kind
        served += 1
    assert served > 100


def test_errors_name_the_fix():
    with pytest.raises(ValueError, match="int3.*int8"):
        KVCache(build("llama").config, "int3")
    with pytest.raises(ValueError, match="linear_attention"):
        KVCache(AutoConfig.for_model("qwen3_next"))
    with pytest.raises(ValueError, match="share"):
        KVCache(AutoConfig.for_model("gemma3n_text"))
