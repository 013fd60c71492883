"""Where a checkpoint may be written."""

from pathlib import Path


def refuse_out(out: Path, source: Path, but: str = "") -> None:
    """Raise ValueError where saving would fail or overwrite something, before minutes are spent.

    source: what is to be quantized. but: the name of what may be in `out` nevertheless.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the model itself: it would be overwritten; name another directory")
    if out.is_file():
        raise ValueError(f"{out} is a file; name a directory")
    if out.is_dir() and any(file.name != but for file in out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new directory")
