"""The steps of the demo: each measures something of every model, prints it, and notes it in `Demo.rows`."""

import copy
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..checkpoints.gguf import load_gguf
from ..compress import quantize as calibrated
from ..compress.task import METHODS
from ..data import sample_text
from ..diagnose import bytes_per_token, measure_alternating, perplexity
from ..formats import parse_format
from ..patch import optimize
from ..patch.accuracy import agreement
from . import child
from .demo import CHECKED, SETTINGS, Effort
from .evaluate import describe

BASELINE = "baseline"


@dataclass
class Demo:
    out: Path
    effort: Effort
    tokenizer: Any
    ids: Tensor  # the sample text, [1, T]
    models: dict[str, Any]
    rows: dict[str, dict[str, Any]] = field(default_factory=lambda: {BASELINE: {}})
    perplexity_protocol: str = ""


def formats(text: str) -> list[str]:
    """ "int8,int4" -> the names. Raises ValueError for what is neither a format nor one of the demo's own settings."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SETTINGS:
            parse_format(name)
    if not names:
        raise ValueError("--formats names no format; try --formats int8,int4")
    return list(dict.fromkeys(names))


def load(gguf: Path, out: Path, effort: Effort) -> Demo:
    logging.disable_progress_bar()  # each step has a line of its own
    start = time.perf_counter()
    model, tokenizer = load_gguf(gguf)
    print(f"loaded and dequantized to bfloat16 in {time.perf_counter() - start:.1f} s", flush=True)
    model.save_pretrained(out / BASELINE)
    ids = tokenizer(sample_text(), return_tensors="pt", verbose=False)["input_ids"]
    return Demo(out, effort, tokenizer, ids, {BASELINE: model})


def quantize(demo: Demo, name: str, settings: dict[str, Any]) -> None:
    """Optimize a copy of the dense model that shares its weights, which are replaced and never written to."""
    dense = demo.models[BASELINE]
    model = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})
    start = time.perf_counter()
    settings = {"weights": name, **settings}
    prompt = demo.ids[:, :CHECKED]
    if settings.get("method") in METHODS:
        data = {"samples": demo.effort.samples, "tokenizer": demo.tokenizer}
        calibrated(model, keep=False, prompt=prompt, quiet=True, **data, **settings)
        settings = {"weights": None}
    report = optimize(model, keep=False, prompt=prompt, quiet=True, **settings)
    seconds = time.perf_counter() - start
    print(f"\n{report}\n  quantized in {seconds:.1f} s", flush=True)
    model.save_pretrained(demo.out / name)
    demo.tokenizer.save_pretrained(demo.out / name)
    demo.models[name] = model
    summary = {key: value for key, value in report.to_dict().items() if key != "decisions"}  # 236 of them
    demo.rows[name] = {"optimize_s": seconds, "report": summary}


def time_all(demo: Demo) -> None:
    """Speed of all models, taking turns."""
    effort = demo.effort
    print(f"\ntiming {' and '.join(demo.models)} in turns ...", flush=True)
    reading = measure_alternating(demo.models, demo.ids[:, : effort.prefill_tokens], 1, effort.repeats)
    writing = measure_alternating(demo.models, demo.ids[:, : effort.decode_after], effort.new_tokens, effort.repeats)
    for name, speed in writing.items():
        demo.rows[name] |= {
            "decode_tok_s": speed.decode_tok_s,
            "decode_tok_s_fastest_quarter": speed.fastest_quarter_tok_s,
            "decode_after_tokens": speed.prefill_tokens,
            "step_s_quartiles": list(speed.step_s),
            "prefill_s": reading[name].prefill_s,
            "prefill_tokens": reading[name].prefill_tokens,
            "bytes_per_token": bytes_per_token(demo.models[name]),
        }


def judge(demo: Demo, name: str, prompt: str) -> None:
    """Perplexity on the sample text, and a greedy continuation of `prompt`."""
    model, tokenizer = demo.models[name], demo.tokenizer
    found = perplexity(model, sample_text(), tokenizer, windows=demo.effort.windows)
    demo.perplexity_protocol = describe("beginning of WikiText-2's validation set", found)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    print(f"{name}: perplexity {found.value:.2f}; {prompt}{text!r}", flush=True)
    demo.rows[name] |= {"perplexity": found.value, "continuation": text}


def reload(demo: Demo, name: str) -> None:
    """Load the saved checkpoint in fresh processes: for time and memory; without fastllm, to compare."""
    with torch.inference_mode():
        here = demo.models[name](input_ids=demo.ids[:, :CHECKED]).logits[0].float()
    found, logits = _fresh(demo, name, "fastllm")
    keys = ("load_s", "peak_rss_bytes", "rss_bytes", "rss_before_load_bytes")
    demo.rows[name] |= {key: found[key] for key in keys}
    same = torch.equal(here, logits)
    verdict = "the same to the bit" if same else "not the same"
    print(f"{name}: loaded again in {found['load_s']:.1f} s; the logits are {verdict}")
    demo.rows[name]["reloaded_equal"] = same
    if name == BASELINE:
        return
    if not find_spec("compressed_tensors"):
        demo.rows[name]["transformers_alone"] = None
        print(f"{name}: compressed-tensors is not installed, so loading without fastllm was not tried")
        return
    found, logits = _fresh(demo, name, "transformers")
    accuracy = agreement(here, logits, has_vocabulary=True, real=True)
    demo.rows[name]["transformers_alone"] = {**asdict(accuracy), "fastllm_imported": found["fastllm_imported"]}
    print(f"{name}: loaded by transformers without fastllm; against fastllm: {accuracy}", flush=True)


def _fresh(demo: Demo, name: str, library: str) -> tuple[dict[str, Any], Tensor]:
    """(figures, logits [CHECKED, V]) of a new process. Raises OSError if it fails, with its last line."""
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder, "logits.pt")
        path = str((demo.out / name).resolve())
        request = {"library": library, "path": path, "ids": demo.ids[0, :CHECKED].tolist(), "logits": str(logits)}
        Path(folder, "request.json").write_text(json.dumps(request), encoding="utf-8")
        # -P: the file's own directory, with names such as env.py, is not to be searched for modules
        start = ["-m", child.__name__] if library == "fastllm" else ["-P", str(child.__file__)]
        done = subprocess.run([sys.executable, *start, folder], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise OSError(f"loading {path} with {library} in a new process failed ({done.returncode}): {said[-1]}")
        return json.loads(Path(folder, "result.json").read_text(encoding="utf-8")), torch.load(logits)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line for each model, and how it compares with the first."""
    first = next(iter(rows.values()))
    prefill = f"{first['prefill_tokens']} tokens read"
    lines = [f"{'':12}{'tok/s':>16}{prefill:>18}{'MB per token':>16}{'perplexity':>12}{'load':>9}{'peak memory':>13}"]
    for name, row in rows.items():
        speed = f"{row['decode_tok_s']:.1f} ({row['decode_tok_s'] / first['decode_tok_s']:.2f}x)"
        size = f"{row['bytes_per_token'] / 1e6:.0f} ({row['bytes_per_token'] / first['bytes_per_token']:.0%})"
        peak = f"{row['peak_rss_bytes'] / 1e6:.0f} MB" if row["peak_rss_bytes"] else "unknown"
        lines.append(
            f"{name:12}{speed:>16}{row['prefill_s']:>16.2f} s{size:>16}{row['perplexity']:>12.2f}"
            f"{row['load_s']:>7.1f} s{peak:>13}"
        )
    return "\n".join(lines)


