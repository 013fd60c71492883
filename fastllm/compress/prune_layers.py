"""Which layers a model can do without.

How little a layer changes what goes through it, its block influence, says which few to look at (Men et al., "ShortGPT:
Layers in Large Language Models are More Redundant Than You Expect", 2024); the loss without each of these says which.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from ..progress import track
from .blocks import Blocks
from .samples import Batch

SHORTLIST = 3  # layers of the lowest influence, whose loss is looked at
SCORED = 1 << 12  # tokens on which layers are compared, at most
LOGITS = 1 << 28  # bytes of a batch's logits, in float32


class Removed(NamedTuple):
    """A layer that goes: its number in the model as it was, 1 - mean cos(what goes in, what comes out), and the loss
    without it and those that went before; and for the others that were looked at, by number, the same two."""

    layer: int
    influence: float
    loss: float
    others: dict[int, tuple[float, float]]


class Judge:
    """Runs a model on some data, with any of its layers left out.

    The loss is the mean cross-entropy of the next token, in nats; for models that predict none, |h - h0|**2 / |h0|**2
    of the last hidden states, h0 those of the model when it came here.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module], batches: Sequence[Batch], scored: int = SCORED):
        """batches: of which those that hold the first `scored` tokens count. ValueError if these predict nothing."""
        self.model, self.layers = model, list(layers)
        self.base = getattr(model, model.base_model_prefix, model)
        self.causal = predicts(model)
        self.batches = list(self._some(batches, scored))
        self._parts = 0  # of the tuples that layers answer; 0: they answer tensors
        self._first = None if self.causal else [self._hidden(batch) for batch in self.batches]
        if self.causal and not sum(int(_targets(batch).ge(0).sum()) for batch in self.batches):
            raise ValueError("no sample of the calibration data has two tokens: there is none to predict; give longer")

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)

    def _some(self, batches: Sequence[Batch], scored: int) -> Iterator[Batch]:
        vocabulary = self.model.config.get_text_config().vocab_size
        for ids, seen in batches:
            rows = max(1, LOGITS // (4 * vocabulary * ids.shape[1])) if self.causal else len(ids)
            for part in range(0, len(ids), rows):
                if scored > 0:
                    yield Batch(ids[part : part + rows], None if seen is None else seen[part : part + rows])
                    scored -= ids[part : part + rows].numel()

    def _run(self, model: Any, batch: Batch) -> Any:
        device = next(model.parameters()).device
        mask = None if batch.seen is None else batch.seen.to(device).long()
        options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        with torch.no_grad():
            return model(input_ids=batch.ids.to(device), attention_mask=mask, **options)

    def _hidden(self, batch: Batch) -> Tensor:
        """The last hidden states [tokens that count, K], float32."""
        hidden = self._run(self.base, batch)[0]
        return (hidden.flatten(0, 1) if batch.seen is None else hidden[batch.seen.to(hidden.device)]).float()

    @contextmanager
    def without(self, gone: Collection[int]) -> Iterator[None]:
        """The model does not run these layers."""

        def skip(module: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden, *[None] * (self._parts - 1)) if self._parts else hidden

        with Blocks.replaced([self.layers[i] for i in gone], [skip] * len(gone)):
            yield

    def loss(self, gone: Collection[int] = ()) -> float:
        """Without some layers."""
        total, count = 0.0, 0
        with self.without(gone):
            for i, batch in enumerate(self.batches):
                if self._first is not None:
                    total += float((self._hidden(batch) - self._first[i]).square().sum())
                    continue
                logits, targets = self._run(self.model, batch).logits[:, :-1], _targets(batch)
                for row, target in zip(logits, targets.to(logits.device), strict=True):
                    total += float(cross_entropy(row.float(), target, ignore_index=-100, reduction="sum").double())
                count += int(targets.ge(0).sum())
        if self._first is not None:
            return total / max(1e-30, sum(float(h.square().sum()) for h in self._first))
        return total / count

    def influences(self, gone: Collection[int] = ()) -> dict[int, float]:
        """Of each layer that is left: 1 - mean cos(what goes in, what comes out) over all tokens that count."""
        left = [i for i in range(len(self.layers)) if i not in gone]
        total, count = dict.fromkeys(left, 0.0), 0

        def watch(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                self._parts = len(out) if isinstance(out, tuple) else 0
                x, y = args[0], out[0] if isinstance(out, tuple) else out
                cos = cosine_similarity(x.float(), y.to(x.device).float(), dim=-1)  # [B, T]
                total[index] += float((cos if seen is None else cos[seen.to(cos.device)]).sum())

            return hook

        handles = [self.layers[i].register_forward_hook(watch(i)) for i in left]
        try:
            with self.without(gone):
                for batch in self.batches:
                    seen = batch.seen
                    count += batch.tokens
                    self._run(self.base, batch)
        finally:
            for handle in handles:
                handle.remove()
        return {i: 1 - cos / count for i, cos in total.items()}


def predicts(model: Any) -> bool:
    """Whether a model predicts the next token."""
    causal = getattr(model, "can_generate", lambda: False)() and not model.config.is_encoder_decoder
    return bool(causal and model.get_output_embeddings() is not None)


def _targets(batch: Batch) -> Tensor:
    """The token that follows each but the last, [B, T - 1]; -100 where there is padding."""
    targets = batch.ids[:, 1:].clone()
    if batch.seen is not None:
        targets[~(batch.seen[:, 1:] & batch.seen[:, :-1])] = -100
    return targets


def choose(judge: Judge, count: int, refused: Callable[[Sequence[int]], str], quiet: bool = False) -> list[Removed]:
    """`count` layers to remove, in the order in which they were chosen, each with a look at the model without those
    before it. The first and the last layer stay.

    refused: why some layers cannot be removed, or "". ValueError if there is none left that can.
    """
    found: list[Removed] = []
    for _ in track(range(count), "choosing layers", quiet=quiet):
        gone = [removed.layer for removed in found]
        influence = judge.influences(gone)
        inner = sorted((i for i in influence if 0 < i < len(judge.layers) - 1), key=influence.__getitem__)
        reasons: dict[int, str] = {}
        short: list[int] = []
        for i in inner:
            if len(short) < SHORTLIST and not (reasons.setdefault(i, refused([*gone, i]))):
                short.append(i)
        if not short:
            why = next(iter(reasons.values()), "the first and the last layer stay")
            raise ValueError(f"no further layer can be removed after {len(found)} of {count}: {why}")
        loss = {i: judge.loss([*gone, i]) for i in short}
        best = min(short, key=loss.__getitem__)
        others = {i: (influence[i], loss[i]) for i in short if i != best}
        found.append(Removed(best, influence[best], loss[best], others))
    return found


def named(judge: Judge, layers: Sequence[int]) -> list[Removed]:
    """Layers that somebody chose, in their order, with what `choose` would say of them."""
    found: list[Removed] = []
    for i in layers:
        gone = [removed.layer for removed in found]
        found.append(Removed(i, judge.influences(gone)[i], judge.loss([*gone, i]), {}))
    return found
