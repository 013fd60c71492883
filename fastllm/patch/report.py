"""The one-screen report of `optimize`."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import size
from .accuracy import Accuracy
from .plan import Decision, Plan


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, those of patched layers included."""
    for module in model.modules():
        yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def memory(*models: nn.Module) -> int:
    """Bytes of the tensors of all of them, shared storage counted once."""
    sizes: dict[int, int] = {}
    for t in (t for model in models for t in tensors(model)):
        if t.is_mkldnn:  # oneDNN's blocks have no storage to ask
            sizes[id(t)] = t.numel() * t.element_size()
        elif not t.is_meta:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(sizes.values())


class Report:
    """What `optimize` did or, after a dry run, would do. `print(report)` shows one screen; `to_dict()` is for JSON."""

    def __init__(self, model: Any, plan: Plan, keep: bool):
        device = next(model.parameters()).device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        self.title = f"{type(model).__name__} on {name}"
        self.plan, self.keep = plan, keep
        self.has_vocabulary = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None
        self.memory_before, self.memory_after, self.memory_kept = memory(model), 0, 0
        self.accuracy: Accuracy | None = None
        self.budget: Any = None  # of `fastllm.quantize(max_loss=...)`: what was chosen and measured
        self.what = "quantized"  # what the weights that were chosen are
        self.notes: list[str] = []  # further lines
        self.saved = ""  # the folder, if it was from a checkpoint to another and no model stayed
        self.speedups: Any = None  # attention, fused modules and the decoding loop (`fastllm.patch.speedups`)

    @property
    def dry_run(self) -> bool:
        return self.accuracy is None

    @property
    def coverage(self) -> float:
        return self.plan.coverage

    @property
    def bytes_per_token(self) -> int:
        return self.plan.after

    def rows(self) -> dict[str, list[Decision]]:
        """Decisions by part of the model, the largest reads first; parts that read next to nothing are merged."""
        parts: dict[str, list[Decision]] = {}
        for d in self.plan.decisions:
            small = d.format is None and not d.reason and d.before < 0.005 * self.plan.before
            parts.setdefault("other" if small else d.part, []).append(d)
        return dict(sorted(parts.items(), key=lambda item: -sum(d.before for d in item[1])))

    def __str__(self) -> str:
        done = "would read" if self.dry_run else "reads"
        lines = [f"fastllm: {self.title}{' (dry run: nothing changed)' if self.dry_run else ''}"]
        lines.append(f"  {'part':36} {'layers':>6} {'before':>9} {'after':>9}  kernel")
        for part, found in self.rows().items():
            runs = sorted({d.runs for d in found if d.runs}) or ["left as it is"]
            before, after = (sum(getattr(d, side) for d in found) for side in ("before", "after"))
            count = sum(d.layers for d in found)
            lines.append(f"  {part:36} {count:6} {size(before):>9} {size(after):>9}  {'; '.join(runs)}")
        change = f" -> {size(self.plan.after)} per token; {self.coverage:.1%} of it {self.what}"
        lines.append(f"  {done} {size(self.plan.before)}{change if self.plan.chosen else ' per token'}")
        for reason, found in self._skipped().items():
            names = found[0].name if len(found) == 1 else f"{found[0].name} and {len(found) - 1} more"
            lines.append(f"  skipped {names} ({size(sum(d.before for d in found))}): {reason}")
        if not self.dry_run:
            lines += [] if self.budget is None else [f"  budget: {self.budget.summary()}"]
            lines += [f"  {line}" for line in (*self.notes, *self.speedups.lines())]
            kept = f" + {size(self.memory_kept)} of originals (keep=False frees them)" if self.keep else ""
            lines.append(f"  memory {size(self.memory_before)} -> {size(self.memory_after)}{kept}")
            lines.append(f"  check: {self.accuracy}")
            undo = "fastllm.restore(model)" if self.keep else "reload the model (keep=False)"
            done = f"undo: {undo}; save: model.save_pretrained(directory)"
            lines.append(f"  saved: {self.saved}" if self.saved else f"  {done}")
        return "\n".join(lines)

    __repr__ = __str__

    def _skipped(self) -> dict[str, list[Decision]]:
        found: dict[str, list[Decision]] = {}
        for d in self.plan.skipped:
            found.setdefault(f"{d.reason}; {d.remedy}" if d.remedy else d.reason, []).append(d)
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it, with plain values."""
        decisions = [{**asdict(d), "format": d.format.name if d.format else None} for d in self.plan.decisions]
        return {
            "title": self.title,
            "dry_run": self.dry_run,
            "bytes_per_token_before": self.plan.before,
            "bytes_per_token": self.plan.after,
            "coverage": self.coverage,
            "memory_before": self.memory_before,
            "memory_after": self.memory_after,
            "originals_kept": self.keep,
            "memory_of_originals": self.memory_kept,
            "accuracy": asdict(self.accuracy) if self.accuracy else None,
            "decisions": decisions,
            **({"notes": self.notes} if self.notes else {}),
            **({} if self.budget is None else {"budget": self.budget.to_dict()}),
            **self.speedups.to_dict(),
        }
