"""Patterns by name, weights that have them already, and how many of a model's weights each block keeps."""

import pytest
import torch
from torch import Tensor

from fastllm.compress.patterns import BLOCKS, Blocks, Unstructured, fits, owl_kept, parse_pattern, reason
from fastllm.compress.sparse_solver import Pruning
from fastllm.compress.statistics import Statistics
from fastllm.sparse_formats import SparseFormat


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "text, want",
    [
        ("2:4", SparseFormat(16, True)),
        ("16:32", SparseFormat(16)),
        ("0.5", Unstructured(0.5)),
        (".25", Unstructured(0.25)),
        ("block32@0.3", Blocks(32, 0.3)),
        ("block128", Blocks(128)),
    ],
)
def test_names(text, want):
    found = parse_pattern(text)
    assert found == want and parse_pattern(found) is found and parse_pattern(found.name) == found


@pytest.mark.parametrize(
    "text, values, message",
    [
        ("0", None, "sparsity 0.0: the share of weights that go, between 0 and 1"),
        ("1", None, "sparsity 1.0"),
        ("1.5", None, "sparsity 1.5"),
        ("block64@1", None, "sparsity 1.0"),
        ("block16@0.5", None, "blocks of 16: there are 32, 64, 128"),
        ("4:8", None, "unknown pattern '4:8'; known: 2:4, 16:32 .* half of each row, \"block64@0.7\""),
        ("50%", None, "unknown pattern '50%'"),
        ("", None, "unknown pattern ''"),
        ("half", "int8", "unknown pattern 'half'"),
        ("0.5", "int8", "values='int8': only 2:4 and k:32 are stored with integers, not 0.5"),
        ("block64@0.5", "int4", "only 2:4 and k:32"),
        ("33:32", None, "33 of 32"),
        ("16:32", "int2", "unknown weight format 'int2'"),
        ("16:32-int8", "int4", "names the values already"),
    ],
)
def test_what_is_none(text, values, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text, values)


@pytest.mark.parametrize("given", [0.5, None, 16, ("2:4",)])
def test_what_is_no_text_is_a_share_or_refused(given):
    if given == 0.5:
        assert parse_pattern(given) == Unstructured(0.5)
    else:
        with pytest.raises((TypeError, ValueError), match="pattern"):
            parse_pattern(given)


@pytest.mark.parametrize("pattern", [SparseFormat(16), Unstructured(0.5), Blocks(32, 0.5)])
def test_values_beside_a_pattern_that_is_no_text(pattern):
    try:
        assert parse_pattern(pattern, "int8") == SparseFormat(16, False, parse_pattern("16:32-int8").values)
    except ValueError as error:
        assert "values" in str(error)


@pytest.mark.parametrize("text", ["block64@0.7.1", "block64@."])
def test_a_share_that_is_no_number_is_named(text):
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(text)


def test_why_a_weight_cannot_have_a_pattern():
    assert reason(parse_pattern("16:32"), 7, 64) == "" and reason(parse_pattern("0.5"), 7, 33) == ""
    assert reason(parse_pattern("2:4"), 64, 36) == "36 inputs are not a multiple of 32"
    assert reason(parse_pattern("block64@0.5"), 64, 128) == ""
    assert reason(parse_pattern("block64@0.5"), 96, 128) == "[96, 128] cannot be cut into blocks of 64"


