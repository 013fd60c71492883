"""Loading a GGUF file as a Hugging Face model with its tokenizer: `load_gguf(path)`.

transformers knows how to name and reshape the tensors, and does so here. Its reader builds several Python objects for
each of the vocabulary's entries, two or three times a load, and its Gemma tokenizer is a Unigram one, which cuts text
differently: so the header is read by `gguf_header`, the tokenizer built by `gguf_tokenizer`, and transformers is shown
a header without vocabulary.
"""

import struct
import tempfile
import warnings
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fastllm.checkpoints.gguf_header import ARRAY, STRING, Header, TensorInfo, read_header
from fastllm.checkpoints.gguf_tokenizer import build_tokenizer

BLOCKS_AT_ONCE = 1 << 13  # 32 to 256 weights each: the scratch of one step stays in the cache
FLOAT32 = 0  # as a ggml type


def load_gguf(
    path: str | PathLike[str], dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model and tokenizer of the GGUF file `path`; weights dequantized to `dtype`, on the CPU, in evaluation mode.

    Both save with `save_pretrained` as any other model. Raises FileNotFoundError; ImportError where the `gguf` package
    is missing; ValueError for what is not a complete, single-file GGUF of a supported architecture and tokenizer, or
    lacks a weight.
    """
    _require_gguf()
    header = read_header(path)
    _check(header)
    tokenizer = build_tokenizer(header.metadata)  # first: it fails within seconds, before the weights are read
    model = _load_natively(header, dtype) if _read_by_transformers(header) else _load_weights(header, dtype)
    return model, tokenizer


def _require_gguf() -> None:
    if find_spec("gguf") is None:
        raise ImportError("GGUF files need the package `gguf`: pip install gguf")


def _check(header: Header) -> None:
    """Raise ValueError for split files, unknown tensor types, and tensors that reach beyond the end of the file."""
    parts = header.metadata.get("split.count", 1)
    if not isinstance(parts, int) or parts > 1:
        raise ValueError(f"{header.path} is one of {parts}: join them with llama.cpp's `llama-gguf-split --merge`")
    for info in header.tensors:
        end = info.offset + _bytes(info, header)
        if end > header.size:
            raise ValueError(
                f"{header.path} is truncated: tensor {info.name!r} ends at byte {end}, the file has {header.size}"
            )


def _bytes(info: TensorInfo, header: Header) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if info.ggml_type not in [kind.value for kind in GGML_QUANT_SIZES]:
        raise ValueError(f"{header.path}: tensor {info.name!r} has the unknown type {info.ggml_type}")
    kind = GGMLQuantizationType(info.ggml_type)
    block, size = GGML_QUANT_SIZES[kind]
    if not info.shape or info.shape[-1] % block:
        raise ValueError(
            f"{header.path}: tensor {info.name!r}, {info.shape}, does not divide into {kind.name} blocks of {block}"
        )
    elements = 1
    for length in info.shape:  # Python integers: hostile shapes must not wrap around
        elements *= length
    return elements // block * size


def _read_by_transformers(header: Header) -> bool:
    """Whether transformers' newer reader, which is fast by itself, handles this architecture."""
    from transformers.integrations.gguf import is_gguf_arch_supported

    return is_gguf_arch_supported(header.architecture)


def _load_natively(header: Header, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import GgufConfig

    # Without dequantize=True the model counts as quantized even where nothing is, and save_pretrained refuses it.
    settings = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        header.path.parent, gguf_file=header.path.name, dtype=dtype, quantization_config=settings
    )


def _load_weights(header: Header, dtype: torch.dtype) -> PreTrainedModel:
    settings = _config(header)
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tensors = _state_dict(header, settings, skeleton, dtype)
    model, info = type(skeleton).from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{header.path} lacks {len(missing)} weights of {type(model).__name__}: {missing[:8]}")
    model.config.name_or_path = header.metadata.get("general.name", header.path.stem)
    return model


def _config(header: Header) -> dict[str, Any]:
    """The configuration that transformers derives from the header, as keyword arguments of `AutoConfig.for_model`."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / header.path.name
        path.write_bytes(_header_without_vocabulary(header))
        settings: dict[str, Any] = load_gguf_checkpoint(path)["config"]
    if f"{header.architecture}.vocab_size" not in header.metadata:
        settings["vocab_size"] = len(header.metadata["tokenizer.ggml.tokens"])
    return settings


def _header_without_vocabulary(header: Header) -> bytes:
    """A GGUF file with the keys of `header` but one token, and its tensor names, all on one number (nobody looks)."""

    def string(text: str) -> bytes:
        encoded = text.encode()
        return struct.pack("<Q", len(encoded)) + encoded

    tokens = string("tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, 1) + string("")
    keys = [*header.raw.values(), tokens]
    table = [string(info.name) + struct.pack("<IQIQ", 1, 1, FLOAT32, 0) for info in header.tensors]
    start = b"GGUF" + struct.pack("<IQQ", 3, len(table), len(keys))
    return b"".join([start, *keys, *table, bytes(header.alignment + 4)])  # padding, then the one number


def _state_dict(
    header: Header, settings: dict[str, Any], skeleton: PreTrainedModel, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every tensor of the file in `dtype`, under its name in `skeleton`; warns of those that have no place there."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=settings)
    names = get_gguf_hf_weights_map(_Names(skeleton), processor)
    parsed: dict[str, Any] = {"tensors": {}, "config": settings}
    tensors: dict[str, torch.Tensor] = parsed["tensors"]  # processors of expert tensors write here themselves
    unused: list[str] = []
    data = np.memmap(header.path, mode="r", dtype=np.uint8)
    for info in header.tensors:
        values = _dequantize(data[info.offset : info.offset + _bytes(info, header)], info)
        result = processor.process(weights=values, name=info.name, tensor_key_mapping=names, parsed_parameters=parsed)
        if result.name in names:
            tensors[names[result.name]] = torch.from_numpy(result.weights).to(dtype, copy=True)
        elif result.name is not None:
            unused.append(info.name)
    if unused:
        warnings.warn(f"{header.path}: {len(unused)} tensors are not used: {unused[:8]}", stacklevel=4)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


class _Names:
    """What `get_gguf_hf_weights_map` asks of a model, down to its children and no deeper.

    It builds a table of all names anew for every module, seconds in all, where below the children no name can match.
    """

    def __init__(self, module: torch.nn.Module, children: bool = True) -> None:
        self.module, self.children = module, children
        self.config = getattr(module, "config", None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()

    def named_children(self) -> list[tuple[str, "_Names"]]:
        return [(name, _Names(child, False)) for name, child in self.module.named_children()] if self.children else []


def _dequantize(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    """The float32 values of one tensor from its bytes; a writable array of `info.shape`."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(info.ggml_type)
    block, size = GGML_QUANT_SIZES[kind]
    storage = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(kind.name)
    if storage is not None:
        return raw.view(storage).astype(np.float32).reshape(info.shape)
    blocks = raw.reshape(-1, size)
    values = np.empty((len(blocks), block), dtype=np.float32)
    for start in range(0, len(blocks), BLOCKS_AT_ONCE):  # gguf's own loop takes 16 rows a step, most of it overhead
        rows = slice(start, start + BLOCKS_AT_ONCE)
        try:
            values[rows] = dequantize(blocks[rows].reshape(1, -1), kind).reshape(-1, block)
        except NotImplementedError as error:
            raise ValueError(f"tensor {info.name!r} is {kind.name}, which gguf cannot dequantize") from error
    return values.reshape(info.shape)
