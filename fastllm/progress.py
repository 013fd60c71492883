"""Sizes in words, and the progress of long work: a rich bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")


def size(count: float) -> str:
    """1234567 -> "1.23 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def track(items: Sequence[T], title: str, sizes: Sequence[int] | None = None, quiet: bool = False) -> Iterator[T]:
    """Yield `items`, showing on stderr how far it is. sizes: bytes of each, so that the speed can be told."""
    if quiet or not items:
        yield from items
    elif sys.stderr.isatty() and find_spec("rich"):
        yield from _rich(items, title, sizes)
    else:
        yield from _lines(items, title, sizes)


def _rich(items: Sequence[T], title: str, sizes: Sequence[int] | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import Progress

    weights = list(sizes or [1] * len(items))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=sum(weights))
        for item, weight in zip(items, weights, strict=True):
            yield item
            bar.advance(task, weight)


def _lines(items: Sequence[T], title: str, sizes: Sequence[int] | None, every: float = 5.0) -> Iterator[T]:
    weights = list(sizes or [1] * len(items))
    total, done, start = max(1, sum(weights)), 0, time.perf_counter()
    said = start
    for item, weight in zip(items, weights, strict=True):
        yield item
        done += weight
        now = time.perf_counter()
        if now - said >= every:
            said = now
            speed = f", {done / 1e6 / (now - start):.0f} MB/s" if sizes else ""
            left = (now - start) / done * (total - done) if done else 0
            sys.stderr.write(f"{title}: {done / total:.0%}{speed}, {left:.0f} s left\n")
            sys.stderr.flush()
