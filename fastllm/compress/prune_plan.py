"""How the layers of a model are made narrower, and whether stock transformers builds what is left: nothing is changed
yet."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from ..probe import probe
from .blocks import Blocks
from .prune_config import Values, changes, skeleton, with_settings
from .prune_parts import Part, find_attention, find_feed_forward, is_mixture, rehearse
from .prune_subject import Subject, check_share, share_of
from .samples import Batch

TRIED = 16  # tokens with which the parts of blocks are told
NAMED = re.compile(r"inter|inner|ffn|ff_|_ff|mlp|feed|hidden_dim")  # names of configurations for the neurons' number
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")


class Cut(NamedTuple):
    """How blocks are made narrower: of each block the part, how many of its units stay, and the settings for that."""

    parts: list[Part]
    kept: int
    settings: dict[str, int]
    what: str  # the units
    values: Values = {}  # what attributes of modules become, by their names in the model as it is

    def shapes(self, subject: Subject, layers: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Of the parameters that change, by their names in a model of only these layers."""
        return {
            f"{subject.prefix}.{new}.{name}": shape
            for new, i in enumerate(layers)
            for name, shape in self.parts[i].shapes(subject.layers[i], self.kept).items()
        }


def _small(subject: Subject) -> Blocks:
    """The blocks with a few tokens."""
    return Blocks(subject.model, [Batch(probe(subject.model, None)[:1, :TRIED].cpu(), None)])


def _agreed(
    subject: Subject,
    what: str,
    kept: int,
    found: Callable[[Blocks], Iterator[Part]],
    options: Sequence[dict[str, int]],
) -> tuple[Cut | None, str]:
    """The first part of the first block, and settings, with which all blocks can be cut; or None, and why.

    kept: how many units are to stay; options: settings of the configuration that might say so.
    """
    blocks, why = _small(subject), ""
    for part in found(blocks):
        parts = [part] * len(blocks)
        different = next(
            (i for i, block in enumerate(subject.layers) if _unlike(part, subject.layers[0], block)), None
        )
        if different is not None:
            why = why or f"those of layer {different} are not like those of layer 0"
            continue
        cut, reason = _settle(subject, parts, kept, options, what)
        reason = reason if cut is None else _rehearsed(subject, blocks, cut)
        if cut is not None and not reason:
            return cut, ""
        why = why or reason
    return None, why


def _impossible(subject: Subject, what: str, why: str) -> ValueError:
    return ValueError(f"{what} of {type(subject.model).__name__} cannot be removed: {why}")


def _unlike(part: Part, first: nn.Module, block: nn.Module) -> bool:
    """Whether a block lacks what the part names, or has it in another shape."""
    shapes = [{name: tuple(p.shape) for name, p in b.named_parameters()} for b in (first, block)]
    names = [f"{name}.weight" for name in (part.consumer, *(producer.name for producer in part.producers))]
    return any(shapes[0].get(name) != shapes[1].get(name) for name in (*names, *part.vectors))


def _settle(
    subject: Subject, parts: list[Part], kept: int, options: Sequence[dict[str, int]], what: str
) -> tuple[Cut | None, str]:
    """The first of some settings that make a model with just these parts cut; or why not."""
    everything, why = range(len(subject.layers)), ""
    for settings in options:
        bare = [part._replace(vectors=()) for part in parts]
        for some in (parts, bare):  # vectors of as many numbers may be there for other reasons
            cut = Cut(list(some), kept, settings, what)
            shapes = cut.shapes(subject, everything)
            try:
                smaller = skeleton(subject.model, with_settings(subject.model.config, settings))
            except ValueError as error:
                why = why or str(error)
                continue
            values, reason = changes(subject.whole, smaller, subject.prefix, everything, shapes)
            if not reason:
                return cut._replace(values=values), ""
            why = why or reason
    return None, why or f"its configuration has no number of {what} that could be changed"


def _rehearsed(subject: Subject, blocks: Blocks, cut: Cut) -> str:
    """Why one of the blocks cannot be cut, or ""."""
    for i, part in enumerate(cut.parts):
        own = within(cut.values, f"{subject.prefix}.{i}")
        stay = range(part.units - cut.kept, part.units)
        if why := rehearse(blocks, i, part, list(stay), own):
            return f"{blocks.name(i)}.{part.consumer}: {why}"
    return ""


def within(values: Values, block: str) -> Values:
    """Those of the modules of a block, by their names within it."""
    return {
        name.removeprefix(block).removeprefix("."): own
        for name, own in values.items()
        if f"{name}.".startswith(f"{block}.")
    }


