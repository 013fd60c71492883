"""`generate` of an optimized model: token for token what transformers gives, with every cache, turn after turn."""

import copy

import pytest
import torch
from close import assert_close, assert_equal
from generating import FAMILIES, SLIDING, WINDOW, Pair, Streamer, build, greedy, pair, prompt
from transformers import DynamicCache, StaticCache

import fastllm
from fastllm import KVCache
from fastllm.decode.cache import SLACK

SHORT = WINDOW - 3  # shorter than the window, which the tokens to come then cross
LONG = 2 * (WINDOW + SLACK) + 10  # more than a sliding layer holds
PROMPTS = {"one": prompt(), "short": prompt(1, SHORT), "ragged": prompt(4)}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request) -> Pair:
    return pair(request.param)


@pytest.fixture(scope="module")
def llama() -> Pair:
    return pair("llama")


@pytest.fixture(scope="module")
def gemma() -> Pair:
    return pair("gemma3")


@pytest.fixture(autouse=True)
def fresh(request) -> None:
    """No reasons of tests before."""
    for name in ("models", "llama", "gemma"):
        if name in request.fixturenames:
            request.getfixturevalue(name).reasons.clear()


def test_answers_depend_on_the_prompt(models):
    """The premise of all the rest: other tokens, or one token elsewhere, give another answer."""
    given = prompt()
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][0, -3] = 7
    answers = [tuple(greedy(models.plain, **p)[0, 13:].tolist()) for p in (given, other)]
    assert len(set(answers)) == 2 and len(set(answers[0])) > 3


@pytest.mark.parametrize("given", PROMPTS.values(), ids=PROMPTS)
def test_every_family(models, given):
    want = greedy(models.plain, **given)
    assert_equal(greedy(models.fast, **given), want)
    assert not models.reasons
    assert_equal(type(models.fast).generate(models.fast, **given, max_new_tokens=12, do_sample=False), want)
    for cache in (DynamicCache(config=models.plain.config), StaticCache(models.plain.config, max_cache_len=40)):
        assert_equal(greedy(models.fast, **given, past_key_values=cache), want)
    assert models.reasons == ["a cache of the kind DynamicCache", "a cache of the kind StaticCache"]
    assert_equal(greedy(models.fast, **given, cache_implementation="static"), want)
    assert models.reasons[2:] == ["cache_implementation='static'"]
    assert_equal(greedy(models.plain, **given, past_key_values=KVCache(models.plain.config)), want)
    assert_equal(greedy(models.fast, **given, past_key_values=KVCache(models.plain.config)), want)
    assert len(models.reasons) == 3


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("family", SLIDING)
def test_a_window_that_moves(family, fuse):
    """While it generates, and in the prompt; with rows that begin before it, in it, and just behind it."""
    models = pair(family, fuse=fuse)
    for given, new in ((prompt(2, LONG - 15), 12), (prompt(3, LONG), 5)):
        given["attention_mask"][1, : given["attention_mask"].shape[1] - 3] = 0
        want = greedy(models.plain, new, **given)
        assert_equal(greedy(models.fast, new, **given), want)
        assert_equal(greedy(models.fast, new, **given, past_key_values=KVCache(models.fast.config)), want)
        assert not models.reasons
        for model in models[:2]:  # transformers' loop, whose masks count from the first key that is held
            cache = KVCache(models.plain.config)
            out = greedy(model, new, **given, past_key_values=cache, return_dict_in_generate=True)
            assert_equal(out.sequences, want)
            assert cache.layers[0].dropped > 0
        models.reasons.clear()


@pytest.mark.slow
@pytest.mark.parametrize("window", [2, 60, 100, 150])
@pytest.mark.parametrize("family", SLIDING)
def test_windows_of_other_sizes(family, window):
    """Those beside which a layer's first slots are few, and many."""
    models = pair(family, sliding_window=window)
    for given, new in ((prompt(4, 100), 150), (prompt(4, 400), 20)):
        want = greedy(models.plain, new, **given)
        assert_equal(greedy(models.fast, new, **given), want)
        for model in models[:2]:
            assert_equal(greedy(model, new, **given, past_key_values=KVCache(model.config)), want)


def turns(model, cache, sizes: list[int], batch: int = 1, **kwargs) -> torch.Tensor:
    """A conversation: each turn adds tokens, and lets 6 be generated. All of it, as one sequence."""
    given = prompt(batch, sizes[0])
    mask = given["attention_mask"]
    said = given["input_ids"]
    for i, size in enumerate(sizes):
        if i:
            said = torch.cat((said, prompt(1, size, seed=10 + i)["input_ids"].expand(batch, -1)), 1)
        mask = torch.cat((mask, torch.ones(batch, said.shape[1] - mask.shape[1], dtype=torch.int64)), 1)
        mine = {} if cache is None else {"past_key_values": cache}
        said = greedy(model, 6, input_ids=said, attention_mask=mask, **mine, **kwargs)
        if cache is not None:
            assert cache.get_seq_length() == said.shape[1] - 1
    return said


