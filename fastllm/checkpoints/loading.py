"""`load`: a model with packed layers, straight from a checkpoint."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..formats import Format
from ..probe import outputs, probe, reads_tokens, refuse_nan
from .choice import Patterns
from .coding import CheckpointError
from .headers import INDEX, find_files, read_headers
from .quantizer import FastllmConfig
from .sources import SOURCES, method_of, source_of


def load(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    weights: str | Format | Mapping[str, str | Format | None] | None = None,
    activations: str | None = None,
    group_size: int | None = None,
    method: str | None = None,
    lm_head: str | Format | bool | None = None,
    include: Patterns = "*",
    exclude: Patterns = (),
    quiet: bool = False,
    auto_class: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model of the checkpoint `path`, in evaluation mode, as `from_pretrained` gives it but with packed layers.

    path:       a local folder with a packed checkpoint, whose layers stay packed: compressed-tensors, GPTQ, AWQ (gemm)
                or bitsandbytes nf4; or with a dense one, which `weights` quantizes tensor by tensor, so that it is
                never in memory as a whole (None: it stays dense); or a GGUF file, which is loaded dense
    dtype:      of what is not packed, a torch dtype or its name; default: the checkpoint's (GGUF: bfloat16)
    device_map: as in transformers, but nothing can be offloaded
    weights, activations, group_size, method, lm_head, include, exclude: as in `fastllm.optimize`, for dense ones
    quiet:      no progress
    auto_class: a class with `from_pretrained`; by default the one that config.json names
    kwargs:     go to `from_pretrained`

    The model can be saved with `save_pretrained`. Raises FileNotFoundError, ImportError where `gguf` is missing, or
    ValueError (CheckpointError is one) naming the layer or file, the numbers and what to do.
    """
    if activations is not None and weights is None:
        raise ValueError(f"activations={activations!r} goes with weights={activations!r}, of a dense checkpoint")
    folder = Path(path)
    if folder.suffix == ".gguf":
        others = {"device_map": device_map, "weights": weights, "auto_class": auto_class, **kwargs}
        return _load_gguf(folder, dtype, [name for name, value in others.items() if value is not None])
    config = read_config(folder, bool(kwargs.get("trust_remote_code")))
    stored = take_stored(config)
    if stored is not None:
        _refuse_stored(folder, stored, weights)
        config.quantization_config = {"quant_method": "fastllm", "stored": stored, "quiet": quiet}
    elif weights is not None:
        settings = (weights, group_size, method, lm_head, include, exclude, quiet, activations)
        kwargs["quantization_config"] = FastllmConfig(*settings)
    check_files(folder, packed=stored is not None)
    kwargs |= {k: v for k, v in (("dtype", dtype), ("device_map", device_map)) if v is not None}
    with without_bars(quiet or stored is not None or weights is not None):
        chosen = auto_class or model_class(config)
        model, info = chosen.from_pretrained(folder, config=config, output_loading_info=True, **kwargs)
    refuse_missing(folder, model, info["missing_keys"])
    if weights is not None and reads_tokens(model) and config.get_text_config() is config:
        refuse_nan(outputs(model, probe(model, None)))
    return model


def _load_gguf(path: Path, dtype: torch.dtype | str | None, others: list[str]) -> PreTrainedModel:
    from .gguf import load_gguf

    if others:
        raise ValueError(
            f"a GGUF file is loaded dense, on the CPU, without {', '.join(others)}=; call model.to(device) and "
            "fastllm.optimize(model, ...) on the result"
        )
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    return load_gguf(path, dtype or torch.bfloat16)[0]


def read_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Of the checkpoint in `folder`; FileNotFoundError or CheckpointError if there is none that can be read."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is neither a folder with a checkpoint nor a .gguf file")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
    _check_config(folder / "config.json")
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _check_config(path: Path) -> None:
    """Raise CheckpointError for what transformers would stumble over."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    parts = [config, *config.values()] if isinstance(config, dict) else []
    stored = [part.get("quantization_config") for part in parts if isinstance(part, dict)]
    if not parts or not all(isinstance(found, (dict, type(None))) for found in stored):
        raise CheckpointError(f"{path} is damaged: it, or its quantization_config, is no table")


def take_stored(config: PretrainedConfig) -> dict[str, Any] | None:
    """Take the `quantization_config` out of `config`, where models with several parts keep it with their text part."""
    found = None
    for owner in (config.get_text_config(decoder=True), config):
        found = owner.__dict__.pop("quantization_config", None) or found
    return None if found is None else dict(found)


def _refuse_stored(folder: Path, stored: Mapping[str, Any], weights: object) -> None:
    name = method_of(stored)
    if name not in SOURCES:
        raise ValueError(
            f"{folder} is quantized by {name!r}; fastllm reads {', '.join(SOURCES)}, GGUF and dense checkpoints. "
            "Load it with transformers, or quantize the dense checkpoint with weights=..."
        )
    if weights is not None:
        raise ValueError(
            f"{folder} is packed already: leave weights= out, or load the dense checkpoint to quantize it"
        )
    source_of(stored)  # complains of what cannot be read


def check_files(folder: Path, packed: bool) -> list[str]:
    """The safetensors files of a checkpoint, whose headers can be read; none if it has others and is not packed."""
    files = find_files(folder)
    if not files and (packed or not any(folder.glob("*.bin"))):
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor {INDEX}")
    read_headers(files)
    return files


def refuse_missing(folder: Path, model: Any, missing: Iterable[str]) -> None:
    """Raise CheckpointError if weights of the model were not in the checkpoint."""
    if names := sorted(missing):
        raise CheckpointError(
            f"{folder} lacks {len(names)} weights of {type(model).__name__}: {', '.join(names[:8])}; it is "
            "incomplete, or of another architecture (see auto_class)"
        )


def model_class(config: PretrainedConfig) -> Any:
    """The class that config.json names, else the automatic one for language models or for models."""
    names = config.architectures or [""]
    exact = getattr(transformers, names[0], None) if names[0] else None
    if isinstance(exact, type) and issubclass(exact, PreTrainedModel):
        return exact
    return AutoModelForCausalLM if names[0].endswith("CausalLM") else AutoModel


@contextmanager
def without_bars(hide: bool) -> Iterator[None]:
    """Without transformers' progress bars, if `hide`."""
    hide = hide and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()