def plan_feed_forward(subject: Subject, share: float, multiple: int) -> Cut:
    """Neurons of all layers alike. ValueError with the reason if that cannot be."""
    check_share("ffn", share, "neurons")
    if type(multiple) is not int or multiple < 1:
        raise ValueError(f"multiple={multiple!r}: of what the neurons left are to be a multiple, 1 or more")
    mixture = next((i for i, layer in enumerate(subject.layers) if is_mixture(layer)), None)
    if mixture is not None:
        raise ValueError(
            f"ffn={share}: {subject.prefix}.{mixture} has a mixture of experts, each of which sees too few tokens to "
            "say which of its neurons go; layers= and heads= can be removed"
        )
    why, text = "", subject.text
    for count in dict.fromkeys(part.units for part in find_feed_forward(_small(subject), 0)):
        kept = rounded(count - share_of("ffn", share, count, "neurons"), count, multiple)
        names = [n for n, value in vars(text).items() if (type(value) is int and value == count) and NAMED.search(n)]
        names += [n for n, value in vars(text).items() if value is None and NAMED.search(n)]  # it follows from others
        found = partial(_neurons, count=count)
        cut, reason = _agreed(subject, "neurons", kept, found, [{name: kept} for name in names])
        if cut is not None:
            return cut
        why = why or reason
    none = f"{subject.prefix}.0 has no feed-forward part of linear layers whose channels are single neurons"
    raise _impossible(subject, "neurons", why or none)


def _neurons(blocks: Blocks, count: int) -> Iterator[Part]:
    return (part for part in find_feed_forward(blocks, 0) if part.units == count)


def _unbuilt(subject: Subject, settings: dict[str, int]) -> str:
    """Why stock transformers builds no model with some settings, or ""."""
    try:
        skeleton(subject.model, with_settings(subject.model.config, settings))
    except ValueError as error:
        return str(error)
    return ""


def rounded(kept: int, count: int, multiple: int) -> int:
    """`kept` or more, a multiple of `multiple`; of its half, and so on, where more than half of what was to go of
    `count` would stay."""
    while (up := -(-kept // multiple) * multiple) - kept > (count - kept) / 2:
        multiple = max(1, multiple // 2)
    return up


def plan_heads(subject: Subject, share: float) -> Cut:
    """Heads of all layers alike: with their keys and values, or of those that share one head of these, some.

    ValueError with the reason if that cannot be.
    """
    check_share("heads", share, "heads")
    text = subject.text
    heads = getattr(text, "num_attention_heads", None)
    if type(heads) is not int:
        raise ValueError(f"heads={share}: the configuration of {type(subject.model).__name__} names no heads")
    own = next((name for name in KV_HEADS if type(getattr(text, name, None)) is int), None)
    shared = heads if own is None else getattr(text, own)
    units = shared if shared > 1 else heads
    what = "groups of heads" if 1 < shared < heads else "heads"
    if units == 1 or heads % units:
        raise ValueError(f"heads={share}: {heads} heads on {shared} of keys and values leave nothing to remove")
    kept = units - share_of("heads", share, units, what)
    explicit, hidden = getattr(text, "head_dim", None), getattr(text, "hidden_size", None)

    def settings(kept: int) -> dict[str, int]:
        found = {"num_attention_heads": heads // units * kept}
        found |= {own: kept} if own is not None and shared > 1 else {}
        if explicit is None and isinstance(hidden, int) and hidden % heads == 0:
            found["head_dim"] = hidden // heads
        return found

    if why := _unbuilt(subject, settings(kept)):
        fine = [f"{1 - n / units:.3g}" for n in range(units - 1, 0, -1) if not _unbuilt(subject, settings(n))]
        others = f"shares that stock transformers takes: {', '.join(fine)}" if fine else "nor does any other share"
        raise ValueError(f"heads={share}: with {heads // units * kept} heads left, {why}; {others}")
    cut, why = _agreed(
        subject, what, kept, partial(find_attention, index=0, units=units, heads=heads), [settings(kept)]
    )
    if cut is not None:
        return cut
    if why and not explicit:
        why += "; its configuration has no head_dim, and fewer heads may mean larger ones"
    none = f"{subject.prefix}.0 has no linear layers for queries, keys and values whose rows fall into these {what}: "
    raise _impossible(subject, what, why or f"{none}one projection makes all three, or a norm spans all heads")
