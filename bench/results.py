"""Where results go, and what they were measured on."""

import contextlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "torchao", "gemlite", "bitsandbytes", "humming-kernels")
# what nvidia-smi is asked; it only reads
ASKED = (
    "name,driver_version,vbios_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,"
    "clocks_event_reasons.active"
)


def device_name(device: str = "cpu") -> str:
    """A folder name for the results of this machine's CPU, or of its first GPU ("cuda")."""
    if device == "cuda":
        return slug(torch.cuda.get_device_name(0))
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    name = model[1] if model else platform.processor()
    isa = "amx" if torch.cpu._is_amx_tile_supported() else torch.backends.cpu.get_cpu_capability().lower()
    return slug(f"cpu {name} {isa} {torch.get_num_threads()} threads")


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-").lower()


def versions() -> dict[str, str]:
    """Of what is installed among PACKAGES."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def about(device: str) -> dict[str, Any]:
    """The head of a result file."""
    head = {
        "device": device_name(device),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        head |= {
            "versions": versions(),
            "cuda": torch.version.cuda,
            "sms": card.multi_processor_count,
            "l2_bytes": card.L2_cache_size,
            "memory_bytes": card.total_memory,
            "nvidia-smi": smi(),
        }
    return head


def smi() -> dict[str, str]:
    """Clocks, power and driver as nvidia-smi tells them; empty where there is none or it does not answer."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={ASKED}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    if answer.returncode:
        return {"error": (answer.stdout + answer.stderr).strip()}
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    return dict(zip(ASKED.split(","), values, strict=True))


def write(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return path


def save(name: str, rows: list[dict[str, Any]], device: str = "cpu") -> Path:
    """Write results/<device>/<name>.json with the versions the rows were measured with."""
    return write(RESULTS / device_name(device) / f"{name}.json", about(device), rows)
