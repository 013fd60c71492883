"""Every check, test and benchmark of the project that needs a GPU, in three commands of a few minutes each.

    python bench/gpu.py [--part matmul] [--minutes 9] [--out DIR] [--wheels DIR]
    python bench/gpu.py --part attention [--minutes 9] [--out DIR]
    python bench/gpu.py --part sparse [--minutes 9] [--out DIR]

Prints the environment; runs the tests of the part's kernels, whole models and, with the matmuls, all tests marked
`gpu`. Then for the matmuls bench_quant_matmul.py on a reduced grid (alone, and beside other libraries), and the tuner
in the time that is left; for attention the benchmarks of attention, decoding, the small fused kernels and `generate`
of whole models; for sparse weights the benchmark of blocks. Each is a process with a time of its own, so a failure of
one does not stop the rest. Writes gpu.log and gpu.md (gpu_attention.log and .md, gpu_sparse.log and .md) and the
results into DIR (by default bench/results/<device>/), and prints what matters last. Exit status 1 if any stage failed.

--wheels: a folder with wheels of the libraries to compare with (requirements/peers-gpu.txt); no network is needed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import report
import torch
from results import RESULTS, about, device_name
from stages import Result, Stage, run_all, table, tails
from targets import verdicts

ROOT = Path(__file__).resolve().parent.parent
# Run on the device, as far as they are there; the interpreter ran them on a CPU. What is marked slow stays out.
TESTS = (
    "tests/test_kernel_quant_matmul.py", "tests/test_quant_matmul.py", "tests/test_nn.py", "tests/test_layout.py",
    "tests/test_kernel_*.py", "tests/test_tickets.py", "tests/test_*int8*.py", "tests/test_*fp8*.py",
    "tests/test_dynamic_*.py", "tests/test_*expert*.py", "tests/test_activations.py",
)  # fmt: skip
ATTENTION_TESTS = (
    "tests/test_flash_attention.py", "tests/test_attention.py", "tests/test_kernel_decode_attention.py",
    "tests/test_decode_attention.py", "tests/test_norm.py", "tests/test_rotary.py", "tests/test_append_kv.py",
    "tests/test_gated_activation.py", "tests/test_graph.py", "tests/test_tickets.py",
)  # fmt: skip
SPARSE_TESTS = (
    "tests/test_kernel_*sparse*.py", "tests/test_*sparse*.py", "tests/test_lanes.py", "tests/test_tickets.py",
)  # fmt: skip
MAIN = "8192x8192"
SHAPES = f"{MAIN},4096x4096,6144x4096,4096x14336,28672x4096"
ROWS = "1,2,4,8,16,32,64,128,256,1024,4096"
REPORTS = {  # what a stage of attention writes to be read
    "decode attention": "decode.md",
    "attention": "attention.md",
    "fused": "fused.md",
    "generate": "generate.md",
}
SPARSE_REPORTS = {"sparse": "sparse.md", "block sparse": "block_sparse.md"}
PRINTED = 9000  # characters at most, at the end: a caller may see only so much


def tests(patterns: tuple[str, ...] = TESTS) -> list[str]:
    """The files that the patterns name, each once."""
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    # what only compiles needs no GPU, and would compile everything again in each process
    return [str(path.relative_to(ROOT)) for path in dict.fromkeys(found) if "compile" not in path.name]


def stages(out: Path, minutes: float) -> list[Stage]:
    """What to run, with the seconds that each may take of `minutes`; the tuner takes the rest."""
    python, scale = sys.executable, minutes / 9
    parallel = ["-n", "12"] if find_spec("xdist") else []
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=40"]
    bench = [python, "bench/bench_quant_matmul.py", "--device", "cuda", "--out", str(out), "--budget", "{seconds}"]
    alone = ["--peers", "none", "--only", "fastllm"]  # what it chooses; the tuner looks at the other candidates
    int4 = [*bench, "--formats", "int4-g128", "--shapes", SHAPES, "--rows", ROWS, *alone]
    int8 = [*bench, "--formats", "int8", "--shapes", MAIN, "--rows", "1,16,128,2048,4096", *alone]
    # rows in this order: GemLite has tiles for 1, 8 and 16 rows of this shape in its table, and searches for others
    others = [*bench, "--formats", "int4-g128,int8", "--shapes", "28672x4096", "--rows", "1,8,16,2", "--append"]
    gemlite = [
        *bench,
        "--formats",
        "int4-g128",
        "--shapes",
        MAIN,
        "--rows",
        "1,8,16,2",
        "--only",
        "gemlite",
        "--append",
    ]
    tuning = [python, "bench/tune_quant_matmul.py", "--formats", "int4-g128", "--rows", "16,64,128,32"]
    tuning += ["--budget", "{seconds}", "--out", str(out)]
    return [
        Stage("kernel tests", [*pytest, *parallel, *tests()], 100 * scale),
        Stage("whole models", [python, "bench/gpu_smoke.py"], 40 * scale),
        Stage("int4 against cuBLAS", int4, 150 * scale),
        Stage("int8 against cuBLAS", [*int8, "--append"], 35 * scale),
        Stage("experts", [python, "bench/experts.py", "--out", str(out)], 30 * scale),
        Stage("other libraries", others, 70 * scale, more=True),
        Stage("tests marked gpu", [*pytest, "-m", "gpu", "tests"], 40 * scale),
        Stage("GemLite", gemlite, 60 * scale, more=True),
        Stage("tuning", tuning, None),
    ]


def attention_stages(out: Path, minutes: float) -> list[Stage]:
    """As `stages`, for attention and what is around it; whole models take the rest."""
    python, scale, where = sys.executable, minutes / 9, ["--device", "cuda", "--out", str(out)]
    parallel = ["-n", "12"] if find_spec("xdist") else []
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=40"]
    prefill = [python, "bench/bench_attention.py", *where, "--budget", "{seconds}"]
    return [
        Stage("attention tests", [*pytest, *parallel, *tests(ATTENTION_TESTS)], 130 * scale),
        Stage("whole models", [python, "bench/gpu_smoke.py"], 40 * scale),
        Stage("decode attention", [python, "bench/bench_decode.py", *where], 90 * scale),
        Stage("attention", prefill, 100 * scale),
        Stage("fused", [python, "bench/bench_fused.py", *where], 30 * scale),
        Stage("generate", [python, "bench/bench_generate.py", *where, "--runs", "fused,int4", "--repeats", "3"], None),
    ]


def sparse_stages(out: Path, minutes: float) -> list[Stage]:
    """As `stages`, for weights that are stored without their zeros; products of blocks take the rest."""
    python, scale = sys.executable, minutes / 9
    parallel = ["-n", "12"] if find_spec("xdist") else []
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=40"]
    lanes = [python, "bench/bench_sparse.py", "--out", str(out), "--budget", "{seconds}"]
    blocks = [python, "bench/bench_block_sparse.py", "--device", "cuda", "--out", str(out), "--budget", "{seconds}"]
    return [
        Stage("sparse tests", [*pytest, *parallel, *tests(SPARSE_TESTS)], 150 * scale),
        Stage("sparse", lanes, 130 * scale),
        Stage("block sparse", blocks, None),
    ]


PARTS = {"matmul": stages, "attention": attention_stages, "sparse": sparse_stages}


def install(wheels: Path, target: str) -> Stage:
    """A stage that unpacks the wheels into `target`, without a network and without what they require."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        sys.exit(f"--wheels: there is no .whl file in {wheels}")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    return Stage("wheels", [*pip, "--target", target, *files], 60)


