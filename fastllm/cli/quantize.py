"""Quantize a model with a look at what goes into its layers, and save it in a public format."""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import common

HELP = "quantize a model with calibration data, and save it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory")
    otherwise = "default: int4, or int8-a8 for smoothquant; with --max-loss several, such as int8,int4-g64"
    common.add_weights(parser, None, otherwise, common.WITH_DATA)
    common.add_calibration(parser)
    less = "make keys that lose less in such a cache, or find the scales that servers want for fp8"
    parser.add_argument("--kv-cache", choices=("int8", "int4", "fp8"), help=less)
    budget = "choose each layer's format so that perplexity grows by at most this share, such as 0.01"
    parser.add_argument("--max-loss", type=float, metavar="SHARE", help=budget)
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="with --max-loss: bytes against perplexity, PNG or SVG"
    )


def execute(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..checkpoints.folder import refuse_out
    from ..compress import quantize

    common.check_calibration(args)
    if args.plot is not None and args.max_loss is None:
        raise ValueError("--plot shows what --max-loss chose among: give both")
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        raise FileNotFoundError(f"--plot {args.plot}: there is no directory {args.plot.parent}")
    if args.plot is not None and not find_spec("matplotlib"):
        raise ImportError('--plot needs matplotlib: pip install -e ".[demo]"')
    if args.method is None:
        rounds = args.activations == "int8" or (args.weights or "").endswith("-a8")
        args.method = "smoothquant" if rounds else "gptq"
    start = time.perf_counter()
    data = {"calib": args.calib, "samples": args.samples, "length": args.length, "kv_cache": args.kv_cache}
    settings = data | common.chosen(args)
    if common.device(args).type == "cpu" and args.max_loss is None:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        report = quantize(common.source(args), args.weights, out=args.out, dtype=dtype, **settings)
        print(report)
        return {"model": args.model, "report": report.to_dict(), **common.saved(args.out, time.perf_counter() - start)}
    refuse_out(args.out, Path(args.model))
    args.kv_cache = None  # it is what is to be found, not used
    model, tokenizer = common.load(args)
    weights = args.weights if args.max_loss is None or not args.weights else args.weights.split(",")
    report = quantize(model, weights, tokenizer=tokenizer, max_loss=args.max_loss, **settings)
    seconds = time.perf_counter() - start
    print(report if report.budget is None else f"{report}\n{report.budget}")
    saved = common.save(model, tokenizer, args.out, seconds)
    if args.plot is not None:
        report.budget.draw(args.plot)
    return {"model": args.model, "report": report.to_dict(), **saved}
