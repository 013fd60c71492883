"""Versions, devices, and which kernels can run here, or why not."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HELP = "versions, devices, and which kernels can run here"
REQUIRED = ("fastllm-kernels", "torch", "triton", "transformers", "numpy", "safetensors", "tokenizers")
OPTIONAL = ("accelerate", "compressed-tensors", "gguf", "peft", "torchao", "bitsandbytes")
EXAMPLES = ("int4", "int8", "int8-a8", "fp8-a8")  # formats, of a weight as below
N, K = 4096, 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def execute(args: argparse.Namespace) -> dict[str, Any]:
    found = {"versions": versions(), "machine": machine(), "layouts": layouts()}
    for package, number in found["versions"].items():
        print(f"{package:20} {number or 'not installed'}")
    print()
    for name, value in found["machine"].items():
        if name != "gpus":
            print(f"{name:20} {', '.join(value) if isinstance(value, list) else value}")
    for index, gpu in enumerate(found["machine"]["gpus"]):
        size = f"{gpu['memory'] / 2**30:.0f} GiB"
        print(f"{f'cuda:{index}':20} {gpu['name']}, {size}, compute capability {gpu['capability']}")
    for device, formats in found["layouts"].items():
        for format, rows in formats.items():
            print(f"\n{format} [{N}, {K}] in bfloat16 on {device}; the first that can run is taken")
            for name, row in rows.items():
                print(f"  {name:12} {row['runs']:28} {'; '.join(row['reasons']) or 'can run'}")
    return found


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in REQUIRED + OPTIONAL:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """The CPU and its features as torch sees them, and the GPUs."""
    import torch

    features = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported(),
        "VNNI": torch.cpu._is_vnni_supported(),
    }
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": [name for name, there in features.items() if there],
        "gpus": [{"name": g.name, "memory": g.total_memory, "capability": f"{g.major}.{g.minor}"} for g in gpus],
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def layouts() -> dict[str, dict[str, dict[str, Any]]]:
    """{device: {format: {layout: {"runs": what runs on it, "reasons": why it cannot, empty if it can}}}}."""
    import torch

    from ..formats import parse_format
    from ..ops import layouts_of

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {
        device: {
            parse_format(name).name: {
                layout.name: {
                    "runs": layout.runs,
                    "reasons": layout.reasons(parse_format(name), N, K, torch.bfloat16, torch.device(device)),
                }
                for layout in layouts_of(parse_format(name)).values()
            }
            for name in EXAMPLES
        }
        for device in devices
    }