def environment(target: str | None) -> dict[str, str]:
    """Of the stages: this checkout first, then the wheels, then what was there."""
    paths = [str(ROOT), *([target] if target else []), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def last_lines(text: str, start: str, characters: int) -> str:
    """From the last occurrence of `start` on, or the end of `text`."""
    at = text.rfind(start)
    return (text[at:] if at >= 0 else text)[-characters:].strip()


def told(results: list[Result], out: Path) -> str:
    """What the caller should see: what failed, then the numbers, then the stages."""
    parts = [tails(results, 2500)]
    for result in results:
        path = out / (REPORTS | SPARSE_REPORTS).get(result.name, "none")
        if result.ok and path.exists():
            parts.append(path.read_text(encoding="utf-8")[:2600])
    path = out / "quant_matmul.json"
    fresh = any(result.name.endswith("cuBLAS") and result.seconds > 0 for result in results)
    if fresh and path.exists():
        found = json.loads(path.read_text())
        rows = found["rows"]
        parts += [report.left_out(rows)[:1200], report.table(rows)[:2400]]
        parts += ["layers of Llama 3.1 8B, M=1:\n" + report.layer_sums(rows)[:500]]
        experts = out / "experts.json"
        head = found | (json.loads(experts.read_text())["rows"][0] if experts.exists() else {})
        parts += [report.target_table(verdicts(rows, head))]
    tuned = [result for result in results if result.name == "tuning" and result.output]
    parts += [last_lines(result.output, "best of each", 1500) for result in tuned]
    parts.append(table(results))
    text = "\n\n".join(part for part in parts if part.strip())
    return text if len(text) <= PRINTED else "[...]\n" + text[-PRINTED:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="matmul", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder (default: bench/results/<device>)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of the libraries to compare with")
    args = parser.parse_args()
    start = time.perf_counter()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a CUDA GPU, and torch sees none here; `make test` and `make bench` run on a CPU")
    out = (args.out or RESULTS / device_name("cuda")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    name = "gpu" if args.part == "matmul" else f"gpu_{args.part}"
    log = out / f"{name}.log"
    facts = json.dumps(about("cuda"), indent=1)
    log.write_text(facts + "\n", encoding="utf-8")
    print(facts, flush=True)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as target:
        todo = ([install(args.wheels.resolve(), target)] if args.wheels else []) + PARTS[args.part](out, args.minutes)
        left = 60 * args.minutes - (time.perf_counter() - start)
        # only where they are compared with: transformers imports some of them as soon as it can
        results = run_all(todo, left, log, environment(None), environment(target))
    text = told(results, out)
    (out / f"{name}.md").write_text(f"```\n{facts}\n```\n\n{text}\n", encoding="utf-8")
    print("\n" + text, flush=True)
    sys.exit(0 if all(result.ok for result in results) else 1)


if __name__ == "__main__":
    main()
