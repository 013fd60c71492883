"""Counters in device memory that are zero whenever no kernel runs: kernels that count with them leave them so."""

import itertools
from functools import cache

import torch

SLAB = 1024  # counters for one launch
SLABS = 1024


class Tickets:
    """4 MiB of counters on one device, given out so that launches which may overlap never share any.

    Launches of one stream follow each other and share a slab. What is captured into a CUDA graph gets a slab of its
    own for good: graphs may be replayed on any stream, at the same time.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.memory: torch.Tensor | None = None
        self.next = itertools.count()
        self.of_stream: dict[int, int] = {}

    def take(self, stream: int, capturing: bool) -> torch.Tensor | None:
        """[SLAB] zeros, or None if there are none to give."""
        if self.memory is None:
            if capturing:
                return None  # a capture would record the clearing of the slabs, and not do it
            self.memory = torch.zeros(SLABS, SLAB, dtype=torch.int32, device=self.device)
        if not capturing and stream in self.of_stream:
            return self.memory[self.of_stream[stream]]
        slab = next(self.next)
        if slab >= SLABS:
            return None
        if not capturing:
            self.of_stream[stream] = slab
        return self.memory[slab]


@cache
def _tickets(device: torch.device) -> Tickets:
    return Tickets(device)


def take_tickets(tiles: int, device: torch.device) -> torch.Tensor:
    """At least `tiles` zeros, int32, for a launch on the device's current stream."""
    if device.type == "cuda" and tiles <= SLAB:
        stream = torch.cuda.current_stream(device).cuda_stream
        found = _tickets(device).take(stream, torch.cuda.is_current_stream_capturing())
        if found is not None:
            return found
    return torch.zeros(tiles, dtype=torch.int32, device=device)
