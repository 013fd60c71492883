"""Calibration data: whatever a user has, as batches of token ids."""

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import calibration_text

LENGTH, SAMPLES = 512, 128  # tokens of a sample, and how many there are at most, unless the user says otherwise
BATCH = 2048  # tokens of a batch at most, samples of equal length together

Calibration = str | PathLike[str] | Tensor | Iterable[Any] | None


class Batch(NamedTuple):
    """ids int64 [B, T]; seen bool [B, T], which of them are no padding, None: all."""

    ids: Tensor
    seen: Tensor | None

    @property
    def tokens(self) -> int:
        return self.ids.numel() if self.seen is None else int(self.seen.sum())


def batches(
    calib: Calibration, tokenizer: Any, vocabulary: int, samples: int = SAMPLES, length: int = LENGTH
) -> list[Batch]:
    """`calib` as batches of at most `samples` samples of at most `length` tokens.

    calib: the path of a text file; a text; token ids, [T] or [B, T]; or an iterable of texts, of token ids, or of
           mappings with input_ids and, where there is padding, attention_mask; None: text that comes along
    Long texts are cut into samples of `length` tokens, and what is left over is dropped unless it is all there is. A
    text wants the tokenizer of the model.

    Raises ValueError for ids outside of the vocabulary and for fewer than two tokens in all, TypeError for a text
    without tokenizer and for what is neither text nor ids.
    """
    found: list[Batch] = []
    for item in _items(calib):
        for sample in _cut(item, tokenizer, length):
            if len(found) < samples:
                found.append(sample)
    count = sum(sample.tokens for sample in found)
    if count < 2:
        raise ValueError(f"the calibration data has {count} tokens; give it more text")
    for sample in found:
        low, high = int(sample.ids.min()), int(sample.ids.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"the calibration data has token {low if low < 0 else high}, outside of 0 to {vocabulary - 1}"
            )
    return list(together(found))


def _items(calib: Calibration) -> Iterable[Any]:
    """Texts, ids [T] or [B, T], or mappings."""
    if calib is None:
        return [calibration_text()]
    if isinstance(calib, PathLike):
        return [Path(calib).read_text(encoding="utf-8")]
    if isinstance(calib, str):
        # no text that is worth calibrating with is the name of a file
        short = len(calib) < 1024 and "\n" not in calib
        return [Path(calib).read_text(encoding="utf-8") if short and Path(calib).is_file() else calib]
    return [calib] if isinstance(calib, (Tensor, Mapping)) else calib


def _cut(item: Any, tokenizer: Any, length: int) -> Iterator[Batch]:
    """The samples of one item, each a batch of one row; those of a text begin as its tokenizer lets texts begin."""
    seen, begin = None, []
    if isinstance(item, Mapping):
        item, seen = item["input_ids"], item.get("attention_mask")
    if isinstance(item, str):
        if tokenizer is None:
            raise TypeError("calibration with a text needs the tokenizer of the model: tokenizer=")
        item = tokenizer(item, add_special_tokens=False, verbose=False)["input_ids"]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.as_tensor(item)
    if ids.ndim not in (1, 2) or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise TypeError(
            f"calibration data must be texts or token ids [T] or [B, T], got {ids.dtype} {list(ids.shape)}"
        )
    rows = ids.long().cpu().view(-1, ids.shape[-1]) if ids.numel() else ids.new_zeros(0, 1, dtype=torch.int64)
    masks = None if seen is None else torch.as_tensor(seen).cpu().bool().view(rows.shape)
    first, own = torch.tensor(begin, dtype=torch.int64), length - len(begin)
    for i, row in enumerate(rows):
        if masks is not None:
            yield Batch(row[None, :length], masks[i][None, :length])
            continue
        stop = max(len(row) // own * own, min(len(row), own))
        for part in row[:stop].split(own):
            if len(part):
                yield Batch(torch.cat((first, part))[None], None)


def together(samples: list[Batch]) -> Iterator[Batch]:
    """Samples of equal length without padding, in larger batches; those with padding as they are."""
    of_length: dict[int, list[Tensor]] = {}
    for ids, seen in samples:
        if seen is not None and not bool(seen.all()):
            yield Batch(ids, seen)
        else:
            of_length.setdefault(ids.shape[1], []).append(ids)
    for length, rows in of_length.items():
        yield from (Batch(part, None) for part in torch.cat(rows).split(max(1, BATCH // length)))
