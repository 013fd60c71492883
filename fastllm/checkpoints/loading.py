"""`load`: a model with packed layers, straight from a checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..formats import IntFormat
from .choice import Patterns
from .compressed_tensors import METHOD, CheckpointError, Stored
from .headers import INDEX, find_files, read_headers
from .quantizer import FastllmConfig


def load(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    weights: str | IntFormat | Mapping[str, str | IntFormat | None] | None = None,
    group_size: int | None = None,
    method: str | None = None,
    lm_head: str | IntFormat | bool | None = None,
    include: Patterns = "*",
    exclude: Patterns = (),
    quiet: bool = False,
    auto_class: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model of the checkpoint `path`, in evaluation mode, as `from_pretrained` gives it but with packed layers.

    path:       a folder with a compressed-tensors checkpoint (`pack-quantized`), whose layers stay packed; or with a
                dense one, which `weights` quantizes tensor by tensor, so that it is never in memory as a whole (None:
                it stays dense); or a GGUF file, which is loaded dense
    weights, group_size, method, lm_head, include, exclude: as in `fastllm.optimize`, for dense checkpoints
    auto_class: a class with `from_pretrained`; by default the one that config.json names
    kwargs:     go to `from_pretrained`

    The model can be saved with `save_pretrained`. Raises FileNotFoundError, or ValueError naming the layer or file,
    the numbers and what to do.
    """
    folder = Path(path)
    if folder.suffix == ".gguf":
        return _load_gguf(folder, dtype, weights)
    config = _read_config(folder, bool(kwargs.get("trust_remote_code")))
    stored = _take_stored(config)
    if stored is not None:
        _refuse_stored(folder, stored, weights)
        config.quantization_config = {"quant_method": "fastllm", "stored": stored, "quiet": quiet}
    elif weights is not None:
        kwargs["quantization_config"] = FastllmConfig(weights, group_size, method, lm_head, include, exclude, quiet)
    _check_files(folder, packed=stored is not None)
    kwargs |= {k: v for k, v in (("dtype", dtype), ("device_map", device_map)) if v is not None}
    with _without_bars(quiet or stored is not None or weights is not None):
        model_class = auto_class or _model_class(config)
        model, info = model_class.from_pretrained(folder, config=config, output_loading_info=True, **kwargs)
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}: {', '.join(missing[:8])}; it is "
            "incomplete, or of another architecture (see auto_class)"
        )
    return model


def _load_gguf(path: Path, dtype: torch.dtype | str | None, weights: object) -> PreTrainedModel:
    from .gguf import load_gguf

    if weights is not None:
        raise ValueError("a GGUF file is loaded dense; call fastllm.optimize(model, ...) on the result")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model, _ = load_gguf(path) if dtype is None else load_gguf(path, dtype)
    return model


def _read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is neither a folder with a checkpoint nor a .gguf file")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _take_stored(config: PretrainedConfig) -> dict[str, Any] | None:
    """Take the `quantization_config` out of `config`, where models with several parts keep it with their text part."""
    found = None
    for owner in (config.get_text_config(decoder=True), config):
        found = owner.__dict__.pop("quantization_config", None) or found
    return None if found is None else dict(found)


def _refuse_stored(folder: Path, stored: Mapping[str, Any], weights: object) -> None:
    name = stored.get("quant_method")
    if name != METHOD:
        raise ValueError(
            f"{folder} is quantized by {name!r}; fastllm reads {METHOD} (pack-quantized), GGUF and dense checkpoints. "
            "Load it with transformers, or quantize the dense checkpoint with weights=..."
        )
    if weights is not None:
        raise ValueError(
            f"{folder} is packed already: leave weights= out, or load the dense checkpoint to quantize it"
        )
    Stored(stored)  # complains of what cannot be read


def _check_files(folder: Path, packed: bool) -> None:
    files = find_files(folder)
    if not files and (packed or not any(folder.glob("*.bin"))):
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor {INDEX}")
    read_headers(files)


def _model_class(config: PretrainedConfig) -> Any:
    """The class that config.json names, else the automatic one for language models or for models."""
    names = config.architectures or [""]
    exact = getattr(transformers, names[0], None) if names[0] else None
    if isinstance(exact, type) and issubclass(exact, PreTrainedModel):
        return exact
    return AutoModelForCausalLM if names[0].endswith("CausalLM") else AutoModel


@contextmanager
def _without_bars(hide: bool) -> Iterator[None]:
    """Without transformers' progress bars, if `hide`."""
    hide = hide and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()
