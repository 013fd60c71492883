"""Quantize a model and save it in a public format: transformers loads it without fastllm (with compressed-tensors)."""

import argparse
import time
from pathlib import Path
from typing import Any

from . import common

HELP = "quantize a model and save it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="new directory; not needed for --dry-run")
    common.add_weights(parser, "int4", "default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be done")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    if not args.dry_run:
        _refuse_out(args.out, args.model)
    model, tokenizer = common.load(args)
    start = time.perf_counter()
    report = common.optimize(model, args, args.weights, dry_run=args.dry_run)
    seconds = time.perf_counter() - start
    print(report)
    result = {"model": args.model, "report": report.to_dict()}
    if args.dry_run:
        return result
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"saved {size / 1e6:.0f} MB of weights to {args.out}, after {seconds:.1f} s of quantizing")
    return {**result, "out": str(args.out), "optimize_s": seconds, "saved_bytes": size}


def _refuse_out(out: Path | None, model: str) -> None:
    """Raise ValueError where saving would fail or overwrite something, before minutes are spent."""
    if out is None:
        raise ValueError("name a directory to write to, or pass --dry-run")
    if out.resolve() == Path(model).resolve():
        raise ValueError(f"{out} is the model itself: it would be overwritten; name another directory")
    if out.is_file():
        raise ValueError(f"{out} is a file; name a directory")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new directory")
