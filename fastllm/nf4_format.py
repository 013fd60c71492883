"""`Nf4Format`: weights of 4 bits that are looked up in a table of sixteen levels, as bitsandbytes stores them.

Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", 2023, appendix E.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding

# quantiles of a normal distribution, and zero
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Nf4Format:
    """Sixteen levels: w[n, k] = NF4_LEVELS[q[n, k]] * scale[n, k // 64], as bitsandbytes stores them.

    It has the attributes and methods of an `IntFormat`, most of them with the only value there is.
    """

    bits: int = field(default=4, init=False)
    group: int = field(default=64, init=False)
    symmetric: bool = field(default=True, init=False)
    activations: None = field(default=None, init=False)
    name: str = field(default="nf4", init=False)

    @property
    def weight_only(self) -> "Nf4Format":
        """The same: activations stay as they are."""
        return self

    def group_of(self, K: int) -> int:
        """The number of weights that share a scale in a row of K."""
        return 64

    def groups(self, K: int) -> int:
        """The number of scales in a row of K; the last group may be short."""
        return -(-K // 64)

    def words(self, K: int) -> int:
        """The number of int32 words in a row of K."""
        return -(-K // 8)

    def bytes(self, N: int, K: int, scale_bytes: int = 2) -> int:
        """The size at rest of a weight [N, K] whose scales have `scale_bytes` bytes each."""
        return 4 * N * self.words(K) + scale_bytes * N * self.groups(K)


def level_pairs(device: torch.device) -> Tensor:
    """The levels of the two weights in every byte, those of its lowest bits first: float32 [256, 2]."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)
    return torch.stack((levels.repeat(16), levels.repeat_interleave(16)), 1)


def nf4_dense(packed: Tensor, scale: Tensor, pairs: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """NF4_LEVELS[q] * scale -> [N, K] of `dtype`, rounded to it once.

    packed int32 [N, ceil(K / 8)] and scale [N, ceil(K / 64)], at rest; pairs: `level_pairs` of their device.
    """
    wide = torch.promote_types(dtype, torch.float32)
    bytes = packed.flatten().view(torch.uint8).view(len(packed), -1)
    values = embedding(bytes.int(), pairs).flatten(1)[:, :K].to(wide)
    return (values * scale.to(wide).repeat_interleave(64, 1)[:, :K]).to(dtype)
