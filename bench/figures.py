"""Put the figures of result files into README.md and docs/sparsity.md, so that none is typed.

python bench/figures.py [bench/results/<device>/demo.json]
"""

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WHAT = (
    '`fused` has its weights as they were, `compiled` is `decode="compile"`; first tokens are times until they come, '
    "after prompts of so many tokens."
)
METHODS = (
    "bf16",
    "int8",
    "int8-a8",
    "int8-a8 smoothquant",
    "max_loss=0.02",
    *(f"int4-{group} {method}" for group in ("g64", "g128") for method in ("rtn", "hqq", "awq", "gptq")),
    "bf16, fused, int4 keys and values",
    "bf16, fused, calibrated for int4 keys and values",
)
CALIBRATED = "`gptq`, `awq`, `smoothquant` and `max_loss` saw 128 samples of 512 tokens of other text, on this CPU."
DOCS = ROOT / "docs/sparsity.md"
SPARSITY, SPARSITY_END = "<!-- sparsity: bench/figures.py writes this part -->", "<!-- /sparsity -->"
BEGIN, END = "<!-- figures: bench/figures.py writes this part -->", "<!-- /figures -->"


def section(path: Path) -> str:
    """Markdown: the picture beside the result file `path`, and its table."""
    result = json.loads(path.read_text(encoding="utf-8"))
    dense, runs, machine = result["baseline"], result["runs"], result["machine"]
    folder, versions = path.parent.relative_to(ROOT), result["versions"]
    lines = [
        f"![Tokens per second, bytes read per token and perplexity]({folder}/demo.png)",
        "",
        "| | tokens/s | 512 tokens read | MB read per token | perplexity | load | peak memory |",
        "|---|---|---|---|---|---|---|",
        row("dense bfloat16", dense, dense),
        *(row(name, run, dense) for name, run in runs.items()),
        "",
        f"Gemma 3 270M on {machine['cpu']}, {machine['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; measured by `make demo` ([{path.name}]({folder}/{path.name}) has the protocol). "
        "`int4` is `int4-g32`, head included, rounded to nearest (`rtn`) or calibrated (`gptq`); `mixed` is int8 with "
        "an `int4-g64` head. "
        f"{result['verdict']}",
    ]
    generate = path.parent / "generate.json"
    if generate.exists():
        rows = json.loads(generate.read_text(encoding="utf-8"))["rows"]
        base = {row["case"]: row["first_s"] for row in rows if row["model"] == "transformers"}
        worst = min(rows, key=lambda row: base[row["case"]] / row["first_s"])
        told = (
            f"The slowest first token beside transformers' own is that of {worst['model']} with "
            f"{worst['rows']} rows of {worst['prompt']} tokens: {base[worst['case']] / worst['first_s']:.2f}x."
        )
        lines += ["", *whole(rows), ""]
        lines += [f"All of them in turns in one process ([generate.md]({folder}/generate.md)). {WHAT} {told}"]
    quality = path.parent / "quality.json"
    if quality.exists():
        rows = json.loads(quality.read_text(encoding="utf-8"))["rows"]
        lines += ["", *methods({row["weights"]: row for row in rows}), ""]
        lines += [f"Ten windows of 512 tokens ([quality.md]({folder}/quality.md) has every format). {CALIBRATED}"]
        if (path.parent / "budget.png").exists():
            about = f"What `max_loss=0.02` chose among ([layer by layer]({folder}/budget.txt)):"
            lines += ["", about, "", f"![Megabytes read per token against perplexity]({folder}/budget.png)"]
    return "\n".join(lines)


def methods(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each way to quantize that is worth telling: bytes, perplexity, and how long it took."""
    lines = ["| | MB read per token | perplexity | seconds to make |", "|---|---|---|---|"]
    dense = rows["bf16"]["perplexity"]
    for name in (name for name in METHODS if name in rows):
        row = rows[name]
        change = "" if name == "bf16" else f" ({row['perplexity'] / dense - 1:+.1%})"
        made = f"{row['seconds']:.0f}" if row.get("seconds") else ""
        lines.append(f"| {name} | {row['bytes_per_token'] / 1e6:.0f} | {row['perplexity']:.2f}{change} | {made} |")
    return lines


def whole(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each model, beside transformers' own: tokens per second of one row and of eight, first tokens."""
    of = {(row["case"], row["model"]): row for row in rows}
    lines = [
        "| `model.generate` | tokens/s | tokens/s, 8 rows | first of 512 | first of 4096 |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        cells = [name]
        for case, key in (("decode", "tok_s"), ("batch", "tok_s"), ("prefill", "first_s"), ("long", "first_s")):
            mine, base = of[case, name][key], of[case, "transformers"][key]
            ratio = mine / base if key == "tok_s" else base / mine
            told = f"{mine:.1f}" if key == "tok_s" else f"{mine:.2f} s"
            cells.append(told if name == "transformers" else f"{told} ({ratio:.2f}x)")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def row(name: str, run: dict[str, Any], dense: dict[str, Any]) -> str:
    ratio = "" if run is dense else f" ({run['decode_tok_s'] / dense['decode_tok_s']:.2f}x)"
    prefill = "" if run is dense else f" ({dense['prefill_s'] / run['prefill_s']:.2f}x)"
    return (
        f"| {name} | {run['decode_tok_s']:.1f}{ratio} | {run['prefill_s']:.2f} s{prefill} "
        f"| {run['bytes_per_token'] / 1e6:.0f} | {run['perplexity']:.2f} | {run['load_s']:.1f} s "
        f"| {run['peak_rss_bytes'] / 1e6:.0f} MB |"
    )


def replaced(readme: str, path: Path) -> str:
    """The text of README.md with the figures of `path`."""
    return _between(readme, BEGIN, END, section(path))


def _between(text: str, begin: str, end: str, new: str) -> str:
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def sparsity(text: str, folder: Path) -> str:
    """The text of docs/sparsity.md with the tables of a folder of results."""
    tables = []
    for name in ("sparsity", "sparsity_errors", "prune"):
        found = folder / f"{name}.md"
        if found.exists():
            tables += [found.read_text(encoding="utf-8").strip(), ""]
    return _between(text, SPARSITY, SPARSITY_END, "\n".join(tables).strip())


def results() -> list[Path]:
    return sorted(ROOT.glob("bench/results/*/demo.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, default=None, help="default: the one in bench/results")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    result = (args.result or results()[0]).resolve()
    readme.write_text(replaced(readme.read_text(encoding="utf-8"), result), encoding="utf-8")
    DOCS.write_text(sparsity(DOCS.read_text(encoding="utf-8"), result.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
