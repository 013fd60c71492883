"""Reading NVIDIA's machine code, as `cuobjdump -sass` prints it."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# what writes no register of a thread
SILENT = ("ST", "RED", "BAR", "BRA", "EXIT", "LDGSTS", "LDGDEPBAR", "DEPBAR", "U", "ISETP", "FSETP", "HSETP", "DSETP",
          "PLOP3", "NOP", "MEMBAR", "BSSY", "BSYNC", "R2UR", "WARPSYNC", "WARPGROUP", "FENCE", "CCTL")  # fmt: skip


def dump_of(built: Any, scratch: Path) -> str:
    """The machine code and the resources of what triton compiled, as the cuobjdump of its wheel prints them."""
    import triton

    cubin = scratch / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(dump: str) -> dict[str, int]:
    """Registers of a thread, and its bytes on the stack and in local memory."""
    stack, local = (int(re.findall(rf"{name}:(\d+)", dump)[-1]) for name in ("STACK", "LOCAL"))
    return {"registers": int(re.findall(r"REG:(\d+)", dump)[-1]), "stack": stack + local}


def lines_of(sass: str) -> list[tuple[int, str]]:
    """(address, instruction) of each line."""
    return [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]+)\*/(\s+.*)$", sass, re.M)]


def loops(lines: list[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    """First and last line of each stretch between a branch and the earlier address that it goes to."""
    place = {address: i for i, (address, _) in enumerate(lines)}
    for i, (_, text) in enumerate(lines):
        to = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if to and place.get(int(to[1], 16), i) < i:
            yield place[int(to[1], 16)], i


def longest_loop(sass: str) -> list[str]:
    """The instructions of the loop that has the most."""
    lines = lines_of(sass)
    start, end = max(loops(lines), key=lambda pair: pair[1] - pair[0], default=(0, -1))
    return [text for _, text in lines[start : end + 1]]


def written(text: str) -> set[int]:
    """The registers that an instruction writes."""
    text = re.sub(r"^@!?U?P\w+\s+", "", text.strip())
    name, _, operands = text.partition(" ")
    first = re.match(r"\s*(?:PT,\s*|P\d,\s*)*R(\d+)", operands)
    if name.startswith(SILENT) or first is None:
        return set()
    if name.startswith("LDSM"):
        width = 4 if ".4" in name else 2 if ".2" in name else 1
    else:
        width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name or name.startswith("CS2R") else 1
    return set(range(int(first[1]), int(first[1]) + width))


def overwritten(sass: str) -> int:
    """Writes to registers from which a product (HGMMA) that is still under way may yet read its left operand.

    Products run on after the instruction that starts them, until WARPGROUP.DEPBAR waits for all but the last so many
    groups of them. Each loop is followed three times round, and out of its end.
    """
    lines, found = lines_of(sass), set()
    for start, end in loops(lines):
        body = lines[start : end + 1]
        if not any("HGMMA" in text for _, text in body):
            continue
        groups: list[set[int]] = []
        current: set[int] = set()
        for address, text in [*body * 3, *lines[end + 1 : end + 40]]:
            if "HGMMA" in text:
                left = re.search(r"HGMMA\S*\s+R\d+, R(\d+), gdesc", text)
                current |= set(range(int(left[1]), int(left[1]) + 4)) if left else set()
                if "gsb0" in text:
                    groups, current = [*groups, current], set()
            elif wait := re.search(r"WARPGROUP\.DEPBAR\S* gsb0, 0x(\w+)", text):
                left_over = int(wait[1], 16)
                groups = groups[len(groups) - left_over :] if left_over else []
            elif written(text) & set().union(current, *groups):
                found.add(address)
    return len(found)
