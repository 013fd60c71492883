"""Decoding by replaying a step: the loop, the static cache, what a graph can hold. `replay` stands in for a GPU."""

import copy

import pytest
import replay
import tiny
import torch
from torch import Tensor
from transformers import StoppingCriteria

import fastllm
from fastllm.decode import generate as generate_module
from fastllm.decode.graph import KEPT, Graphs, run_graph
from fastllm.decode.sampling import Sampler

LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": LAYERS,
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 32, **LAYERS},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, **LAYERS},
    "gpt2": {},
    "mixtral": {"num_experts_per_tok": 2},
}
NO_END = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


def build(family: str, **settings):
    return tiny.build(family, dtype=torch.float32, **{"eos_token_id": None, **FAMILIES.get(family, {}), **settings})


def prompts() -> tuple[Tensor, Tensor]:
    """Four rows with 0, 5, 1 and 12 tokens of padding: ids and mask [4, 13]."""
    ids = torch.randint(1, 60, (4, 13), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 1, 12)):
        mask[row, :padding] = 0
    return ids * mask, mask


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Let `generate` take the way that it takes on a GPU."""

    def use(model):
        loop = model._fastllm.speedups.loop
        monkeypatch.setattr(loop, "replays", lambda ids: True)
        loop.graphs.capture = replay.capture
        return loop

    return use


@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_give_the_loop_s_tokens(family, kv_cache, as_on_gpu):
    model = build(family)
    ids, mask = prompts()
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=30, **NO_END)
    report = fastllm.optimize(model, None, kv_cache=kv_cache, quiet=True)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=30, **NO_END)
    if kv_cache is None:
        assert torch.equal(want, plain)
    loop = as_on_gpu(model)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=30, **NO_END)
    assert torch.equal(got, want) and len(loop.graphs.kept) == 1 and not report.speedups.loop.reasons
    steps = next(iter(loop.graphs.kept.values()))
    assert isinstance(steps.graph, replay.Recorder) and len(steps.graph.calls) > 20
    # the same graph again, with another prompt, of another length
    short, other = ids[:, 4:].flip(0), mask[:, 4:].flip(0)
    assert torch.equal(
        model.generate(short, attention_mask=other, max_new_tokens=40, **NO_END),
        copy_of(model).generate(short, attention_mask=other, max_new_tokens=40, **NO_END),
    )
    assert len(loop.graphs.kept) == 1 and next(iter(loop.graphs.kept.values())) is steps


def copy_of(model):
    """A copy, which decodes without a graph."""
    return copy.deepcopy(model)


def test_slots_that_were_never_filled_do_not_leak(as_on_gpu, monkeypatch):
    model = build("gemma3_text")
    ids, mask = prompts()
    fastllm.optimize(model, None, quiet=True)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=20, **NO_END)
    loop = as_on_gpu(model)
    allocate = fastllm.decode.static.StaticKVLayer._allocate

    def poisoned(layer, *args):
        allocate(layer, *args)
        for t in layer._stored():
            t.fill_(float("nan") if t.is_floating_point() else 99)

    monkeypatch.setattr(fastllm.decode.static.StaticKVLayer, "_allocate", poisoned)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=20, **NO_END), want)
    assert len(loop.graphs.kept) == 1


def test_rows_end_when_they_do(as_on_gpu):
    model = build("llama")
    ids, mask = prompts()
    free = model.generate(ids, attention_mask=mask, max_new_tokens=40, **NO_END)[:, 13:]
    # an end token for each of two rows, early and late, and none for the others
    ends = {"eos_token_id": [int(free[0, 3]), int(free[2, 20])], "pad_token_id": 0, "do_sample": False}
    for new in (1, 2, 9, 40):
        settings = {"attention_mask": mask, "max_new_tokens": new, **ends}
        want = copy_of(model).generate(ids, **settings)
        patched = copy_of(model)
        fastllm.optimize(patched, None, quiet=True)
        as_on_gpu(patched)
        assert torch.equal(patched.generate(ids, **settings), want), new
    one = copy_of(model).generate(ids[:1], max_new_tokens=40, attention_mask=mask[:1], **ends)
    patched = copy_of(model)
    fastllm.optimize(patched, None, quiet=True)
    as_on_gpu(patched)
    got = patched.generate(ids[:1], max_new_tokens=40, attention_mask=mask[:1], **ends)
    assert torch.equal(got, one) and got.shape[1] < 53  # a block was begun beyond its end, and is not shown


def test_processors_criteria_and_streamers(as_on_gpu):
    class Later(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 22)

    class Keep:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value)

        def end(self):
            self.seen.append("end")

    model = build("qwen3")
    ids, mask = prompts()
    patched = copy_of(model)
    fastllm.optimize(patched, None, quiet=True)
    loop = as_on_gpu(patched)
    for settings in ({"repetition_penalty": 1.7}, {"stopping_criteria": [Later()]}, {"no_repeat_ngram_size": 2}):
        given = {"attention_mask": mask, "max_new_tokens": 25, **NO_END, **settings}
        assert torch.equal(patched.generate(ids, **given), model.generate(ids, **given)), settings
    keep, kept = Keep(), Keep()
    given = {"attention_mask": mask[:1], "max_new_tokens": 6, **NO_END}
    patched.generate(ids[:1], streamer=keep, **given)
    model.generate(ids[:1], streamer=kept, **given)
    assert len(keep.seen) == len(kept.seen) == 8 and keep.seen[-1] == kept.seen[-1] == "end"
    assert all(torch.equal(a, b) for a, b in zip(keep.seen[:-1], kept.seen[:-1], strict=True))
    assert loop.reasons == ["processors that a graph cannot hold"]  # the loop runs without, step by step


def test_a_capture_near_the_last_slot(as_on_gpu):
    model = build("gpt2", n_positions=257)
    ids = torch.randint(1, 60, (2, 254), generator=torch.Generator().manual_seed(1))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, **NO_END}
    want = model.generate(ids, **settings)
    fastllm.optimize(model, None, quiet=True)
    loop = as_on_gpu(model)
    assert torch.equal(model.generate(ids, **settings), want) and not loop.reasons


def test_inference_mode_and_changed_weights(as_on_gpu):
    model = build("gemma3_text")
    ids, mask = prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 12, **NO_END}
    fastllm.optimize(model, None, quiet=True)
    loop = as_on_gpu(model)
    with torch.inference_mode():
        first = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings), first) and len(loop.graphs.kept) == 1
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.add_(3.0).mul_(-1.5)
    changed = model.generate(ids, **settings)
    assert torch.equal(changed, copy_of(model).generate(ids, **settings)) and not torch.equal(changed, first)


def test_sampling_in_a_graph_draws_anew(as_on_gpu):
    model = build("llama")
    fastllm.optimize(model, None, quiet=True)
    loop = as_on_gpu(model)
    ids, mask = prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    found = [model.generate(ids, do_sample=True, temperature=2.0, top_k=40, top_p=0.95, **settings) for _ in range(2)]
    assert not torch.equal(*found) and len(loop.graphs.kept) == 1
    sure = model.generate(ids, do_sample=True, temperature=1e-4, top_k=None, top_p=None, **settings)
    assert torch.equal(sure, model.generate(ids, do_sample=False, **settings))


def test_a_step_that_looks_at_a_value_is_launched_step_by_step(as_on_gpu, caplog):
    model = build("llama")
    ids, mask = prompts()
    want = model.generate(ids, attention_mask=mask, max_new_tokens=9, **NO_END)
    fastllm.optimize(model, None, quiet=True)
    loop = as_on_gpu(model)
    model.model.norm.register_forward_hook(lambda module, args, out: out * float(out.sum().item() < float("inf")))
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=9, **NO_END), want)
    assert loop.reasons == [generate_module.NO_GRAPH] and "waits for the device" in caplog.text
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=9, **NO_END), want)
    assert caplog.text.count("waits for the device") == 1  # it is not tried again


def test_graphs_are_kept_and_dropped(as_on_gpu):
    model = build("llama")
    fastllm.optimize(model, None, quiet=True)
    loop = as_on_gpu(model)
    ids = prompts()[0] + 1
    for rows in range(1, KEPT + 1):
        model.generate(ids[:rows], max_new_tokens=4, attention_mask=torch.ones_like(ids[:rows]), **NO_END)
    kept = list(loop.graphs.kept.values())
    assert len(kept) == KEPT
    model.generate(ids[:1], max_new_tokens=400, attention_mask=torch.ones_like(ids[:1]), **NO_END)  # more slots
    assert len(loop.graphs.kept) == KEPT and kept[0] not in loop.graphs.kept.values()
    model.model.layers[0].mlp.down_proj.weight.data = model.model.layers[0].mlp.down_proj.weight.data.clone()
    model.generate(ids[:1], max_new_tokens=4, attention_mask=torch.ones_like(ids[:1]), **NO_END)
    assert len(loop.graphs.kept) == 1  # the others would read the old weights


def test_graphs_are_dropped_by_the_size_of_their_caches(as_on_gpu, monkeypatch):
    model = build("llama")
    fastllm.optimize(model, None, quiet=True)
    loop = as_on_gpu(model)
    ids = prompts()[0] + 1
    ask = {"max_new_tokens": 4, **NO_END}
    model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **ask)
    (first,) = loop.graphs.kept.values()
    monkeypatch.setattr("fastllm.decode.graph.KEPT_BYTES", 3 * first.cache.nbytes)
    model.generate(ids[:2], attention_mask=torch.ones_like(ids[:2]), **ask)
    assert len(loop.graphs.kept) == 2 and first in loop.graphs.kept.values()
    model.generate(ids[:4], attention_mask=torch.ones_like(ids[:4]), **ask)  # alone is more, and stays
    (last,) = loop.graphs.kept.values()
    assert len(last.state.ids) == 4


def test_a_graph_in_use_serves_no_other_call(as_on_gpu):
    model = build("llama")
    ids, mask = prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 6, **NO_END}
    fastllm.optimize(model, None, quiet=True)
    loop = as_on_gpu(model)
    want = model.generate(ids, **settings)
    inner = []

    class Nested(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            inner.append(model.generate(ids, **settings))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    assert torch.equal(model.generate(ids, stopping_criteria=[Nested()], **settings), want)
    assert len(inner) == 6 and all(torch.equal(tokens, want) for tokens in inner)
    assert not loop.graphs.busy.locked() and not loop.reasons


def test_a_watch_tells_a_block_late():
    model = build("llama")
    fastllm.optimize(model, None, quiet=True)
    ids, mask = prompts()
    graphs = Graphs(model, None, replay.capture)
    starts = (mask == 0).sum(1, dtype=torch.int32)
    never = torch.tensor([63 + 1])  # no token of the vocabulary
    with torch.no_grad():
        steps = graphs.steps(ids, 60, starts, never, torch.tensor(0), Sampler([], False), {})
        steps.prefill(13)
        steps.capture(graphs.capture)
        steps.state.begin(ids, starts)
        count = [0]
        steps.graph.replay, again = lambda: (count.__setitem__(0, count[0] + 1), again())[1], steps.graph.replay
        assert run_graph(steps, 13, 60, [], None).shape == (4, 60) and count[0] == 46


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cuda_graph_gives_the_tokens_of_the_loop(family, kv_cache):
    model = build(family).to("cuda")
    ids, mask = (t.to("cuda") for t in prompts())
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=30, **NO_END)
    fastllm.optimize(model, None, kv_cache=kv_cache, quiet=True)
    loop = model._fastllm.speedups.loop
    got = model.generate(ids, attention_mask=mask, max_new_tokens=30, **NO_END)
    assert len(loop.graphs.kept) == 1 and not loop.reasons
    loop.replays = lambda ids: False
    assert torch.equal(got, model.generate(ids, attention_mask=mask, max_new_tokens=30, **NO_END))
    if kv_cache is None:
        assert torch.equal(got, plain)
