"""Generate text, printing tokens as they come, and tell the speed."""

import argparse
from dataclasses import asdict
from typing import Any

from . import common

HELP = "generate text with a model, optimized on the way"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_weights(parser, None, "`none` leaves the model as it is; default: int4, if it is not quantized yet")
    common.add_kv_cache(parser)
    parser.add_argument("--compile", action="store_true", help="decode by torch.compile, which takes a while at first")
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--compare", action="store_true", help="run the model as it is first")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    if args.new_tokens < 1:
        raise ValueError(f"--new-tokens {args.new_tokens}: at least 1 is needed")
    model, tokenizer = common.load(args)
    quantized = common.is_quantized(model)
    if args.compare and (quantized or args.weights == "none"):
        raise ValueError("--compare needs a model that is not quantized yet, and --weights to quantize it")
    if quantized and args.weights not in (None, "none"):
        raise ValueError(f"{args.model} is quantized already; leave --weights out, or give the dense checkpoint")
    weights = None if quantized or args.weights == "none" else args.weights or "int4"
    if weights is None:
        common.refuse_options(args)
        if not quantized and (args.kv_cache or args.compile):
            raise ValueError("--kv-cache and --compile need --weights, or a model that is quantized")
    ids = common.encode(tokenizer, args.prompt)
    result: dict[str, Any] = {"model": args.model, "prompt": args.prompt, "prompt_tokens": ids.shape[1], "runs": {}}
    if args.compare:
        result["runs"]["dense"] = _run("dense", model, tokenizer, ids, args.new_tokens)
    if weights is not None:
        report = common.optimize(model, args, weights, prompt=ids)
        result["report"] = report.to_dict()
    label = weights or ("quantized" if quantized else "dense")
    result["runs"][label] = _run(label, model, tokenizer, ids, args.new_tokens)
    if weights is not None:
        print(f"accuracy against the dense model: {report.accuracy}")
    if args.compare and (before := result["runs"]["dense"]["tok_s"]) and (after := result["runs"][label]["tok_s"]):
        print(f"{label} / dense: {after / before:.2f} times the tokens per second, one run each, not alternating")
    return result


def _run(label: str, model: Any, tokenizer: Any, ids: Any, new_tokens: int) -> dict[str, Any]:
    """Generate once; print the text and a line of figures; return them."""
    from ..diagnose.speed import bytes_per_token
    from .stream import generate

    print(f"[{label}] {tokenizer.decode(ids[0], skip_special_tokens=True)}", end="", flush=True)
    done, size = generate(model, tokenizer, ids, new_tokens), bytes_per_token(model)
    text = tokenizer.decode(done.tokens, skip_special_tokens=True)
    figures = {**asdict(done), "text": text, "bytes_per_token": size}
    figures["gb_s"] = done.tok_s * size / 1e9 if done.tok_s else None
    speed = f"{done.tok_s:.1f} tok/s, {figures['gb_s']:.2f} GB/s of weights" if done.tok_s else "too short to time"
    print(f"[{label}] {len(done.tokens)} tokens, {speed}; the first after {done.first_s:.2f} s\n")
    return figures
