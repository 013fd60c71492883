"""The next token: the probabilities are those of transformers' processors, and tokens are drawn with them."""

import pytest
import tiny
import torch
from close import assert_close, assert_equal
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import logits_process as hf

from fastllm.decode import sampling
from fastllm.decode.sampling import Sampler, argmax, draw

IDS = torch.tensor([[3, 5, 3, 9]])


class Halve(LogitsProcessor):
    """A user's own, which must see every word: it counts them."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert scores.shape[1] > 100
        return scores / 2


TOP_K = hf.TopKLogitsWarper(20)
CASES = {
    "nothing": [],
    "temperature": [hf.TemperatureLogitsWarper(0.7)],
    "top-k": [TOP_K],
    "top-k of one": [hf.TopKLogitsWarper(1)],
    "top-k, two at least": [hf.TopKLogitsWarper(1, min_tokens_to_keep=2)],
    "top-k of more than there are": [hf.TopKLogitsWarper(10**6), hf.TemperatureLogitsWarper(0.7)],
    "top-p": [hf.TopPLogitsWarper(0.8)],
    "temperature, top-k, top-p": [hf.TemperatureLogitsWarper(1.7), TOP_K, hf.TopPLogitsWarper(0.8)],
    "top-k, min-p": [TOP_K, hf.MinPLogitsWarper(0.2)],
    "top-k, typical": [TOP_K, hf.TypicalLogitsWarper(0.6)],
    "top-k, epsilon": [TOP_K, hf.EpsilonLogitsWarper(0.03)],
    "top-k, eta": [TOP_K, hf.EtaLogitsWarper(0.1)],
    "top-k, top-p, min-p, typical": [
        TOP_K,
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.05),
        hf.TypicalLogitsWarper(0.9),
    ],
    "top-k twice": [TOP_K, hf.TopKLogitsWarper(5)],
    "top-k, the user's": [TOP_K, Halve()],
    "top-k, temperature last": [TOP_K, hf.TemperatureLogitsWarper(0.5)],
    "penalty, top-k": [hf.RepetitionPenaltyLogitsProcessor(5.0), TOP_K],
    "top-k, penalty": [TOP_K, hf.RepetitionPenaltyLogitsProcessor(5.0)],
    "top-k, suppressed": [TOP_K, hf.SuppressTokensLogitsProcessor([3, 5, 9])],
    "top-k, no repetition": [TOP_K, hf.NoRepeatNGramLogitsProcessor(1)],
}


def distribution(sampler: Sampler, logits: Tensor, monkeypatch) -> Tensor:
    """The probability of each token for a row of logits [V]: `draw` is made to give one candidate after the other."""
    p, seen = torch.zeros(len(logits)), []

    def nth(scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return torch.full((len(scores),), len(seen) - 1)

    monkeypatch.setattr(sampling, "draw", nth)
    while not seen or len(seen) < seen[0].shape[1]:
        token = sampler(logits[None], IDS)
        assert token.shape == (1,) and token.dtype == torch.int64
        p[token] += seen[-1].softmax(-1)[0, len(seen) - 1]
    return p


def wanted(processors: list, logits: Tensor) -> Tensor:
    scores = logits[None].float()
    for processor in processors:
        scores = processor(IDS, scores.clone())
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("V", [101, 512])
@pytest.mark.parametrize("processors", CASES.values(), ids=CASES)
def test_the_probabilities_are_those_of_transformers(processors, V, monkeypatch):
    logits = torch.randn(V, generator=torch.Generator().manual_seed(V)) * 3
    logits[IDS[0]] = logits.max() + 1  # so that penalties matter
    got, want = distribution(Sampler(processors, True), logits, monkeypatch), wanted(processors, logits)
    assert_equal(got > 0, want > 0)
    assert_close(got, want.double(), dtype=torch.float32)
    if processors:
        assert (got - logits.softmax(-1)).abs().max() > 1e-3, "a processor that does nothing proves nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rest", [[], [hf.TemperatureLogitsWarper(0.5)], [hf.MinPLogitsWarper(0.1)]], ids=len)
def test_ties_with_the_last_of_the_top(dtype, rest, monkeypatch):
    """All words that are as likely as the k-th stay."""
    logits = torch.randint(0, 6, (300,), generator=torch.Generator().manual_seed(0)).to(dtype)
    k = int((logits == 5).sum()) + 3
    got = distribution(Sampler([hf.TopKLogitsWarper(k), *rest], True), logits, monkeypatch)
    assert (got > 0).sum() == (logits >= 4).sum() > k
    assert_close(got, wanted([hf.TopKLogitsWarper(k), *rest], logits).double(), dtype=torch.float32)


def test_ties_under_top_p(monkeypatch):
    """Which of equal words go is nobody's promise; how many, and how likely the rest are, is."""
    logits = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(0)).float()
    processors = [hf.TopKLogitsWarper(60), hf.TopPLogitsWarper(0.4)]
    got, want = distribution(Sampler(processors, True), logits, monkeypatch), wanted(processors, logits)
    assert_close(got.sort().values, want.sort().values.double(), dtype=torch.float32)


def test_impossible_words_stay_impossible(monkeypatch):
    """Fewer possible words than top-k wants: transformers lets all stay, and all but those have probability 0."""
    logits = torch.full((200,), -torch.inf)
    logits[[4, 50, 199]] = torch.tensor([1.0, 2.0, 3.0])
    got = distribution(Sampler([TOP_K], True), logits, monkeypatch)
    assert got.nonzero()[:, 0].tolist() == [4, 50, 199]
    monkeypatch.undo()
    tokens = Sampler([TOP_K], True)(logits.expand(200, -1), IDS.expand(200, -1))
    assert set(tokens.tolist()) == {4, 50, 199}


