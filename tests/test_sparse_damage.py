"""Checkpoints of sparse models that are damaged, or lie, are refused, with the layer's name and the numbers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from others_by_hand import Tensors, change_config, save_shards
from safetensors.torch import load_file
from test_sparse_saved import UP, load, sparse
from torch import Tensor

from fastllm.checkpoints.coding import CheckpointError


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("intact") for kind in ("16:32", "2:4", "16:32-int8", "block32@0.5")}
    for pattern, folder in folders.items():
        sparse(pattern, folder)
        load(folder)
    return folders


def part(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{UP}.weight_{name}": change(tensors[f"{UP}.weight_{name}"]).contiguous()})


def at(value: float, *index: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t[index] = value
        return t

    return change


def lose(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{UP}.weight_{name}")


def swap(tensors: Tensors) -> None:
    """Two blocks of one row of blocks in the wrong order."""
    columns, rows = tensors[f"{UP}.weight_columns"], tensors[f"{UP}.weight_rows"]
    row = int((rows.diff() > 1).nonzero()[0])
    columns[rows[row] : rows[row] + 2] = columns[rows[row] : rows[row] + 2].flip(0).clone()


DAMAGE: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "bits": ("16:32", part("index", at(-1, 3, 1)), "1 of 1024 words are none of 16:32: it is damaged"),
    "no bits": ("16:32", part("index", lambda t: t * 0), "1024 of 1024 words are none of 16:32"),
    "equal positions": ("2:4", part("index", at(0, 0, 0)), "1 of 1024 words are none of 2:4"),
    "int8 bits": ("16:32-int8", part("index", at(7, 255, 3)), "1 of 1024 words are none of 16:32"),
    "index float": ("16:32", part("index", lambda t: t.float()), "weight_index has dtype F32, not I32"),
    "index int64": ("16:32", part("index", lambda t: t.long()), "weight_index has dtype I64, not I32"),
    "index short": ("16:32", part("index", lambda t: t[1:]), r"weight_index has shape \[255, 4\], not \[256, 4\]"),
    "index swapped": ("2:4", part("index", lambda t: t.t()), r"weight_index has shape \[4, 256\], not \[256, 4\]"),
    "index lost": ("16:32", lose("index"), "weight_index is missing from the checkpoint"),
    "values NaN": ("16:32", part("packed", at(float("nan"), 0, 0)), "has 1 values that are NaN or infinite"),
    "values inf": ("2:4", part("packed", at(float("inf"), 5)), "has 64 values that are NaN or infinite"),
    "values int": ("16:32", part("packed", lambda t: t.int()), "weight_packed has dtype I32, not BF16 or F16 or F32"),
    "values few": ("16:32", part("packed", lambda t: t[:, 1:]), r"has shape \[256, 63\], not \[256, 64\]"),
    "values lost": ("16:32", lose("packed"), "weight_packed is missing"),
    "codes float": ("16:32-int8", part("packed", lambda t: t.float()), "weight_packed has dtype F32, not I32"),
    "scale NaN": ("16:32-int8", part("scale", at(float("nan"), 9)), "has 1 values that are NaN"),
    "scale wide": ("16:32-int8", part("scale", lambda t: t.repeat(1, 2)), r"shape \[256, 2\], not \[256, 1\]"),
    "scale lost": ("16:32-int8", lose("scale"), "weight_scale is missing"),
    "column far": ("block32@0.5", part("columns", at(4, 15)), "columns must be from 0 to 3; they are from 0 to 4"),
    "column negative": ("block32@0.5", part("columns", at(-1, 0)), "columns must be from 0 to 3; they are from -1"),
    "columns fall": ("block32@0.5", swap, "columns must ascend within a row"),
    "rows end": ("block32@0.5", part("rows", at(99, 8)), "rows must ascend from 0 to 16.*they go from 0 to 99"),
    "rows fall": ("block32@0.5", part("rows", at(-5, 4)), "rows must ascend.*descend on the way"),
    "blocks few": ("block32@0.5", part("values", lambda t: t[1:]), r"shape \[15, 32, 32\], not \[16, 32, 32\]"),
    "blocks NaN": ("block32@0.5", part("values", at(float("nan"), 3, 2, 1)), "values has 1 values that are NaN"),
    "blocks lost": ("block32@0.5", lose("values"), "weight_values is missing"),
    "rows int64": ("block32@0.5", part("rows", lambda t: t.long()), "weight_rows has dtype I64, not I32"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tensors_are_named(name, intact, tmp_path):
    kind, change, message = DAMAGE[name]
    folder = Path(shutil.copytree(intact[kind], tmp_path / "copy"))
    tensors = {key: t.clone() for key, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_shards(folder, tensors, 1)
    with pytest.raises(CheckpointError, match=message) as found:
        load(folder)
    assert UP in str(found.value)


Table = dict[str, Any]


def named(format: Any) -> Callable[[Table], Any]:
    return lambda table: table.update({UP: {"format": format}})


def own(**change: Any) -> Callable[[Table], Any]:
    return lambda table: table[UP].update(change)


ENTRY = f"quantization_config.sparse.{re.escape(UP)} is "
CONFIGS: dict[str, tuple[str, Table | Callable[[Table], Any], str]] = {
    "version": ("16:32", {"version": 2}, "of version 2; this fastllm reads 1"),
    "no version": ("16:32", {"version": None}, "of version None"),
    "no table": ("16:32", {"sparse": ["a"]}, "sparse is no table of layers"),
    "empty table": ("16:32", {"sparse": {}}, "sparse is no table of layers"),
    "prefix": ("16:32", {"prefix": [1]}, "config.json is damaged"),
    "packed": ("16:32", {"packed": 7}, "quantization_config.packed is 7, not a table"),
    "entry": ("16:32", lambda table: table.update({UP: "16:32"}), ENTRY),
    "no format": ("16:32", lambda table: table.update({UP: {}}), ENTRY),
    "number": ("16:32", named(16), ENTRY),
    "unknown": ("16:32", named("4:8"), f"{UP}: unknown pattern '4:8'"),
    "too many": ("16:32", named("40:32"), f"{UP}: 40 of 32"),
    "asymmetric": ("16:32", named("16:32-int4-asym"), f"{UP}: sparse values"),
    "another": ("16:32", named("2:4"), rf"{UP}: .*words are none of 2:4"),
    "the other": ("2:4", named("16:32"), rf"{UP}: .*none of 16:32"),
    "fewer": ("16:32", named("8:32"), rf"{UP}.weight_packed has shape \[256, 64\]"),
    "integers": ("16:32", named("16:32-int8"), f"{UP}.weight_packed has dtype BF16"),
    "floats": ("16:32-int8", named("16:32"), f"{UP}.weight_packed has dtype I32"),
    "blocks more": ("block32@0.5", own(blocks=17), r"columns has shape \[16\], not \[17\]"),
    "blocks negative": ("block32@0.5", own(blocks=-1), ENTRY),
    "blocks true": ("block32@0.5", own(blocks=True), ENTRY),
    "blocks huge": ("block32@0.5", own(blocks=1 << 60), ENTRY),
    "blocks lost": ("block32@0.5", lambda table: table[UP].pop("blocks"), ENTRY),
    "size": ("block32@0.5", own(format="block48"), f"{UP}: blocks may be of 32, 64 or 128"),
    "size huge": ("block32@0.5", own(format="block" + "9" * 30), f"{UP}: unknown pattern"),
    "not listed": ("16:32", lambda table: table.pop(UP), f"has {UP}.weight_packed, but .* is not packed"),
    "blocks not listed": ("block32@0.5", lambda table: table.pop(UP), UP),
    "other names": ("16:32", {"sparse": {"nothing": {"format": "16:32"}}}, "no packed layer of those"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_lies_is_refused(name, intact, tmp_path):
    kind, change, message = CONFIGS[name]
    folder = Path(shutil.copytree(intact[kind], tmp_path / "copy"))

    def rewrite(config: Table) -> Table:
        found = config["quantization_config"]
        found.update(change) if isinstance(change, dict) else change(found["sparse"])
        return config

    change_config(folder, rewrite)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_size_of_many_digits_is_named(intact, tmp_path):
    folder = Path(shutil.copytree(intact["block32@0.5"], tmp_path / "copy"))
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    own(format="block" + "9" * 5000)(table["sparse"])
    change_config(folder, lambda c: c | {"quantization_config": table})
    with pytest.raises(CheckpointError, match=UP):
        load(folder)


def test_formats_that_are_of_others(intact, tmp_path):
    for change, message in (
        ({"format": "fastllm-dense"}, "is quantized by None; fastllm reads"),
        ({"quant_method": "gptq", "format": "x"}, "GPTQ|bits"),
    ):
        folder = Path(shutil.copytree(intact["16:32"], tmp_path / change["format"]))
        change_config(folder, lambda c, more=change: c | {"quantization_config": c["quantization_config"] | more})
        with pytest.raises(ValueError, match=message):
            load(folder)