def verdict(rows: dict[str, dict[str, Any]]) -> str:
    """Which to take: the fastest whose perplexity is within one per cent of the dense model's, and what less costs."""
    first = rows[BASELINE]
    loss = {name: row["perplexity"] / first["perplexity"] - 1 for name, row in rows.items() if name != BASELINE}
    speed = {name: rows[name]["decode_tok_s"] / first["decode_tok_s"] for name in loss}
    told = ", ".join(f"{name} {speed[name]:.2f}x at {loss[name]:+.1%}" for name in loss)
    good = [name for name in loss if loss[name] <= 0.01]
    if not good:
        return f"Speed and perplexity against dense: {told}. None keeps within 1 % of the dense perplexity."
    best = max(good, key=lambda name: speed[name])
    return (
        f"Speed and perplexity against dense: {told}. For this model take {best}: the fastest that stays within 1 %."
    )


def caption(demo: Demo) -> str:
    effort = demo.effort
    return (
        f"batch 1, after {effort.decode_after} tokens, models in turns; "
        f"perplexity on {effort.windows} x 512 tokens of WikiText-2; MB of weights"
    )


def protocol(demo: Demo) -> str:
    effort = demo.effort
    return (
        f"Speed: batch 1, greedy; the models take turns, {effort.repeats} each; {effort.prefill_tokens} tokens are "
        f"read, and {effort.new_tokens} steps timed after a prompt of {effort.decode_after}; medians, and of the "
        "steps the fastest quarter as well; only ratios within one run are worth quoting. "
        f"Perplexity: {demo.perplexity_protocol}. "
        "MB per token: the bytes of weights that one step reads. "
        "Load and peak memory: a fresh process for each, which loads the saved checkpoint with fastllm.load (files "
        f"in the page cache), reads {CHECKED} tokens and makes 8; peak is VmHWM, with the libraries and mapped files."
    )
