"""The PTX that unpacks weights, executed here instruction by instruction on every value that a register can hold."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastllm.kernels import unpack

HALVES = np.arange(1 << 16, dtype=np.uint32)
REGISTER = HALVES | np.roll(HALVES, 12345) << np.uint32(16)  # two halves that are not alike


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Bit i of the result is bit (4 a_i + 2 b_i + c_i) of the table."""
    out = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def prmt(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """Byte i of the result is that one of the eight bytes of (b, a) which nibble i of the selector names."""
    pair = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        which = selector >> 4 * i & 15
        assert which < 8  # the sign is not replicated
        out |= ((pair >> np.uint64(8 * which)) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * i)
    return out


def floats(register: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """[n, 2] float64, from registers of two halves."""
    return torch.from_numpy(register.view(np.int16).copy()).view(dtype).double().view(-1, 2)


def fma_bf16x2(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    a, b, c = (floats(v, torch.bfloat16) for v in (a, b, c))
    return (a * b + c).bfloat16().view(torch.int16).numpy().reshape(-1).view(np.uint32)


def run(ptx: str, outputs: int, word: np.ndarray) -> list[np.ndarray]:
    """The output registers $0, $1, ... of straight-line PTX whose last operand, $outputs, holds `word`."""
    registers = {f"${outputs}": word}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(word, int(name, 0))

    steps: dict[str, Callable[..., np.ndarray]] = {
        "lop3.b32": lambda a, b, c, table: lop3(value(a), value(b), value(c), int(table, 0)),
        "prmt.b32": lambda a, b, selector: prmt(value(a), value(b), int(selector, 0)),
        "shr.u32": lambda a, by: value(a) >> np.uint32(int(by)),
        "mov.b32": value,
        "fma.rn.bf16x2": lambda a, b, c: fma_bf16x2(value(a), value(b), value(c)),
    }
    for line in filter(None, (part.strip() for part in re.sub(r"[{}]|\.reg[^;]*;", "", ptx).split(";"))):
        name, operands = line.split(None, 1)
        target, *others = (operand.strip() for operand in operands.split(","))
        registers[target] = steps[name](*others)
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype, excess", [(torch.float16, {4: 1024, 8: 1024}), (torch.bfloat16, {4: 128, 8: -128})])
def test_every_value_is_unpacked(bits: int, dtype: torch.dtype, excess: dict[int, int]) -> None:
    name = f"{'FOUR' if bits == 4 else 'EIGHT'}_{'FP16' if dtype == torch.float16 else 'BF16'}"
    planes = run(getattr(unpack, name).value, 16 // bits, REGISTER)
    halves = torch.from_numpy(REGISTER.view(np.uint16).astype(np.int64)).view(-1, 2)
    for p, plane in enumerate(planes):
        q = halves >> (bits * p) & (2**bits - 1)
        assert torch.equal(floats(plane, dtype), (q + excess[bits]).double())


def test_a_wrong_constant_is_seen() -> None:
    wrong = unpack.FOUR_FP16.value.replace("shr.u32 t, $4, 8", "shr.u32 t, $4, 9")
    good, bad = (run(ptx, 4, REGISTER) for ptx in (unpack.FOUR_FP16.value, wrong))
    assert [bool((a == b).all()) for a, b in zip(good, bad, strict=True)] == [True, True, False, True]
