"""Counters in device memory that are zero whenever no kernel runs: kernels that count with them leave them so."""

from functools import cache
from threading import Lock

import torch

from .launch import on_device

SLAB = 1024  # counters for all launches of one stream
CHUNK = 1 << 21  # counters: 8 MiB


class Tickets:
    """Counters on one device, given out so that launches which may overlap never share any.

    Launches of one stream follow each other and share a slab. What is captured into a CUDA graph gets counters of its
    own for good: graphs may be replayed on any stream, at the same time.
    """

    def __init__(self, device: torch.device):
        self.device, self.lock = device, Lock()
        self.free: torch.Tensor | None = None
        self.chunks: list[torch.Tensor] = []  # alive as long as graphs may count in them
        self.of_stream: dict[int, torch.Tensor] = {}

    def take(self, tiles: int, stream: int, capturing: bool) -> torch.Tensor | None:
        """At least `tiles` zeros, of SLAB at most; None if there are none to give."""
        with self.lock:
            if not capturing and (self.free is None or len(self.free) < CHUNK // 2):
                # ahead of need: a capture would record the clearing, and not do it
                self.free = torch.zeros(CHUNK, dtype=torch.int32, device=self.device)
                self.chunks.append(self.free)
                if self.device.type == "cuda":  # whatever stream is the next to count in it
                    torch.cuda.current_stream(self.device).synchronize()
            if not capturing and stream in self.of_stream:
                return self.of_stream[stream]
            size = -(-tiles // 32) * 32 if capturing else SLAB  # whole lines: neighbours do not share them
            if self.free is None or size > len(self.free):
                return None
            given, self.free = self.free[:size], self.free[size:]
            if not capturing:
                self.of_stream[stream] = given
            return given


@cache
def _tickets(device: torch.device) -> Tickets:
    return Tickets(device)


def take_tickets(tiles: int, device: torch.device) -> torch.Tensor:
    """At least `tiles` zeros, int32, for a launch on the device's current stream."""
    if device.type == "cuda" and tiles <= SLAB:
        with on_device(device):
            stream, capturing = torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()
            found = _tickets(device).take(tiles, stream, capturing)
        if found is not None:
            return found
    return torch.zeros(tiles, dtype=torch.int32, device=device)
