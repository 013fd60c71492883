"""Random weights that are zero in whole blocks."""

import torch
from torch import Tensor

from fastllm.bsr_format import pack_blocks

SIZES = (32, 64, 128)


def mask_of(nb: int, kb: int, equal: bool = False) -> Tensor:
    """Uneven rows of blocks, the second empty, the third full; or two blocks in each."""
    if equal:
        return torch.zeros(nb, kb).scatter_(1, torch.rand(nb, kb).argsort(1)[:, :2], 1.0).bool()
    mask = torch.rand(nb, kb) < 0.5
    mask[1], mask[2] = False, True
    return mask


def weight_of(B: int, nb: int = 4, kb: int = 5, dtype: torch.dtype = torch.float32, equal: bool = False) -> tuple:
    """A dense weight with blocks of zeros, the same packed, and the mask. It has no other zeros."""
    mask = mask_of(nb, kb, equal)
    dense = torch.randn(nb * B, kb * B) + 8.0 * torch.randint(0, 2, (nb * B, kb * B)) - 4
    dense = (dense * mask.repeat_interleave(B, 0).repeat_interleave(B, 1)).to(dtype)
    return dense, pack_blocks(dense, mask, B), mask
