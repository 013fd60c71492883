"""Decoding by torch.compile on a CPU, and ops where it looks on: definitions, of which it makes code of its own."""

import pytest
import tiny
import torch
from close import BOUNDS, assert_close

import fastllm
from fastllm.decode.generate import NO_GRAPH
from fastllm.ops.append_kv import append_kv
from fastllm.ops.decode_attention import decode_attention, definition
from fastllm.ops.gated_activation import gated_activation
from fastllm.ops.norm import norm_add, norm_add_norm, rms_norm
from fastllm.ops.rotary import rotary

NO_END = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


def traced(call):
    """The result of `call` under torch.compile, and the names of fastllm's ops in the graph."""
    names = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if "fastllm" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend=backend)(), names


def cases():
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, generator=generator)

    x, r, w, v = new(2, 3, 64), new(2, 3, 64), new(64), new(64)
    q, k, cos, sin = new(2, 4, 1, 32), new(2, 2, 1, 32), new(1, 1, 32), new(1, 1, 32)
    keys, values = new(2, 2, 40, 32), new(2, 2, 40, 32)
    start, end = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([9, 30], dtype=torch.int32)
    slots, weight = torch.tensor([7]), new(32)

    def append(format=None):
        kept = [torch.zeros(2, 2, 40, 32) for _ in range(2)]
        scales = {}
        if format:
            kept = [torch.zeros(2, 2, 40, 32, dtype=torch.int8) for _ in range(2)]
            scales = {"k_scale": torch.zeros(2, 2, 40), "v_scale": torch.zeros(2, 2, 40), "format": format}
        y = append_kv(q, k, k * 2, cos, sin, *kept, slots, q_weight=weight, k_weight=weight, **scales)
        return (y, *kept, *(t for t in scales.values() if isinstance(t, torch.Tensor)))

    return {
        "rms_norm": lambda: rms_norm(x, w, 1e-6),
        "rms_norm, residual": lambda: rms_norm(x, w, 1e-6, residual=r, cast_first=True),
        "norm_add_norm": lambda: norm_add_norm(x, r, w, v, 1e-6, 1e-5),
        "norm_add": lambda: norm_add(x, r, w, 1e-6),
        "gated": lambda: gated_activation(x, "gelu_tanh"),
        "rotary": lambda: rotary(q, k, cos, sin),
        "rotary, neighbours": lambda: rotary(q, k, cos, sin, interleaved=True),
        "append": append,
        "append, int8": lambda: append("int8"),
        "decode": lambda: decode_attention(q, keys, values, end, kv_start=start),
        "decode, window": lambda: decode_attention(q, keys, values, end, window=5, scale=0.3),
        "decode, three": lambda: decode_attention(q.expand(-1, -1, 3, -1), keys, values, end, kv_start=start),
    }


@pytest.mark.parametrize("name", cases())
def test_a_traced_op_is_its_definition(name):
    call = cases()[name]
    got, names = traced(call)
    assert not names  # nothing that the compiler cannot look into
    want = call()
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, want)), strict=True):
        if a.is_floating_point():
            assert_close(a, b.double(), dtype=torch.float32)
        else:
            assert (a.int() - b.int()).abs().max() <= 1


def test_what_it_cannot_look_into_stays_an_op():
    q, keys = torch.randn(1, 2, 1, 32), torch.randn(1, 1, 20, 32)
    end, sinks = torch.tensor([11], dtype=torch.int32), torch.randn(2)
    got, names = traced(lambda: decode_attention(q, keys, keys, end, sinks=sinks))
    assert names and "decode_attention" in names[0]
    want = definition(q.double(), keys.double(), keys.double(), end, sinks=sinks.double(), dtype=torch.float64)
    assert_close(got, want, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings", "optimized"),
    [
        ("llama", {}, {}),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}, {}),
        ("qwen3", {}, {"kv_cache": "int8"}),
    ],
)
def test_compiled_decoding_gives_the_tokens_of_the_loop(family, settings, optimized):
    model = tiny.build(family, dtype=torch.float32, eos_token_id=None, **settings)
    ids = torch.randint(1, 60, (3, 13), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    plain = model.generate(ids * mask, attention_mask=mask, max_new_tokens=30, **NO_END)
    report = fastllm.optimize(model, **{"weights": None, **optimized}, decode="compile", quiet=True)
    loop = report.speedups.loop
    assert "by torch.compile" in str(report)
    got = model.generate(ids * mask, attention_mask=mask, max_new_tokens=30, **NO_END)
    assert not loop.reasons and len(loop.graphs.kept) == 1
    again = model.generate(ids * mask, attention_mask=mask, max_new_tokens=30, repetition_penalty=1.5, **NO_END)
    assert len(loop.graphs.kept) == 1 and not torch.equal(again, got)  # the choice of tokens is outside
    # another size is another piece of code, and the first is still found
    one = model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=30, **NO_END)
    assert len(loop.graphs.kept) == 2 and torch.equal(one, got[:1])
    assert torch.equal(model.generate(ids * mask, attention_mask=mask, max_new_tokens=30, **NO_END), got)
    loop.compiled = False
    want = model.generate(ids * mask, attention_mask=mask, max_new_tokens=30, **NO_END)
    assert torch.equal(got, want)
    if not optimized:
        assert torch.equal(got, plain)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int4-g32", "int8"])
def test_compiled_packed_layers_give_the_logits_of_the_loop(weights):
    """Products in bfloat16: tokens may differ, logits only by as much as it rounds."""
    model = tiny.build("llama", dtype=torch.float32, eos_token_id=None)
    loop = fastllm.optimize(model, weights, decode="compile", quiet=True).speedups.loop
    ids = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **NO_END)
    steps = next(iter(loop.graphs.kept.values()))
    with torch.no_grad():
        steps.state.grow()
        assert_close(steps.graph.logits(), steps.logits().double(), *BOUNDS[torch.bfloat16], dtype=torch.float32)


def test_one_token_compiles_nothing():
    model = tiny.build("llama", dtype=torch.float32)
    loop = fastllm.optimize(model, None, decode="compile", quiet=True).speedups.loop
    ids = torch.arange(1, 9)[None]
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, **NO_END)
    assert not loop.graphs.kept and NO_GRAPH not in loop.reasons


def test_an_unknown_way_to_decode_is_refused():
    with pytest.raises(ValueError, match="decode='fast': known are True, False and \"compile\""):
        fastllm.optimize(tiny.build("llama"), None, decode="fast", quiet=True)
