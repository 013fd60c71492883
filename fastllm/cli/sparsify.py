"""Make the layers of a model sparse, with a look at what goes into them, and save it for `fastllm.load`.

At equal bytes a quantized model is the better one; see "Sparsity" in the README first.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from . import common

HELP = "make a model's layers sparse, and save it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory")
    patterns = "16:32 or another k:32, 2:4, block64@0.7, or 0.5 (default: %(default)s)"
    parser.add_argument("--pattern", default="16:32", help=patterns)
    methods = ("sparsegpt", "wanda", "magnitude", "zeros")
    which = "which weights go; zeros: they have gone (default: %(default)s)"
    parser.add_argument("--method", choices=methods, default=methods[0], help=which)
    parser.add_argument("--values", metavar="FORMAT", help="int8 or int4-g128: what stays is rounded too")
    parser.add_argument("--ratios", choices=("uniform", "owl"), default="uniform", help="how many go in each block")
    parser.add_argument("--no-repair", action="store_true", help="leave the weights that stay as they are")
    parser.add_argument("--lm-head", metavar="FORMAT", help="format of the output head; default: as it is")
    common.add_choice(parser)
    common.add_calibration(parser)
    parser.add_argument("--dense", action="store_true", help="save a dense checkpoint, zeros and all, for everyone")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from ..checkpoints.folder import refuse_out
    from ..compress import sparsify
    from ..compress.patterns import parse_pattern
    from ..patch import to_dense

    common.check_calibration(args)
    pattern = parse_pattern(args.pattern, args.values)
    refuse_out(args.out, Path(args.model))
    start = time.perf_counter()
    model, tokenizer = common.load(args)
    report = sparsify(
        model,
        pattern,
        method=args.method,
        calib=args.calib,
        tokenizer=tokenizer,
        samples=args.samples,
        length=args.length,
        repair=not args.no_repair,
        ratios=args.ratios,
        lm_head=args.lm_head,
        include=args.include or "*",
        exclude=args.exclude or (),
        min_coverage=args.min_coverage,
        keep=False,
    )
    print(report)
    seconds = time.perf_counter() - start
    if args.dense:
        to_dense(model)
    return {"model": args.model, "report": report.to_dict(), **common.save(model, tokenizer, args.out, seconds)}
