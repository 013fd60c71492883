"""Which weights may stay: as many of each stretch, of each row, or whole blocks."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sparse_formats import SparseFormat, largest, parse_sparse

BLOCKS = (32, 64, 128)


@dataclass(frozen=True)
class Unstructured:
    """Each row keeps its largest weights, wherever they are: (1 - sparsity) of them.

    Nothing reads such a weight faster than a dense one, so it is stored as one, with zeros.
    """

    sparsity: float

    def __post_init__(self) -> None:
        _refuse_share(self.sparsity)

    @property
    def name(self) -> str:
        return f"{self.sparsity:g}"

    def kept_of(self, K: int) -> int:
        """In a row of K."""
        return K - round(self.sparsity * K)

    def largest(self, scores: Tensor) -> Tensor:
        """Which of scores [N, K] stay, bool [N, K]; of equal ones those that come first."""
        return largest(scores, self.kept_of(scores.shape[1]), scores.shape[1])

    def bytes(self, N: int, K: int, scale_bytes: int = 2) -> int:
        return scale_bytes * N * K

    def reason(self, N: int, K: int) -> str:
        """Why a weight [N, K] cannot have this pattern; empty if it can."""
        return "" if self.kept_of(K) else f"nothing would be left of rows of {K}"


@dataclass(frozen=True)
class Blocks:
    """Square blocks of `size`, of which a weight keeps those that matter most: (1 - sparsity) of them.

    sparsity: None: as many as are not all zero
    """

    size: int
    sparsity: float | None = None

    def __post_init__(self) -> None:
        if self.size not in BLOCKS:
            raise ValueError(f"blocks of {self.size}: there are {', '.join(map(str, BLOCKS))}")
        if self.sparsity is not None:
            _refuse_share(self.sparsity)

    @property
    def name(self) -> str:
        return f"block{self.size}" + ("" if self.sparsity is None else f"@{self.sparsity:g}")

    def largest(self, scores: Tensor) -> Tensor:
        """Which of scores [N, K], sizes and not squares, stay, bool [N, K]; of equal blocks those that come first."""
        N, K, B = *scores.shape, self.size
        blocks = scores.float().square().view(N // B, B, K // B, B).sum((1, 3))
        if bool(blocks.isnan().any()):
            raise ValueError("some scores are NaN: the weights or the inputs seen are not finite")
        total = blocks.numel()
        kept = int((blocks > 0).sum()) if self.sparsity is None else self.kept_of(N, K)
        return largest(blocks.view(1, -1), kept, total).view_as(blocks).repeat_interleave(B, 0).repeat_interleave(B, 1)

    def kept_of(self, N: int, K: int) -> int:
        """Of a weight [N, K]; all, where nobody knows how many are not zero."""
        blocks = N * K // self.size**2
        return blocks - round((self.sparsity or 0.0) * blocks)

    def bytes(self, N: int, K: int, scale_bytes: int = 2) -> int:
        return self.kept_of(N, K) * (scale_bytes * self.size**2 + 4) + 4 * (N // self.size + 1)

    def reason(self, N: int, K: int) -> str:
        if N % self.size or K % self.size:
            return f"[{N}, {K}] cannot be cut into blocks of {self.size}"
        return "" if self.kept_of(N, K) else f"nothing would be left of [{N}, {K}]"


Pattern = SparseFormat | Unstructured | Blocks


def parse_pattern(pattern: str | float | Pattern, values: str | None = None) -> Pattern:
    """ "2:4", "16:32" or any k:32, "0.5" (half of each row), "block64@0.7" (blocks 64 x 64, 30 % of them stay).

    values: "int8" or "int4", of the first two kinds. Raises ValueError for what is none of these.
    """
    if isinstance(pattern, SparseFormat | Unstructured | Blocks):
        if values is not None:
            raise ValueError(f"values={values!r} go with a pattern's name, not with {pattern!r}")
        return pattern
    if not isinstance(pattern, str) and type(pattern) is not float:
        raise TypeError(f'pattern={pattern!r}: give a name, such as "16:32"')
    blocks = re.fullmatch(r"block(\d{1,4})(?:@(\d+|\d*\.\d+))?", str(pattern))
    found: Pattern
    if blocks:
        found = Blocks(int(blocks[1]), float(blocks[2]) if blocks[2] else None)
    elif re.fullmatch(r"\d*\.\d+|\d+", str(pattern)):
        found = Unstructured(float(pattern))
    else:
        pattern = str(pattern)
        try:
            return parse_sparse(pattern, values)
        except ValueError as error:
            raise ValueError(f'{error}, "0.5" for half of each row, "block64@0.7" for blocks') from error
    if values is not None:
        raise ValueError(f"values={values!r}: only 2:4 and k:32 are stored with integers, not {pattern}")
    return found


def reason(pattern: Pattern, N: int, K: int) -> str:
    """Why a weight [N, K] cannot have this pattern; empty if it can."""
    if isinstance(pattern, SparseFormat):
        return f"{K} inputs are not a multiple of 32" if K % 32 else ""
    return pattern.reason(N, K)


def fits(weight: Tensor, pattern: Pattern) -> Tensor:
    """The mask of a weight [N, K] that has its zeros already. ValueError if more is left than the pattern keeps."""
    mask = pattern.largest(weight.abs())
    if bad := int((weight != 0)[~mask].sum()):
        raise ValueError(f"{bad} of {weight.numel()} weights are not zero where {pattern.name} keeps none")
    return mask


def _refuse_share(sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity {sparsity}: the share of weights that go, between 0 and 1")


def owl_kept(outliers: list[float], sizes: list[int], pattern: Pattern, spread: float) -> list[Pattern]:
    """`pattern` for each block of a model: with more weights where there are more outliers, as many in all.

    Yin et al., "Outlier Weighed Layerwise Sparsity", 2023: sparsity between s - spread and s + spread.
    """
    found = torch.tensor(outliers, dtype=torch.float64)
    size = torch.tensor(sizes, dtype=torch.float64)
    span = float(found.max() - found.min())
    shift = (found - found.min()) * (2 * spread / span) if span else torch.zeros_like(found)
    if isinstance(pattern, Unstructured):
        kept = _shares(1 - pattern.sparsity, shift, size, 0.001, 0.999)
        return [Unstructured(round(1 - float(share), 4)) for share in kept]
    if not isinstance(pattern, SparseFormat) or pattern.quads:
        raise ValueError(f"{pattern.name} keeps as much everywhere; k:32 and shares such as 0.5 can differ by layer")
    wanted = 32 * _shares(pattern.kept / 32, shift, size, 1 / 32, 31 / 32)
    return [SparseFormat(k, False, pattern.values) for k in _whole(wanted, size, pattern.kept)]


def _shares(mean: float, shift: Tensor, size: Tensor, least: float, most: float) -> Tensor:
    """`shift` and a constant, between two limits, such that the mean, weighed by `size`, is `mean`."""
    low, high = -1.0 - float(shift.max()), 1.0
    for _ in range(60):
        middle = (low + high) / 2
        kept = (shift + middle).clamp(least, most)
        low, high = (low, middle) if float((kept * size).sum() / size.sum()) > mean else (middle, high)
    return (shift + low).clamp(least, most)


def _whole(wanted: Tensor, size: Tensor, mean: int) -> list[int]:
    """Whole numbers near `wanted`, from 1 to 31, whose mean, weighed by `size`, does not exceed `mean`."""
    kept = (wanted + 1e-9).floor()
    order = (wanted - kept).argsort(descending=True)
    for i in order.tolist():
        raised = kept.clone()
        raised[i] += 1
        if raised[i] <= 31 and float((raised * size).sum()) <= mean * float(size.sum()):
            kept = raised
    return [int(k) for k in kept]
