"""`quantize_checkpoint`: from a dense checkpoint to a quantized one, with one block in memory at a time."""

import os
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..checkpoints import SaveHook
from ..checkpoints.folder import refuse_out
from ..checkpoints.loading import without_bars
from ..checkpoints.mapped import Mapped, load_mapped
from ..patch.accuracy import agreement
from ..patch.apply import Make, Patch, put_in_place
from ..patch.plan import Decision
from ..patch.report import Report, memory
from ..patch.speedups import Speedups
from ..probe import refuse_nan
from .blocks import Blocks
from .task import Ask
from .work import VERSION, Work, digest

SHARD = 1 << 28  # bytes of a file of the result, unless one tensor has more: so many are in memory twice


def quantize_checkpoint(path: Path, to: str | PathLike[str] | None, dtype: torch.dtype | None, ask: Ask) -> Report:
    """Quantize the checkpoint `path`, a folder or a GGUF file, to the folder `to`.

    What is done so far lies in a folder beside it, named <to>.unfinished, with which the same call goes on. Raises
    ValueError if `to` is not given or not empty, and if that folder is of other work, or another process is at it.
    """
    if ask.goal is not None:
        raise ValueError(f"max_loss measures a model in memory: fastllm.load({str(path)!r}) first")
    if to is None:
        raise ValueError(f"where should the quantized {path} go? quantize(path, out=folder)")
    out = Path(to)
    refuse_out(out, path)
    unfinished = out.with_name(f"{out.name}.unfinished")
    model, tokenizer, source = open_checkpoint(path, dtype)
    found = ask.of(model, tokenizer)
    report = Report(model, found.plan, keep=False)
    patch = Patch(report, Speedups(model, False, False, None, False))
    blocks = Blocks(model, found.data)
    before = blocks.outcome()
    formats = {d.name: d.format.name for d in found.plan.chosen if d.format is not None}
    settings: dict[str, Any] = {"method": type(found.solver).__name__, "formats": formats, "data": digest(found.data)}
    settings |= {"kv_cache": ask.kv_cache, "dtype": str(model.dtype), "version": VERSION}
    work = Work(unfinished, settings | {"files": _files(path)}, source)

    def put(decision: Decision, make: Make) -> None:
        put_in_place(model, decision, patch, make)
        patch.originals.clear()  # there is no way back, and they would stay in memory
        found.solver.changes.clear()

    found.carry_out(put, blocks, work)
    SaveHook.attach(model, found.cache.complete())
    after = blocks.outcome(blocks.hidden[0])
    refuse_nan(after)
    report.accuracy = agreement(before, after, report.has_vocabulary, True)
    report.memory_after = memory(model)
    del before, after
    result = unfinished / "result"
    with without_bars(found.quiet):
        model.save_pretrained(result, max_shard_size=SHARD)
    if (ask.tokenizer or tokenizer) is not None:
        (ask.tokenizer or tokenizer).save_pretrained(result)
    bring_along(path, result)
    os.rename(result, out)
    report.saved = str(out)
    shutil.rmtree(unfinished)
    return report


def open_checkpoint(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any, Mapped | None]:
    """(model, its tokenizer or None, what its weights are read from or None if they are in memory)."""
    if path.suffix == ".gguf":
        from ..checkpoints.gguf import load_gguf

        return *load_gguf(path, dtype or torch.bfloat16), None
    model, source = load_mapped(path, dtype)
    there = (path / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(path) if there else None, source


def bring_along(path: Path, result: Path) -> None:
    """Copy what else lies beside a checkpoint, such as the settings of an image processor."""
    others = [
        f for f in (path.iterdir() if path.is_dir() else ()) if f.suffix in (".json", ".jinja", ".txt", ".model")
    ]
    for file in others:
        if not (result / file.name).exists() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, result / file.name)


def _files(path: Path) -> dict[str, list[int]]:
    """The files that a result depends on, with their sizes and times of change."""
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in (".safetensors", ".json", ".bin")]
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}