def test_rows_do_not_mix(monkeypatch):
    """Each row's own candidates, in its own place; processors get that row's tokens."""
    logits = torch.full((3, 200), -20.0)
    logits[[0, 1, 2], [7, 150, 30]] = 20.0
    ids = torch.tensor([[7], [5], [5]])
    logits[0, 8] = 19.0
    processors = [hf.TopKLogitsWarper(2), hf.TemperatureLogitsWarper(0.1)]
    assert Sampler(processors, True)(logits, ids).tolist() == [7, 150, 30]
    processors = [hf.NoRepeatNGramLogitsProcessor(1), *processors]
    assert Sampler(processors, True)(logits, ids).tolist() == [8, 150, 30]


def chi_square(tokens: Tensor, p: Tensor) -> float:
    expected = p * len(tokens)
    counts = torch.bincount(tokens, minlength=len(p))
    assert not counts[p == 0].any()
    return float(((counts - expected).square() / expected)[p > 0].sum())


LIMIT = 33.0  # of 10 degrees of freedom, 3 in 10 000 are above
LOGITS = torch.tensor([0.3, -1.0, 1.5, 2.0, -torch.inf, 0.0, 0.7, 1.1, -0.4, 0.9, 1.9, 1.2])


@pytest.mark.parametrize("top_k", [None, 11, 5])
def test_frequencies(top_k, device):
    def frequencies(temperature: float) -> Tensor:
        torch.manual_seed(0)
        sampler = Sampler([hf.TemperatureLogitsWarper(temperature), *warpers], True)
        tokens = sampler(LOGITS.expand(6000, -1).to(device), torch.zeros(6000, 1, dtype=torch.int64, device=device))
        assert not (tokens[:-1] == tokens[1:]).all(), "rows are not drawn by themselves"
        return tokens.cpu()

    warpers = [] if top_k is None else [hf.TopKLogitsWarper(top_k)]
    p = wanted([hf.TemperatureLogitsWarper(0.8), *warpers], LOGITS)
    assert chi_square(frequencies(0.8), p) < LIMIT
    for wrong in (0.6, 1.1):
        assert chi_square(frequencies(wrong), p) > LIMIT, "the check does not see a wrong temperature"


def test_a_row_follows_no_other(device):
    """Two rows of one call, and one row of two calls, are independent: all pairs are as frequent as they should be."""
    torch.manual_seed(1)
    p = torch.tensor([0.5, 0.3, 0.2])
    scores = p.log().expand(2, 3).to(device)
    drawn = torch.stack([draw(scores) for _ in range(4000)]).cpu()
    both = torch.outer(p, p).flatten()
    assert chi_square(drawn[:, 0] * 3 + drawn[:, 1], both) < LIMIT
    assert chi_square(drawn[1:, 0] * 3 + drawn[:-1, 0], both) < LIMIT


def test_seeds_reproduce(device):
    sampler, logits = Sampler([hf.TopKLogitsWarper(50)], True), torch.randn(4, 200, device=device)

    def tokens(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return [t for _ in range(5) for t in sampler(logits, IDS.expand(4, -1).to(device)).tolist()]

    assert tokens(0) == tokens(0) != tokens(1)


def test_greedy_with_processors():
    """As transformers: processed in float32, then the largest. Nothing is drawn."""
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    best = logits.argmax(-1)
    state = torch.get_rng_state()
    got = Sampler([hf.SuppressTokensLogitsProcessor(best.tolist()), TOP_K], False)(logits, IDS.expand(2, -1))
    assert_equal(got, logits.index_fill(1, best, -torch.inf).argmax(-1))
    assert_equal(torch.get_rng_state(), state)


def test_order_is_that_of_the_model_settings():
    """The list that transformers makes of settings is one that candidates can be found early in."""
    model = tiny.build("llama")
    settings = GenerationConfig(do_sample=True, temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, typical_p=0.9)
    processors = model._get_logits_processor(settings, 4, IDS)
    kinds = [type(p) for p in processors]
    assert {hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper} < set(kinds)
    assert all(kind in sampling.ROWWISE for kind in kinds[kinds.index(hf.TopKLogitsWarper) + 1 :])


VOCABULARIES = [1, 7, 512, 4095, 4096, 4097, 32000, 32768, 50257, 50272, 128256]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_argmax(V, dtype, device):
    """Against numpy's, which promises the first of the largest, and NaN before everything, as torch's finds it."""
    generator = torch.Generator().manual_seed(V)
    logits = torch.randint(-9, 5, (11, V), generator=generator).to(dtype)
    logits[0] = -torch.inf
    logits[1], logits[1, -1] = -torch.inf, -1000
    logits[2, -1], logits[3, 0], logits[4, V // 2] = 7, 7, torch.inf
    logits[5, [V // 3, V - 1]] = torch.nan
    logits[6, V // 2], logits[6, V // 3] = torch.inf, torch.nan
    logits[7], logits[8] = -3, torch.randn(V, generator=generator).to(dtype)
    want = torch.from_numpy(logits.double().numpy().argmax(-1))
    assert_equal(logits.argmax(-1), want)
    assert_equal(argmax(logits.to(device)), want)
    of_three = torch.stack((logits + 1, logits.flip(0) * 2, logits), 1).to(device)  # as a model's logits lie
    assert_equal(argmax(of_three[:, -1]), want)
    assert_equal(argmax(of_three[:1, -1]), want[:1])
