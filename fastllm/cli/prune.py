"""Remove layers, neurons or heads from a model, and save the smaller dense one, which stock transformers loads."""

import argparse
import time
from pathlib import Path
from typing import Any

from . import common

HELP = "make a model smaller and dense: fewer layers, neurons or heads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory")
    which = "share of the layers to remove such as 0.25, their number, or which ones, such as 3,7"
    parser.add_argument("--layers", metavar="SHARE", help=which)
    parser.add_argument("--ffn", metavar="SHARE", type=float, help="share of the feed-forward neurons of each layer")
    parser.add_argument("--heads", metavar="SHARE", type=float, help="share of the attention heads of each layer")
    common.add_calibration(parser)
    parser.add_argument(
        "--multiple", type=int, default=128, metavar="N", help="of neurons left (default: %(default)s)"
    )
    parser.add_argument("--no-repair", action="store_true", help="leave the weights that stay as they are")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..compress import prune

    common.check_calibration(args)
    start = time.perf_counter()
    report = prune(
        common.source(args),
        out=args.out,
        layers=layers(args.layers),
        ffn=args.ffn,
        heads=args.heads,
        calib=args.calib,
        samples=args.samples,
        length=args.length,
        multiple=args.multiple,
        repair=not args.no_repair,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        device=common.device(args),
    )
    print(report)
    told = common.saved(args.out, time.perf_counter() - start)
    return {"model": args.model, "report": report.to_dict(), **told}


def layers(given: str | None) -> float | int | list[int] | None:
    """`--layers`: a share has a point, a number has none, and numbers of layers have commas."""
    if given is None:
        return None
    try:
        if "," in given:
            return [int(number) for number in given.split(",") if number.strip()]
        return float(given) if "." in given else int(given)
    except ValueError as error:
        raise ValueError(
            f"--layers {given}: give a share such as 0.25, a number such as 2, or some such as 3,7"
        ) from error
