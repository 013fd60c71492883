"""A fresh process for the demo: load a checkpoint, run it, write what was seen.

`request.json` -> `result.json`. With "library": "transformers", the file is run by its path, and fastllm not imported.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Load request["path"], save the logits of request["ids"] in request["logits"], continue greedily."""
    logging.disable_progress_bar()
    ids = torch.tensor([request["ids"]])
    if request["library"] == "fastllm":
        from fastllm import load
        from fastllm.diagnose import anonymous_rss, peak_rss

        rss = {"rss_before_load_bytes": anonymous_rss()}
        start = time.perf_counter()
        model = load(request["path"], quiet=True)
    else:
        rss = {}
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(request["path"])
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0]
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    if rss:
        rss |= {"rss_bytes": anonymous_rss(), "peak_rss_bytes": peak_rss()}
    torch.save(logits.float(), request["logits"])
    imported = "fastllm" in sys.modules
    return {"load_s": seconds, **rss, "tokens": tokens[0, ids.shape[1] :].tolist(), "fastllm_imported": imported}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = run(json.loads((folder / "request.json").read_text(encoding="utf-8")))
    (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")
