"""Stages, each a process with a time of its own: one that fails or hangs does not keep the next from running."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

LEAST = 8.0  # seconds below which a stage is not begun
ASKED = 6.0  # seconds to end after being asked to


class Stage(NamedTuple):
    """seconds: its share of the time; None: whatever is left when its turn comes. The command may name {seconds}.

    more: whether it gets the other environment, see `run_all`.
    """

    name: str
    command: Sequence[str]
    seconds: float | None
    more: bool = False


class Result(NamedTuple):
    name: str
    state: str  # "ok", "failed (...)", "stopped (...)" or "not begun (...)"
    seconds: float
    output: str

    @property
    def ok(self) -> bool:
        return self.state == "ok"


def run(stage: Stage, left: float, log: BinaryIO, env: dict[str, str], clock: Callable[[], float]) -> Result:
    """Run one stage for at most its share and at most `left` seconds; its output goes to `log` too."""
    allowed = left if stage.seconds is None else min(stage.seconds, left)
    if allowed < LEAST:
        return Result(stage.name, f"not begun ({allowed:.0f} s are too little)", 0.0, "")
    # what a stage may spend is a little less than what it is given, so that it can finish by itself
    command = [part.replace("{seconds}", f"{max(1.0, 0.8 * allowed - 5):.0f}") for part in stage.command]
    start = clock()
    log.write(f"\n=== {stage.name}: {' '.join(command)}\n".encode())
    log.flush()
    begin = log.tell()
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=env, process_group=0, preexec_fn=_listen
    )
    try:
        status = process.wait(timeout=allowed)
        state = "ok" if status == 0 else f"failed (exit status {status})"
    except subprocess.TimeoutExpired:
        end(process)
        state = f"stopped (over {allowed:.0f} s)"
    log.seek(begin)
    output = log.read().decode(errors="replace")
    return Result(stage.name, state, clock() - start, output)


def _listen() -> None:
    """A shell has what it runs in the background ignore interrupts, and children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen) -> None:
    """End a stage and the processes that it started, a group of their own: first by asking, as pytest then reports."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):  # ended by itself; does not want to
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=ASKED)
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(
    stages: Sequence[Stage],
    seconds: float,
    log: Path,
    env: dict[str, str],
    more: dict[str, str],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """Every stage in turn within `seconds`. What an early one leaves over goes to those without a share.

    env, more: the environments, the latter for stages that ask for it.
    """
    start, found = clock(), []
    with log.open("a+b") as file:
        for stage in stages:
            result = run(stage, seconds - (clock() - start), file, more if stage.more else env, clock)
            print(f"{result.name}: {result.state}, {result.seconds:.0f} s", flush=True)
            found.append(result)
    return found


def table(results: Sequence[Result]) -> str:
    width = max(len(result.name) for result in results)
    return "\n".join(f"{r.name:{width}}  {r.seconds:5.0f} s  {r.state}" for r in results)


def tails(results: Sequence[Result], characters: int) -> str:
    """The ends of what the stages that are not ok printed, within so many characters together."""
    bad = [result for result in results if not result.ok and result.output.strip()]
    each = characters // max(1, len(bad))
    return "\n".join(f"--- {result.name}: {result.state}\n{result.output.strip()[-each:]}" for result in bad)
