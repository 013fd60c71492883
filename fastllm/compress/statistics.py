"""What calibration remembers of the inputs of a layer."""

import torch
from torch import Tensor

CHUNK = 4096  # rows that are float32 at a time
SAMPLE = 512  # rows that are kept, for those who want some


class Statistics:
    """Of rows x [K]: their number, sums of |x| and x**2, the largest |x|, the mean of x x.T, all float32; some rows.

    Layers with the same input share one.
    """

    def __init__(self, K: int, device: torch.device | str = "cpu", products: bool = True, sample: int = 0):
        """products: whether x x.T is wanted, which takes 4 K**2 bytes; sample: how many rows are, 4 K bytes each."""
        self.count = 0
        self.total = torch.zeros(K, device=device)  # [K]
        self.squares = torch.zeros(K, device=device)  # [K]
        self.largest = torch.zeros(K, device=device)  # [K]
        self.products = torch.zeros(K, K, device=device) if products else None
        self.sample = torch.zeros(0, K, device=device)  # of all rows alike, in their order
        self._wanted, self._lots = sample, torch.zeros(0)

    def add(self, x: Tensor) -> None:
        """x [..., K], of any floating-point type."""
        for rows in x.detach().reshape(-1, x.shape[-1]).split(CHUNK):
            rows = rows.float()
            before, self.count = self.count, self.count + len(rows)
            size = rows.abs()
            self.total += size.sum(0)
            self.squares += size.square().sum(0)
            self.largest = torch.maximum(self.largest, size.amax(0)) if len(rows) else self.largest
            if self.products is not None and len(rows):  # a mean at any time, so that nobody has to copy it
                self.products.mul_(before / self.count).addmm_(rows.t(), rows, alpha=1 / self.count)
            if self._wanted:
                self._keep(rows)

    def _keep(self, rows: Tensor) -> None:
        """Every row draws a lot, and those with the smallest of all lots so far stay."""
        draw = torch.Generator().manual_seed(self.count)  # the same in every run, unlike from call to call
        lots = torch.cat((self._lots, torch.rand(len(rows), generator=draw)))
        kept = lots.argsort()[: self._wanted].sort().values
        new = kept[kept >= len(self.sample)] - len(self.sample)
        old = kept[: len(kept) - len(new)]
        self.sample = torch.cat((self.sample[old.to(rows.device)], rows[new.to(rows.device)]))
        self._lots = lots[kept]

    def divide(self, scale: Tensor) -> None:
        """As if every row had been divided by `scale` [K]."""
        self.total /= scale
        self.squares /= scale.square()
        self.largest /= scale
        self.sample /= scale
        if self.products is not None:
            self.products /= scale[:, None] * scale

    @property
    def mean(self) -> Tensor:
        """The mean of |x|, [K]."""
        return self.total / max(1, self.count)

    @property
    def mean_square(self) -> Tensor:
        """The mean of x**2, [K]."""
        return self.squares / max(1, self.count)

    @property
    def hessian(self) -> Tensor:
        """The mean of x x.T, [K, K]; half the Hessian of the mean squared error of a row of the output."""
        assert self.products is not None
        return self.products


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """The mean of (difference @ x)**2 over the rows x that `hessian` [K, K] remembers: difference [N, K] -> [N]."""
    return (difference @ hessian).mul_(difference).sum(1)
