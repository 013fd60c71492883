"""Perplexity of a model, as it is or quantized, on a text."""

import argparse
from pathlib import Path
from typing import Any

from . import common

HELP = "perplexity of a model on a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_weights(parser, None, "default: the model as it is")
    common.add_kv_cache(parser)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="default: the beginning of WikiText-2, validation set"
    )
    parser.add_argument("--windows", type=int, metavar="N", help="read only the first N windows; default: all")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens in each (default: %(default)s)")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from ..data import sample_text
    from ..diagnose import perplexity

    weights = None if args.weights == "none" else args.weights
    if weights is None:
        common.refuse_options(args)
    text = args.text.read_text(encoding="utf-8") if args.text else sample_text()
    model, tokenizer = common.load(args)
    result: dict[str, Any] = {"model": args.model, "weights": weights, "activations": args.activations}
    if weights is not None:
        report = common.optimize(model, args, weights)
        result["report"] = report.to_dict()
        print(report)
    found = perplexity(model, text, tokenizer, window=args.window, windows=args.windows, kv_cache=args.kv_cache)
    name = str(args.text) if args.text else "WikiText-2 sample"
    protocol = describe(name, found)
    print(f"perplexity {found.value:.3f} ({found.nll:.4f} nats per token)\nprotocol: {protocol}")
    return {**result, "perplexity": found.value, "nll": found.nll, "tokens": found.tokens, "protocol": protocol}


def describe(name: str, found: Any) -> str:
    """The protocol of a `Perplexity`, in a sentence."""
    return (
        f"{name}, {found.windows} windows of {found.window} tokens without overlap, the first of each replaced by "
        f"the beginning-of-sequence token where there is one; {found.tokens} tokens scored by a float32 log-softmax"
    )
