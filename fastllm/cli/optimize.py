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
    from ..checkpoints.folder import refuse_out

    if not args.dry_run:
        if args.out is None:
            raise ValueError("name a directory to write to, or pass --dry-run")
        refuse_out(args.out, Path(args.model))
    model, tokenizer = common.load(args)
    start = time.perf_counter()
    report = common.optimize(model, args, args.weights, dry_run=args.dry_run)
    seconds = time.perf_counter() - start
    print(report)
    result = {"model": args.model, "report": report.to_dict()}
    return result if args.dry_run else {**result, **common.save(model, tokenizer, args.out, seconds)}
