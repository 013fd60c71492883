"""SmoothQuant: scales found by trying, on a sample of the inputs, and what they save."""

import pytest
import torch
from torch.nn.functional import linear
from trained import observed, outliers

from fastllm.compress.fold import Fold
from fastllm.compress.smooth import _expected, _shares, output_loss, search
from fastllm.compress.solvers import SmoothQuant
from fastllm.compress.statistics import Statistics
from fastllm.formats import parse_format
from fastllm.nn import QuantLinear
from fastllm.quantizers import quantize

FORMAT = parse_format("int8-a8")


def statistics(x, sample=512) -> Statistics:
    seen = Statistics(x.shape[1], products=False, sample=sample)
    seen.add(x)
    return seen


def lost(w, x, scale) -> float:
    """Of a layer's output by rounding both sides, each row relative to itself."""
    layer = QuantLinear(quantize(w * scale, FORMAT, "rtn"), tuple(w.shape), FORMAT)
    want = linear(x.double(), w.double())
    return float(((layer(x / scale) - want).square().sum(1) / want.square().sum(1)).mean())


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_it_takes_outliers_out_of_the_inputs(alpha):
    w, x = outliers()
    scale = SmoothQuant(alpha).scale([w], [FORMAT], statistics(x[:3072]))
    assert lost(w, x[3072:], scale) <= 0.3 * lost(w, x[3072:], torch.ones(256))


def test_what_is_found_beats_the_formula():
    w, x = outliers()
    seen = statistics(x[:3072])
    scale = SmoothQuant().scale([w], [FORMAT], seen)
    fixed = [SmoothQuant(alpha).scale([w], [FORMAT], seen) for alpha in (0.3, 0.5, 0.65, 0.85)]
    assert lost(w, x[3072:], scale) <= 0.95 * min(lost(w, x[3072:], one) for one in fixed)


def uneven(seed):
    """(w [96, 160], x [300, 160]) with columns of very different sizes, in both, and an input that is always 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(2, 160, generator=generator).mul(seed % 3).exp()
    w = torch.randn(96, 160, generator=generator) * sizes[0]
    x = torch.randn(300, 160, generator=generator) * sizes[1]
    x[:, seed] = 0
    return w, x


@pytest.mark.parametrize("seed", range(4))
def test_it_never_loses_to_no_scale_on_its_own_rows(seed):
    w, x = uneven(seed)
    scale = search([w, w[:32].flip(1)], x)
    want = [linear(x, w), linear(x, w[:32].flip(1))]
    weights = [w, w[:32].flip(1)]
    assert output_loss(x, weights, want, scale) <= 1.0001 * output_loss(x, weights, want, torch.ones(160))
    assert bool((scale > 0).all()) and abs(float(scale.log().mean())) < 1e-3 and not scale.requires_grad


def test_where_there_is_nothing_to_gain_nothing_is_lost():
    generator = torch.Generator().manual_seed(3)
    w, x = torch.randn(96, 128, generator=generator), torch.randn(1024, 128, generator=generator)
    scale = search([w], x[:512])
    assert lost(w, x[512:], scale) <= 1.02 * lost(w, x[512:], torch.ones(128))


def test_layers_of_a_trained_model_lose_less():
    for (w, seen), _ in zip(list(observed().values())[::5], range(6), strict=False):
        # rows like those that were seen: of the same second moments
        root = torch.linalg.cholesky(seen.hessian + 1e-4 * seen.hessian.diagonal().mean() * torch.eye(len(seen.total)))
        x = torch.randn(1024, len(root), generator=torch.Generator().manual_seed(0)) @ root.t()
        scale = search([w], x[:512])
        assert lost(w, x[512:], scale) < lost(w, x[512:], torch.ones(len(root)))


def test_huge_first_tokens_do_not_spoil_the_scale():
    """One row in 128 is a thousand times as large in two channels that are like all others in the rest."""
    w, x = outliers()
    huge = x.clone()
    huge[::128, 7] = 1000.0 * x.abs().median()
    huge[::128, 90] = -2000.0 * x.abs().median()
    rest = torch.arange(len(x)) % 128 != 0
    held = x[rest][-1024:]
    clean, spoilt = (SmoothQuant().scale([w], [FORMAT], statistics(rows[:3072])) for rows in (x, huge))
    assert lost(w, held, spoilt) <= 1.1 * lost(w, held, clean)
    formula = [SmoothQuant(0.85).scale([w], [FORMAT], statistics(rows[:3072])) for rows in (x, huge)]
    assert spoilt[90] / clean[90] < 0.2 * formula[1][90] / formula[0][90]  # which the largest value makes
    assert lost(w, huge[::128], spoilt) <= 1.1 * lost(w, huge[::128], torch.ones(256))


def test_channels_that_share_a_scale_get_one():
    w, x = outliers()
    fold = Fold(torch.nn.Linear(8, 64), [torch.nn.Linear(256, 8)], True, repeats=4, head=16)
    for alpha in (None, 0.5):
        scale = SmoothQuant(alpha).scale([w], [FORMAT], statistics(x), fold.share)
        heads = scale.view(4, 4, 16)
        assert torch.equal(heads, heads[:, :1].expand_as(heads)) and heads[:, 0].unique().numel() > 32
        assert lost(w, x[:512], scale) < 0.7 * lost(w, x[:512], torch.ones(256))


def test_inference_mode_is_no_obstacle():
    w, x = outliers(512)
    want = search([w], x)
    with torch.inference_mode():
        assert torch.equal(search([w.clone()], x.clone()), want)


def test_the_model_of_the_loss_is_close_to_the_loss():
    """As far as roundings are independent of each other; the descent stands on it."""
    w, x = uneven(1)
    want = [linear(x, w)]
    for scale in (torch.ones(160), x.square().mean(0).sqrt().clamp(min=0.01) ** 0.5):
        modelled = float(_expected(x.abs(), [w], [w.square().sum(0)], _shares(want), scale))
        assert 0.75 < modelled / output_loss(x, [w], want, scale) < 1.3


def test_rows_are_kept_evenly_and_alike_in_every_run():
    """Rows tell their number; calls of many lengths, more than one chunk among them."""
    lengths = [512] * 40 + [5000, 1, 0, 7, 300] + [512] * 20
    x = torch.arange(sum(lengths)).float()[:, None].expand(-1, 2)
    first, again = (Statistics(2, products=False, sample=1024) for _ in range(2))
    for part in x.split(lengths):
        first.add(part)
        again.add(part.to(torch.float64))
    kept = first.sample[:, 0].long()
    assert torch.equal(first.sample, again.sample) and len(kept) == 1024 and len(kept.unique()) == 1024
    assert torch.equal(kept, kept.sort().values)
    counts = torch.bincount(kept * 8 // len(x), minlength=8)
    assert counts.min() >= 85 and counts.max() <= 175  # 128 expected, with a deviation of 11
    starts = (kept[kept < 40 * 512] % 512 == 0).sum()
    assert starts <= 6  # the first tokens of samples: 1.2 expected
    few = statistics(x[:9])
    assert torch.equal(few.sample, x[:9])
    few.divide(torch.tensor([2.0, 1.0]))
    assert torch.equal(few.sample[:, 0], x[:9, 0] / 2)
    assert len(Statistics(2).sample) == 0
