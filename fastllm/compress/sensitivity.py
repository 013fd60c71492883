"""What a model loses by a change of its weights, foreseen from one backward pass for each of a few texts.

With labels y drawn from the model itself, the loss in nats that a small change D of the weights costs is half of the
mean of <gradient of log p(y), D>**2: the quadratic form of the Fisher information (Amari, "Natural Gradient Works
Efficiently in Learning", 1998). Nothing of the size of that matrix is formed: of each text's gradient only the
products with the changes in question are kept.

One such change of each layer is looked at, the largest; that of other formats is taken to cost as much less as their
errors in the layer's output are smaller.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import IntFormat
from ..progress import track
from .samples import Batch
from .units import Unit

TEXTS, TOKENS = 64, 128  # backward passes, and the tokens of each


def texts(data: Iterable[Batch], count: int = TEXTS, tokens: int = TOKENS) -> list[Tensor]:
    """The beginnings, int64 [1, T], of the first samples; of those with padding what is none."""
    found: list[Tensor] = []
    for ids, seen in data:
        for row in range(len(ids)):
            own = ids[row] if seen is None else ids[row][seen[row]]
            if len(own) > 1 and len(found) < count:
                found.append(own[None, :tokens])
    return found


def foresee(model: Any, units: Sequence[Unit], ids: Sequence[Tensor], quiet: bool) -> None:
    """Fill in the losses of `units` in every format. ids: token ids [1, T] each."""
    products = torch.zeros(len(ids), len(units), dtype=torch.float64)
    place: dict[int, list[tuple[int, int]]] = {}  # of a parameter: the slots in it, by unit and number
    parameters: dict[int, nn.Parameter] = {}
    for u, unit in enumerate(units):
        for i, slot in enumerate(unit.slots):
            parameters[id(slot.parameter)] = slot.parameter
            place.setdefault(id(slot.parameter), []).append((u, i))
    text = 0

    def take(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for u, i in place[id(parameter)]:
            own = units[u].slots[i].of(gradient).reshape(-1)
            change = units[u].changes[i].reshape(-1).to(own.device)
            products[text, u] += float(own.float() @ change.float())

    generator = torch.Generator().manual_seed(0)
    with _gradients(model, list(parameters.values()), take):
        for text in track(range(len(ids)), "measuring sensitivity", quiet=quiet):
            own = ids[text].to(model.device)
            logits = model(input_ids=own, use_cache=False).logits[0].float().log_softmax(-1)  # [T, V]
            drawn = torch.multinomial(logits.detach().cpu().exp(), 1, generator=generator).to(logits.device)
            logits.gather(1, drawn).sum().backward()
    tokens = sum(t.shape[1] for t in ids)
    for u, unit in enumerate(units):
        unit.foresee(float(products[:, u].square().sum()) / 2 / tokens)


@contextmanager
def _gradients(model: Any, parameters: list[nn.Parameter], take: Callable[[Tensor], None]) -> Iterator[None]:
    """Let only these parameters have gradients, and hand each to `take` as soon as it is there."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    handles = []
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
            handles.append(p.register_post_accumulate_grad_hook(take))
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p, wanted in before:
            p.requires_grad_(wanted)
            p.grad = None if not wanted else p.grad


def head_loss(model: Any, unit: Unit, format: IntFormat, ids: Sequence[Tensor]) -> float:
    """What the output head in a format costs, in nats a token: the divergence of the answers, measured."""
    (name,) = unit.names
    dense, packed = model.get_submodule(name), unit.build(name, format)
    total, count = 0.0, 0
    with torch.no_grad():
        for own in ids:
            answers = []
            for head in (dense, packed):
                model.set_submodule(name, head)
                try:
                    answers.append(model(input_ids=own.to(model.device), use_cache=False).logits[0].float())
                finally:
                    model.set_submodule(name, dense)
            p, q = (answer.log_softmax(-1) for answer in answers)
            total += float((p.exp() * (p - q)).sum())
            count += len(p)
    return total / count
