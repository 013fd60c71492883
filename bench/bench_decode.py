"""decode_attention on this machine: caches in bfloat16, int8 and int4, against torch's attention over the same keys.

    python bench/bench_decode.py [--cases 32/8-d128-b1-2k,...] [--seconds 0.1] [--device cpu]

Runs on the GPU if there is one, else on the CPU. Writes bench/results/<device>/decode.json and .md. Caches are cold:
calls rotate over so many of them that each reads memory. On a GPU speed is given in bytes a second, of the cache, its
scales, queries and results, each once, and as a share of the bandwidth that this GPU was measured to have.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_quant_matmul import faults, said
from measure import Cuda, Runner, cold_bytes, copies, error_of, measure, ready
from results import RESULTS, about, device_name, smi, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastllm.kv_formats import KV_FORMATS
from fastllm.ops.decode_attention import decode_attention, definition

BASELINE = "SDPA"
BOUND = 0.02  # |error| / |reference|, Frobenius: bfloat16's roundings are a quarter of it
MOST_CHECKED = 1 << 30  # bytes of a cache whose result is compared with the definition, in float32


class Shape(NamedTuple):
    """B rows of L keys, for Hq query heads at Sq positions over Hkv heads of D numbers."""

    Hq: int
    Hkv: int
    D: int
    B: int
    L: int
    Sq: int = 1

    @property
    def name(self) -> str:
        length = f"{self.L // 1024}k" if self.L % 1024 == 0 else str(self.L)
        return f"{self.Hq}/{self.Hkv}-d{self.D}-b{self.B}-{length}" + (f"-q{self.Sq}" if self.Sq > 1 else "")


K = 1024
GPU_SHAPES = [Shape(32, 8, 128, 1, length) for length in (2 * K, 8 * K, 32 * K, 128 * K)]
GPU_SHAPES += [Shape(32, 8, 128, B, 4 * K) for B in (8, 12, 16, 17, 32, 33, 34, 64)]
GPU_SHAPES += [Shape(32, 2, 256, B, 8 * K) for B in (1, 32)] + [Shape(4, 1, 256, B, 4 * K) for B in (1, 64)]
GPU_SHAPES += [Shape(32, 8, 128, 8, 8 * K, Sq) for Sq in (2, 8, 16)] + [Shape(32, 8, 64, 32, 8 * K)]
CPU_SHAPES = [Shape(4, 1, 256, B, length) for B in (1, 8) for length in (512, 4 * K)] + [Shape(32, 8, 128, 1, 2 * K)]


class Cache(NamedTuple):
    """Keys and values of one format. format: None for bfloat16."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    format: str | None

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self[:4] if isinstance(t, Tensor))

    def copy(self) -> "Cache":
        return self._replace(**{n: t.clone() for n, t in self._asdict().items() if isinstance(t, Tensor)})


def cache_of(shape: Shape, format: str | None, device: str) -> Cache:
    """Made a head at a time: in float32 a large one would not fit."""
    made = []
    for _ in range(2):
        x = torch.randn(shape.B, shape.Hkv, shape.L, shape.D, dtype=torch.bfloat16, device=device)
        if format is None:
            made.append((x, None))
        else:
            parts = [KV_FORMATS[format].quantize(head) for head in x.unbind(1)]
            codes, scales = zip(*parts, strict=True)
            made.append((torch.stack(codes, 1), torch.stack(scales, 1)))
    (k, k_scale), (v, v_scale) = made
    return Cache(k, v, k_scale, v_scale, format)


def own(q: Tensor, kv_end: Tensor, cache: Cache) -> Tensor:
    return decode_attention(q, cache.k, cache.v, kv_end, **cache_options(cache))


def cache_options(cache: Cache) -> dict[str, Any]:
    return {"k_scale": cache.k_scale, "v_scale": cache.v_scale, "format": cache.format}


