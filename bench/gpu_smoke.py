"""Whole models on a GPU: patched, run, compared with dense ones that have the weights that the packed ones stand for.

python bench/gpu_smoke.py        (`--device cpu` tries the script itself)
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch
from measure import error_of

import fastllm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
tiny = importlib.import_module("tiny")  # the tests' models, without their conftest

# bfloat16 arithmetic in another order, through all layers: measured on a CPU at 1 % for the tiny model
BOUND = 3e-2
WIDE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 4096, "initializer_range": 0.02,
}  # fmt: skip
CASES = {
    "tiny llama, int4": ("llama", {}, "int4"),
    "tiny llama, int8": ("llama", {}, "int8"),
    # a token goes to all experts, so that rounding cannot change its route
    "tiny mixtral, int4-g64": ("mixtral", {"num_experts_per_tok": 4}, "int4-g64"),
    "llama as wide as 8B, int4": ("llama", WIDE, "int4"),
}


def check(family: str, settings: dict, weights: str, device: str) -> list[str]:
    """What is wrong with a model of `family` once its weights are packed; empty if nothing."""
    settings = settings | {"eos_token_id": None}  # every answer is as long as asked for
    packed = tiny.build(family, **settings).to(device)
    fastllm.optimize(packed, weights=weights, keep=False, quiet=True)
    dense = tiny.dense_twin(packed, tiny.build(family, **settings).to(device))
    found = []
    for length in (1, 9, 300):
        ids = torch.randint(0, packed.config.vocab_size, (2, length), device=device)
        with torch.no_grad():
            error = error_of(packed(ids).logits.float(), dense(ids).logits.float())
        print(f"    {length:4} tokens: relative error of the logits {error:.1e}")
        if not error <= BOUND:
            found.append(f"{length} tokens: relative error {error:.1e}, allowed {BOUND:.0e}")
    ids = torch.randint(0, packed.config.vocab_size, (1, 8), device=device)
    made = packed.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    again = packed.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    wanted = dense.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    same = int((made == wanted)[0, 8:].long().cumprod(0).sum())  # where two tokens are as likely, roundings decide
    print(f"    generated {made.shape[1] - 8} tokens; the first {same} are those of the dense model")
    found += loop_faults(packed, device)
    if made.shape != wanted.shape or not torch.equal(made, again):
        found.append(f"generate gave {list(made.shape)}, want {list(wanted.shape)}, or not the same twice")
    return found


def loop_faults(model: torch.nn.Module, device: str) -> list[str]:
    """What is wrong with how it decodes: on a GPU by replaying a graph, without falling back to anything."""
    loop = model._fastllm.speedups.loop
    if loop is None or loop.reasons:
        return [f"generate: {model._fastllm.report}"]
    kept = loop.graphs.kept
    print(f"    {len(kept)} graphs")
    return [] if kept or device == "cpu" else ["generate did not use a CUDA graph"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("whole models are checked on a CUDA GPU, and torch sees none here; --device cpu tries the script")
    wrong = []
    for name, case in CASES.items():
        if args.only not in name:
            continue
        start = time.perf_counter()
        found = check(*case, args.device)
        wrong += [f"{name}: {why}" for why in found]
        print(f"{name}: {'wrong' if found else 'ok'}, {time.perf_counter() - start:.1f} s", flush=True)
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
