"""The arithmetic of `fastllm.prune`: scores and least squares as their definitions say, whatever the data."""

import pytest
import torch
from pruning_cases import build, data
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastllm.compress import prune_repair
from fastllm.compress.blocks import Blocks
from fastllm.compress.prune_edits import Edits, channels, cut, matrix, put_matrix, sizes
from fastllm.compress.prune_parts import Producer, find_attention, find_feed_forward
from fastllm.compress.prune_repair import Inputs, observe, repair, scores, shortage, strongest
from fastllm.compress.samples import Batch, batches

N, K, ROWS = 24, 40, 400
KEPT = torch.arange(0, K, 2)


def problem(rows: int = ROWS, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """(w [N, K], x [rows, K]), inputs that depend on each other."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(K) + torch.randn(K, K, generator=generator) / K**0.5
    return torch.randn(N, K, generator=generator), torch.randn(rows, K, generator=generator) @ mix + mean


def seen(x: Tensor, mean: bool = False) -> Inputs:
    return Inputs(x.t() @ x / len(x), x.mean(0) if mean else None, len(x))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).square().sum() / want.double().square().sum())


def test_without_damping_it_is_the_least_squares_answer(monkeypatch) -> None:
    monkeypatch.setattr(prune_repair, "DAMPING", 1e-7)
    w, x = problem()
    found = repair(w, None, seen(x), KEPT)
    want = torch.linalg.lstsq(x[:, KEPT].double(), x.double() @ w.t().double()).solution.t()
    torch.testing.assert_close(found.weight.double(), want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert found.error == pytest.approx(relative(x[:, KEPT] @ found.weight.t(), x @ w.t()), rel=1e-3)
    assert found.without == pytest.approx(relative(x[:, KEPT] @ w[:, KEPT].t(), x @ w.t()), rel=1e-3)
    assert found.error < 0.9 * found.without


def test_a_bias_takes_in_the_mean_of_what_is_lost(monkeypatch) -> None:
    monkeypatch.setattr(prune_repair, "DAMPING", 1e-7)
    w, x = problem(mean=2.0)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1))
    found = repair(w, bias, seen(x, mean=True), KEPT)
    ones = torch.cat((x[:, KEPT], torch.ones(ROWS, 1)), 1).double()
    want = torch.linalg.lstsq(ones, (x @ w.t() + bias).double()).solution.t()
    got = torch.cat((found.weight, found.bias[:, None]), 1).double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3 * float(want.abs().max()))
    plain = repair(w, None, seen(x), KEPT)
    assert found.error < plain.error < plain.without
    assert found.error == pytest.approx(
        relative(x[:, KEPT] @ found.weight.t() + found.bias - bias, x @ w.t()), rel=2e-2
    )


@pytest.mark.parametrize("rows", [1, 3, 19, 400])
@pytest.mark.parametrize("broken", ["", "equal", "dead", "all dead"])
def test_it_never_raises_and_never_harms(rows: int, broken: str) -> None:
    """However few rows there are, and however they depend on each other."""
    w, x = problem(rows)
    if broken == "equal":
        x[:] = x[0]
    if broken:
        x[:, KEPT[:5] if broken == "dead" else KEPT if broken == "all dead" else []] = 0
    for mean in (False, True):
        found = repair(w, torch.zeros(N) if mean else None, seen(x, mean), KEPT)
        assert bool(found.weight.isfinite().all()) and found.weight.shape == (N, len(KEPT))
        assert found.error <= found.without * (1 + 1e-4) + 1e-5
    if broken == "all dead":
        assert torch.equal(repair(w, None, seen(x), KEPT).weight, w[:, KEPT])


def test_what_is_not_wanted_or_not_needed_stays() -> None:
    w, x = problem()
    found = repair(w, None, seen(x), KEPT, wanted=False)
    assert torch.equal(found.weight, w[:, KEPT]) and found.error == found.without > 0
    x[:, 1::2] = 0
    found = repair(w, None, seen(x), KEPT)
    torch.testing.assert_close(found.weight, w[:, KEPT])
    assert found.error == pytest.approx(0, abs=1e-6) and found.without == 0
    assert repair(w * 0, None, seen(x), KEPT).error == 0


def test_few_rows_repair_less() -> None:
    w, x = problem(len(KEPT) - 1)
    few, many = (repair(w, None, seen(x)._replace(rows=rows), KEPT).weight for rows in (len(KEPT) - 1, len(KEPT)))
    plain = w[:, KEPT]
    assert 0 < float((few - plain).norm()) < 0.7 * float((many - plain).norm())
    assert shortage([20, 19], 20).startswith("19 tokens of calibration data for 20 channels") and not shortage(
        [20], 20
    )


@pytest.mark.parametrize("units", [K, 8, 4, 1])
def test_a_score_is_the_size_of_what_a_unit_adds(units: int) -> None:
    w, x = problem()
    width = K // units
    parts = [x[:, u * width :][:, :width] @ w[:, u * width :][:, :width].t() for u in range(units)]
    want = torch.stack([part.square().sum(1).mean().sqrt() for part in parts])
    torch.testing.assert_close(scores(w, seen(x).products, units), want, rtol=1e-4, atol=0)


def test_of_equal_scores_the_first_stay() -> None:
    assert strongest(torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0]), 3) == [0, 1, 4]
    assert strongest(torch.zeros(4), 2) == [0, 1]


def test_channels_of_units() -> None:
    assert channels([0, 2], 3, 6).tolist() == [0, 1, 4, 5] and channels([1], 4, 4).tolist() == [1]
    assert channels([0, 2], 3, 6, parts=2).tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_is_cut_by_rows_and_columns(kind: type) -> None:
    layer = nn.Linear(6, 4) if kind is nn.Linear else Conv1D(4, 6)
    nn.init.normal_(layer.bias)
    weight, bias, x = matrix(layer), layer.bias, torch.randn(3, 6)
    whole, edits = layer(x), Edits()
    assert sizes(layer) == (4, 6) and weight.shape == (4, 6)
    rows, columns = torch.tensor([0, 3]), torch.tensor([1, 2, 5])
    cut(edits, layer, "out", rows)
    torch.testing.assert_close(layer(x), whole[:, rows])
    cut(edits, layer, "in", columns)
    torch.testing.assert_close(layer(x[:, columns]), x[:, columns] @ weight[rows][:, columns].t() + bias[rows])
    assert sizes(layer) == (2, 3) and (layer.nf if kind is Conv1D else layer.out_features) == 2
    put_matrix(edits, layer, torch.ones(2, 3), torch.zeros(2))
    assert torch.equal(layer(torch.ones(1, 3)), torch.full((1, 2), 3.0)) and layer.weight.is_contiguous()
    edits.undo()
    assert torch.equal(layer(x), whole) and layer.bias is bias


@pytest.mark.parametrize("biased", [True, False])
def test_what_a_layer_is_given_is_without_padding(biased: bool) -> None:
    """And each row counts as much as its answer is small, to a tenth of the median."""
    ids = data(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    model = build("llama")
    both = [Batch(ids[:1], None), Batch(ids[1:], mask[1:])]
    layer = model.model.layers[0].mlp.down_proj
    w, bias = layer.weight.detach().float(), torch.ones(len(layer.weight)) if biased else None
    found = observe(Blocks(model, both), 0, "mlp.down_proj", w, bias)
    rows: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda module, args: rows.append(args[0][0])), torch.no_grad():
        model(ids[:1])
        model(ids[1:], attention_mask=mask[1:].long())
    x = torch.cat((rows[0], rows[1][5:])).double()
    assert found.rows == 19
    size = torch.nn.functional.linear(x, w.double(), None if bias is None else bias.double()).norm(dim=1)
    least = torch.cat([part.median().expand(len(part)) for part in size.split([12, 7])]) * 0.1
    share = 1 / torch.maximum(size, least).square()
    torch.testing.assert_close(found.products.double(), (x.t() * share) @ x / 19, rtol=1e-3, atol=1e-6)
    if biased:
        assert found.mean is not None
        torch.testing.assert_close(found.mean.double(), share @ x / share.sum(), rtol=1e-3, atol=1e-6)
        assert found.weight == pytest.approx(float(share.mean()), rel=1e-3)
    else:
        assert found.mean is None and found.weight == 1


FOUND = {
    "llama": ("mlp.down_proj", {"mlp.gate_proj", "mlp.up_proj"}, 256),
    "gpt2": ("mlp.c_proj", {"mlp.c_fc"}, 512),
    "bert": ("output.dense", {"intermediate.dense"}, 256),
    "phi3": ("mlp.down_proj", {"mlp.gate_up_proj"}, 256),
    "phi": ("mlp.fc2", {"mlp.fc1"}, 256),
}


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_feed_forward_parts_are_found(family: str, dtype: torch.dtype) -> None:
    blocks = Blocks(build(family, dtype), batches(data(1, 16), None, 512))
    part = next(find_feed_forward(blocks, 0))
    assert (part.consumer, {p.name for p in part.producers}, part.units) == FOUND[family]
    assert {p.parts for p in part.producers} == {2 if family == "phi3" else 1} and not part.vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family, units", [("llama", 2), ("qwen3", 2), ("gemma3", 2), ("phi", 2), ("gpt-oss", 2)])
def test_attention_is_found(family: str, units: int, dtype: torch.dtype) -> None:
    blocks = Blocks(build(family, dtype), batches(data(1, 16), None, 512))
    (part,) = find_attention(blocks, 0, units, 4)
    own = {Producer(f"self_attn.{name}_proj", 1) for name in "qkv"}
    assert part.consumer in ("self_attn.o_proj", "self_attn.dense") and set(part.producers) == own
    assert part.vectors == (("self_attn.sinks",) if family == "gpt-oss" else ())


@pytest.mark.parametrize("family", ["gpt2", "phi3", "olmo2"])
def test_what_is_no_attention_by_heads_is_not_found(family: str) -> None:
    blocks = Blocks(build(family), batches(data(1, 16), None, 512))
    parts = list(find_attention(blocks, 0, 2, 4))
    assert not [part for part in parts if len(part.producers) == 3]