def sdpa(backend: str | None, q: Tensor, kv_end: Tensor, cache: Cache) -> Tensor:
    """torch's own, by the backend it chooses or by a named one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(q.shape[2], cache.k.shape[2]) if q.shape[2] > 1 else None
    call = partial(scaled_dot_product_attention, q, cache.k, cache.v, attn_mask=bias, enable_gqa=True)
    if backend is None:
        return call()
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return call()


def flex(compiled: Any, q: Tensor, kv_end: Tensor, cache: Cache) -> Tensor:
    if q.shape[2] > 1:
        raise ValueError("it is run for one new position only: more need a mask of blocks")
    return compiled(q, cache.k, cache.v, enable_gqa=True)


def candidates(device: str) -> dict[str, tuple[str | None, Callable[..., Tensor]]]:
    """Name -> the format of its cache, and the call; the baseline first."""
    found: dict[str, tuple[str | None, Callable[..., Tensor]]] = {BASELINE: (None, partial(sdpa, None))}
    found |= {"fastllm": (None, own), "fastllm int8": ("int8", own), "fastllm int4": ("int4", own)}
    if device == "cuda":
        from torch.nn.attention.flex_attention import flex_attention

        found |= {f"SDPA {n}": (None, partial(sdpa, f"{n}_ATTENTION")) for n in ("FLASH", "CUDNN")}
        found["FlexAttention"] = (None, partial(flex, torch.compile(flex_attention, dynamic=False)))
    return found


def runner(rotation: list[Callable[[], Tensor]], want: Tensor | None, gpu: Any) -> tuple[Any, float | None]:
    """What is to be timed, and the error of what it computes; None for no error if nobody looked."""
    if gpu is None:
        return rotation, error_of(rotation[0](), rotation[0]() if want is None else want)
    made = ready(rotation, gpu)
    y = made.replay()
    gpu.synchronize()
    return made, None if want is None else error_of(y, want)


def row(shape: Shape, seconds: float, device: str, gpu: Any, bandwidth: float) -> dict[str, Any]:
    """Everything that is known of a shape."""
    q = torch.randn(shape.B, shape.Sq, shape.Hq, shape.D, dtype=torch.bfloat16, device=device).transpose(1, 2)
    kv_end = torch.full((shape.B,), shape.L, dtype=torch.int32, device=device)
    runners: dict[str, Any] = {}
    sizes, errors, absent, wrong, caches = {}, {}, {}, {}, {}
    for name, (format, call) in candidates(device).items():
        try:
            if format not in caches:
                first = cache_of(shape, format, device)
                # all calls see the same keys, so that any of them can be compared
                caches[format] = [first] + [first.copy() for _ in range(copies(first.bytes, cold_bytes(device)) - 1)]
            rotation = [partial(call, q, kv_end, cache) for cache in caches[format]]
            one = caches[format][0]
            small = 2 * shape.B * shape.Hkv * shape.L * shape.D * 4 <= MOST_CHECKED
            want = definition(q, one.k, one.v, kv_end, **cache_options(one)) if small else None
            made, error = runner(rotation, want, gpu)
        except faults() as fault:
            absent[name] = [said(fault)]
            if gpu is not None:
                gpu.synchronize()
            continue
        if error is None or error <= BOUND:
            runners[name], errors[name] = made, error
            sizes[name] = one.bytes + 2 * q.nbytes
        else:
            wrong[name] = error
    if BASELINE not in runners:
        raise SystemExit(f"{BASELINE} itself failed on {shape.name}: {absent or wrong}")
    times = measure(runners, BASELINE, seconds, gpu)
    return {
        "case": shape.name, **shape._asdict(), "baseline": BASELINE, "bytes": sizes, "error": errors,
        "wrong": wrong, "absent": absent,
        "seconds": {name: t.median for name, t in times.items()},
        "p10": {name: t.p10 for name, t in times.items()},
        "p90": {name: t.p90 for name, t in times.items()},
        "samples": {name: t.samples for name, t in times.items()},
        "eager": {n: r.why for n, r in runners.items() if isinstance(r, Runner) and r.mode != "graph"},
        "share": {n: sizes[n] / t.median / bandwidth for n, t in times.items()} if bandwidth else {},
    }  # fmt: skip


def cell(row: dict[str, Any], name: str) -> str:
    if name not in row["seconds"]:
        return "wrong" if name in row["wrong"] else "-"
    seconds = row["seconds"][name]
    text = f"{seconds * 1e6:.1f} us, {row['seconds'][row['baseline']] / seconds:.2f}x"
    if name in row["share"]:
        text += f", {row['bytes'][name] / seconds / 1e9:.0f} GB/s, {100 * row['share'][name]:.0f} %"
    return text + (" (eager)" if name in row["eager"] else "")


def markdown(rows: list[dict[str, Any]], head: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    lines = [["case", *names], ["---"] * (len(names) + 1)]
    lines += [[row["case"], *(cell(row, name) for name in names)] for row in rows]
    text = f"# decode_attention on {head['device']}\n\nMedian time, speed-up over {BASELINE} in bfloat16"
    text += ", bytes a second, share of the measured bandwidth.\n\n" if head.get("bandwidth") else ".\n\n"
    text += "Heads of q/kv, their size, rows, keys of a row, new positions. Caches cold, calls in turns.\n\n"
    return text + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=auto, help="default here: %(default)s")
    parser.add_argument("--cases", help="names, such as 32/8-d128-b1-2k, or parts of them; default: all")
    parser.add_argument("--seconds", type=float, help="per candidate and case (default: 0.3; 0.02 on a GPU)")
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<device>)")
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    args.seconds = args.seconds if args.seconds is not None else 0.02 if gpu else 0.3
    args.out = args.out or RESULTS / device_name(args.device)
    shapes = GPU_SHAPES if gpu else CPU_SHAPES
    words = args.cases.split(",") if args.cases else [""]
    args.shapes = [shape for shape in shapes if any(word in shape.name for word in words)]
    if not args.shapes:
        parser.error(f"no case has {args.cases} in its name: {', '.join(shape.name for shape in shapes)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    gpu = Cuda() if args.device == "cuda" else None
    head: dict[str, Any] = about(args.device)
    if gpu is not None:
        import ceilings

        head |= {"ceilings": ceilings.ceilings(gpu), "clocks": [smi()]}
        head["bandwidth"] = head["ceilings"]["bandwidth"]
    rows = []
    with torch.inference_mode():
        for shape in args.shapes:
            rows.append(row(shape, args.seconds, args.device, gpu, head.get("bandwidth", 0.0)))
            print(shape.name, *(f"{name}: {cell(rows[-1], name)}" for name in rows[-1]["seconds"]), sep="\n   ")
            for kind in ("absent", "wrong"):
                if rows[-1][kind]:
                    print(f"   {kind}: {json.dumps(rows[-1][kind])}")
            path = write(args.out / "decode.json", head, rows)  # at once: a crash takes nothing along
            path.with_suffix(".md").write_text(markdown(rows, head))
            if gpu is not None:
                torch.cuda.empty_cache()
    print(f"written: {path}")


if __name__ == "__main__":
    main()
