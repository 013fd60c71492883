"""What several commands share: their options, loading a model with its tokenizer, optimizing it as the options say."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..patch import Report

DTYPES = ("bfloat16", "float16", "float32")
FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]  # of a model on the hub; not its other copies


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a directory, a .gguf file, or OWNER/NAME on the Hugging Face hub"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the checkpoint's (GGUF: bfloat16)")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the GPU if there is one, else the CPU")


Methods = tuple[tuple[str, ...], str]  # names, and what help says of them
METHODS = ("rtn", "hqq"), "how to round; default: hqq for int4, rtn for int8"
WITH_DATA = ("gptq", "awq", "smoothquant"), "how to round; default: smoothquant for activations of int8, else gptq"


def add_weights(
    parser: argparse.ArgumentParser,
    default: str | None,
    otherwise: str,
    methods: Methods = METHODS,
) -> None:
    parser.add_argument(
        "--weights", default=default, metavar="FORMAT", help=f"int4, int8, fp8, int4-g64, ...; {otherwise}"
    )
    parser.add_argument(
        "--activations",
        choices=("int8", "fp8"),
        help="round the layers' inputs as well; goes with --weights of the same name; default: no, but fp8 has it",
    )
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="weights per scale, in place of the format's; -1: one per channel"
    )
    parser.add_argument("--method", choices=methods[0], help=methods[1])
    parser.add_argument("--lm-head", metavar="FORMAT", help="format of the output head, or `none`; default: int8")
    add_choice(parser)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Which modules."""
    only = "only modules named so, such as '*.mlp.*' (may be repeated)"
    parser.add_argument("--include", action="append", metavar="PATTERN", help=only)
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="not modules named so (may be repeated)")
    least = "least share of the bytes that a token reads to make smaller (default: %(default)s)"
    parser.add_argument("--min-coverage", type=float, default=0.5, metavar="SHARE", help=least)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calib", metavar="FILE", type=Path, help="a text; default: one that comes along")
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of each (default: %(default)s)")


def check_calibration(args: argparse.Namespace) -> None:
    """Raise FileNotFoundError for a --calib that is not there."""
    if args.calib is not None and not args.calib.is_file():
        raise FileNotFoundError(f"--calib {args.calib}: there is no such file")


def add_kv_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kv-cache", choices=("int8", "int4"), help="keep keys and values so; default: as they come")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of `args.model`, in evaluation mode on `args.device`. Quantized checkpoints stay packed.

    Raises OSError or ValueError for what is not a model, ValueError for a device that is not there.
    """
    import torch
    from transformers.utils import logging

    where = device(args)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.model.endswith(".gguf"):
        from ..checkpoints.gguf import load_gguf

        model, tokenizer = load_gguf(args.model, dtype or torch.bfloat16)
    else:
        from transformers import AutoTokenizer

        from ..patch import load as load_checkpoint

        folder = source(args)
        tokenizer = AutoTokenizer.from_pretrained(folder)  # first: it fails at once
        given: dict[str, Any] = {"kv_cache": getattr(args, "kv_cache", None), "decode": decode(args)}
        model = load_checkpoint(folder, dtype=dtype, **given)
    return model.to(where).eval(), tokenizer


def decode(args: argparse.Namespace) -> bool | str:
    """How to decode, in the terms of `fastllm.optimize`."""
    return "compile" if getattr(args, "compile", False) else True


def source(args: argparse.Namespace) -> Path:
    """The directory, or .gguf file, `args.model`, or that of the hub's model of this name in the cache, where it is
    brought if need be.

    A path that is not there is not looked up on the hub: the complaint would be about a name.
    """
    name = args.model
    looks_like_path = name.startswith((".", "~", os.sep)) or name.count("/") != 1
    if Path(name).is_dir() or name.endswith(".gguf") or looks_like_path:
        if not Path(name).exists():
            raise FileNotFoundError(f"there is no directory {name} (a model on the hub is given as OWNER/NAME)")
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=FILES))


def device(args: argparse.Namespace) -> Any:
    """The torch device of `args.device`; ValueError for one that is not there."""
    import torch

    name = args.device
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {error}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return found


def optimize(model: Any, args: argparse.Namespace, weights: str, **more: Any) -> "Report":
    """`fastllm.optimize` with the options of `add_weights`; the originals are freed."""
    from ..patch import optimize as patch

    return patch(
        model,
        weights,
        kv_cache=getattr(args, "kv_cache", None),
        decode=decode(args),
        **chosen(args),
        **more,
    )


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_weights` but --weights, as arguments of `fastllm.optimize` and `fastllm.quantize`."""
    return {
        "activations": args.activations,
        "group_size": args.group_size,
        "method": args.method,
        "lm_head": False if args.lm_head == "none" else args.lm_head,
        "include": args.include or "*",
        "exclude": args.exclude or (),
        "min_coverage": args.min_coverage,
        "keep": False,
    }


def save(model: Any, tokenizer: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Save a model that took so long to make; tell it, and return the figures."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return saved(out, seconds)


def saved(out: Path, seconds: float) -> dict[str, Any]:
    """Tell of a model that took so long to make, and lies in `out`; return the figures."""
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"saved {size / 1e6:.0f} MB of weights to {out}, after {seconds:.1f} s")
    return {"out": str(out), "optimize_s": seconds, "saved_bytes": size}


def refuse_options(args: argparse.Namespace) -> None:
    """Raise ValueError if an option of `add_weights` is given where nothing is to be quantized."""
    names = ("activations", "group_size", "method", "lm_head", "include", "exclude")
    given = [name for name in names if getattr(args, name)]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} needs --weights, and a model that is not quantized yet")


def is_quantized(model: Any) -> bool:
    from ..nn import PackedLinear, QuantExperts

    return any(isinstance(module, PackedLinear | QuantExperts) for module in model.modules())


def encode(tokenizer: Any, text: str) -> "Tensor":
    """Token ids [1, T] of `text`, with the special tokens that the tokenizer puts around it."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise ValueError("the prompt has no tokens")
    return ids