@pytest.mark.parametrize("size", BLOCKS)
def test_blocks_that_stay_are_those_with_most_in_them(size):
    scores = random(3 * size, 2 * size).abs()
    order = torch.tensor([3.0, 5.0, 0.5, 4.0, 1.0, 2.0]).view(3, 2)
    scores *= order.repeat_interleave(size, 0).repeat_interleave(size, 1)
    kept = Blocks(size, 0.5).largest(scores)[::size, ::size]
    assert torch.equal(kept, order >= 3)
    assert Blocks(size, 0.5).bytes(3 * size, 2 * size) == 3 * (2 * size**2 + 4) + 4 * 4
    ties = Blocks(size, 0.5).largest(torch.ones(3 * size, 2 * size))[::size, ::size]
    assert ties.flatten().tolist() == [True] * 3 + [False] * 3
    with pytest.raises(ValueError, match="not finite"):
        Blocks(size, 0.5).largest(scores * float("nan"))


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "16:32", "3:32", "block32@0.5"])
def test_weights_that_have_their_zeros(pattern):
    w, how = random(64, 64), parse_pattern(pattern)
    own = w * how.largest(w.abs())
    mask = fits(own, how)
    assert torch.equal(own * mask, own)
    assert not (own != 0)[~fits(-own, how)].any() and fits(own * 0, how).sum() == mask.sum()
    with pytest.raises(ValueError, match=r"\d+ of 4096 weights are not zero where .* keeps none"):
        fits(w, how)
    own[tuple((~mask).nonzero()[0])] = 1e-30  # one too many, however small
    with pytest.raises(ValueError, match="1 of 4096 weights are not zero"):
        fits(own, how)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_what_goes_is_a_plain_zero(method):
    """-0.0 reads as another value to whoever compares bits, or counts what is not all zero bytes."""
    w, seen = random(32, 64), Statistics(64)
    seen.add(random(256, 64, seed=1))
    stored = Pruning(method, repair=False).solve([w], [parse_pattern("0.5")], seen)[0].stored(torch.bfloat16)
    assert not (stored.signbit() & (stored == 0)).any()


def test_blocks_without_a_share_are_those_that_are_not_zero():
    own = random(64, 64) * torch.eye(2).repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(fits(own, Blocks(32)), own != 0) and not fits(own * 0, Blocks(32)).any()
    assert fits(own + 1, Blocks(32)).all()


def shares(found, sizes):
    """The mean kept share, weighed."""
    kept = [1 - p.sparsity if isinstance(p, Unstructured) else p.kept / 32 for p in found]
    return kept, sum(k * n for k, n in zip(kept, sizes, strict=True)) / sum(sizes)


OWL = [*(f"{k}:32" for k in (1, 2, 6, 8, 16, 24, 29)), "0.3", "0.5", "0.7", "0.8", "0.95", "16:32-int8"]


@pytest.mark.parametrize("pattern", OWL)
def test_owl_keeps_as_many_in_all_and_more_where_there_are_outliers(pattern):
    generator, how = torch.Generator().manual_seed(3), parse_pattern(pattern)
    for blocks in (1, 2, 4, 7, 32):
        for even in (True, False):
            outliers = torch.rand(blocks, generator=generator).tolist()
            sizes = [64] * blocks if even else torch.randint(1, 99, (blocks,), generator=generator).tolist()
            found = owl_kept(outliers, sizes, how, 0.08)
            kept, mean = shares(found, sizes)
            uniform = how.kept / 32 if isinstance(how, SparseFormat) else 1 - how.sparsity
            assert mean <= uniform + 5e-5 and mean >= uniform - 1.01 / 32  # a share is rounded to four digits
            assert all(abs(k - uniform) <= 0.16 + 1 / 32 for k in kept)
            order = sorted(range(blocks), key=lambda i: outliers[i])
            assert all(kept[a] <= kept[b] + 1 / 32 for a, b in zip(order, order[1:], strict=False))
            assert kept[order[0]] <= kept[order[-1]] and (
                blocks == 1 or uniform < 2 / 32 or kept[order[0]] < kept[order[-1]]
            )
            assert all(getattr(p, "values", None) == getattr(how, "values", None) for p in found)


def test_owl_of_equals_is_uniform():
    for pattern in ("16:32", "0.5"):
        how = parse_pattern(pattern)
        assert owl_kept([0.3, 0.3, 0.3], [5, 1, 2], how, 0.08) == [how] * 3
    for pattern in ("2:4", "block64@0.5"):
        with pytest.raises(ValueError, match="keeps as much everywhere"):
            owl_kept([0.0, 1.0], [1, 1], parse_pattern(pattern), 0.08)


def test_layers_with_one_input_are_solved_each_by_itself():
    w, seen = random(32, 64), Statistics(64)
    seen.add(random(256, 64, seed=1) @ random(64, 64, seed=2))
    patterns = [parse_pattern("2:4"), parse_pattern("16:32")]
    together = Pruning().solve([w, w * 2], patterns, seen)
    for found, one, pattern in zip(together, (w, w * 2), patterns, strict=True):
        assert torch.equal(found.dense, Pruning().solve([one], [pattern], seen)[0].dense)
    assert torch.equal(w, random(32, 64))