@pytest.mark.parametrize("sizes", [[13, 1, 5], [LONG, LONG - 40, 5, LONG + 40, 1], [5, LONG]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_conversation_goes_on(family, batch, sizes, request):
    models = request.getfixturevalue(family)
    models.reasons.clear()
    want = turns(models.plain, None, sizes, batch)
    assert_equal(turns(models.fast, cache := KVCache(models.fast.config), sizes, batch), want)
    assert not models.reasons
    held = [layer.keys for layer in cache.layers]
    assert not any(t.is_inference() for t in held), "the user's cache cannot be changed any more"
    assert_equal(turns(models.fast, DynamicCache(config=models.fast.config), sizes, batch), want)


def test_a_conversation_goes_on_without_fusions():
    models = pair("gemma3", fuse=False)
    sizes = [LONG, LONG - 40, 5]
    assert_equal(turns(models.fast, KVCache(models.fast.config), sizes, 2), turns(models.plain, None, sizes, 2))


def test_a_conversation_goes_on_in_int8(llama):
    """Tokens are rounded once, when they come: turns change nothing."""
    cache, sizes = KVCache(llama.fast.config, "int8"), [20, 30, 3]
    said = turns(llama.fast, cache, sizes)
    once = pair("llama", kv_cache="int8").fast
    assert_equal(greedy(once, 6, input_ids=said[:, :-6]), said)


def test_a_prompt_that_the_cache_holds(llama):
    """The user has read the prompt already; and more of it than this one repeats."""
    given = prompt()
    want = greedy(llama.plain, **given)
    for held in (5, 12, 13):
        cache = KVCache(llama.fast.config)
        with torch.no_grad():
            llama.fast(given["input_ids"][:, :held], past_key_values=cache)
        assert_equal(greedy(llama.fast, **given, past_key_values=copy.deepcopy(cache)), want)
        new = {"input_ids": given["input_ids"][:, held:], "attention_mask": given["attention_mask"]}
        if held < 13:  # only what is new, as transformers allows, too
            said = greedy(llama.fast, **new, past_key_values=cache)
            assert_equal(said, want[:, held:])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt-oss"])
def test_the_model_stays_usable(family):
    """Plain calls, gradients, modes, copies and `restore` after generation."""
    models = pair(family)
    given = prompt(2)
    before = {k: v.clone() for k, v in models.plain.state_dict().items()}
    with torch.enable_grad():
        want = greedy(models.fast, **given)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert not want.is_inference() and want.is_contiguous()
    owned = [*models.fast.parameters(), *models.fast.buffers()]
    assert not any(t.is_inference() for t in owned)
    labels = given["input_ids"]
    for model in models[:2]:
        model(labels, labels=labels).loss.backward()
    gradients = [
        p.grad for model in models[:2] for name, p in model.named_parameters() if name.endswith("norm.weight")
    ]
    half = len(gradients) // 2
    for mine, theirs in zip(gradients[half:], gradients[:half], strict=True):
        assert_close(mine, theirs.double(), worst=1e-3, rms=1e-4, dtype=torch.float32)
    twin = copy.deepcopy(models.fast)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert_equal(greedy(models.fast, **given), want)
    assert (greedy(twin, **given)[:, 13:] == 0).all(), "a copy generates with the weights of the original"
    fastllm.restore(models.fast)
    assert "generate" not in vars(models.fast)
    assert_equal(greedy(models.fast, **given), want)
    for name, tensor in models.fast.state_dict().items():
        assert_equal(tensor, before[name])


def test_buffers_that_grow_stay_the_users():
    """Rotary frequencies that are computed anew beyond some length."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    models = pair("llama", rope_parameters=rope, max_position_embeddings=16)
    assert_equal(greedy(models.fast, **prompt()), greedy(models.plain, **prompt()))
    assert not any(t.is_inference() for t in models.fast.buffers())


def test_modes_come_back_after_an_error(llama):
    class Breaks(Streamer):
        def put(self, value):
            super().put(value)
            if len(self.got) == 4:
                raise KeyError("broken")

    with torch.enable_grad():
        with pytest.raises(KeyError, match="broken"):
            greedy(llama.fast, **prompt(), streamer=Breaks())
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert_equal(greedy(llama.fast, **prompt()), greedy(llama.plain, **prompt()))


def test_a_generate_of_its_own_stays():
    """A model whose repository brings its own `generate` has it on the instance."""
    model = build("llama")
    mine = lambda *args, **kwargs: "mine"  # noqa: E731
    model.generate = mine
    report = fastllm.optimize(model, None, quiet=True)
    assert model.generate is mine and "generate" in str(report)
    fastllm.restore(model)
    assert model.generate is mine


def test_the_report_says_why():
    models = pair("llama", kv_cache="int8")
    assert "fastllm's loop, int8 keys and values" in str(models.report)
    assert "transformers' own" not in str(models.report)
    for _ in range(2):
        greedy(models.fast, **prompt(), num_beams=2)
    assert str(models.report).count("beam search") == 1


def test_long_answers_are_not_paid_for_in_advance(llama, monkeypatch):
    """max_length may be whatever the model can do; memory is for what is said."""
    made = []

    def record(*args, **kwargs):
        made.append(empty(*args, **kwargs))
        return made[-1]

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", record)
    given, stop = prompt(), greedy(llama.plain, **prompt())[0, 15:16].tolist()
    made.clear()
    said = llama.fast.generate(**given, do_sample=False, max_length=2**20, eos_token_id=stop)
    assert said.shape[1] <= 16 and not llama.reasons
    assert made and max(t.numel() * t.element_size() for t in made) < 2**24
