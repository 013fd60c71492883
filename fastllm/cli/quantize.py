"""Quantize a model with a look at what goes into its layers, and save it in a public format."""

import argparse
import time
from pathlib import Path
from typing import Any

from . import common

HELP = "quantize a model with calibration data, and save it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory")
    common.add_weights(parser, None, "default: int4, or int8-a8 for smoothquant", common.WITH_DATA)
    parser.add_argument("--calib", metavar="FILE", type=Path, help="a text; default: one that comes along")
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of each (default: %(default)s)")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..checkpoints.folder import refuse_out
    from ..compress import quantize

    if args.calib is not None and not args.calib.is_file():
        raise FileNotFoundError(f"--calib {args.calib}: there is no such file")
    if args.method is None:
        rounds = args.activations == "int8" or (args.weights or "").endswith("-a8")
        args.method = "smoothquant" if rounds else "gptq"
    start = time.perf_counter()
    data = {"calib": args.calib, "samples": args.samples, "length": args.length}
    settings = data | common.chosen(args)
    if common.device(args).type == "cpu":
        dtype = getattr(torch, args.dtype) if args.dtype else None
        report = quantize(common.source(args), args.weights, out=args.out, dtype=dtype, **settings)
        print(report)
        return {"model": args.model, "report": report.to_dict(), **common.saved(args.out, time.perf_counter() - start)}
    refuse_out(args.out, Path(args.model))
    model, tokenizer = common.load(args)
    report = quantize(model, args.weights, tokenizer=tokenizer, **settings)
    seconds = time.perf_counter() - start
    print(report)
    return {"model": args.model, "report": report.to_dict(), **common.save(model, tokenizer, args.out, seconds)}
