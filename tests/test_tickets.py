"""Counters for sums that are split: nobody shares them, and whoever uses them leaves zeros."""

import itertools

import pytest
import torch
from test_kernel_quant_matmul import BASE, check_exact, exact
from torch import Tensor

from fastllm.kernels.quant_config import config
from fastllm.kernels.tickets import SLAB, Tickets, take_tickets


def test_tickets_are_not_shared() -> None:
    tickets = Tickets(torch.device("cpu"))
    assert tickets.take(8, stream=0, capturing=True) is None  # nothing to give before a launch outside a capture
    first, other = tickets.take(8, 0, False), tickets.take(8, 1, False)
    graphs = [tickets.take(100, 0, True) for _ in range(3)]
    assert tickets.take(8, 0, False) is first and first.shape == (SLAB,)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (first, other, *graphs))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert not any(t.any() for t in (first, other, *graphs))


def test_tickets_do_not_run_out() -> None:
    tickets = Tickets(torch.device("cpu"))
    tickets.take(1, 0, False)
    while tickets.take(SLAB, 0, True) is not None:
        pass
    assert tickets.take(1, 0, False) is not None
    assert tickets.take(SLAB, 0, True) is not None  # a launch outside has filled up
    assert take_tickets(SLAB + 1, torch.device("cpu")).shape == (SLAB + 1,)


def test_tickets_go_back_to_zero(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def take(tiles: int, device: torch.device) -> Tensor:
        given.append(take_tickets(tiles, device))
        return given[-1]

    monkeypatch.setattr("fastllm.kernels.quant_matmul.take_tickets", take)
    p = exact(BASE._replace(K=1024), device)
    assert config(*p.x.shape[:1], len(p.q), 1024).SPLIT_K > 1
    check_exact(p)
    assert len(given) == 1 and not given[0].any()
