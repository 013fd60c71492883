"""Where a checkpoint may be written."""

from pathlib import Path


def refuse_out(out: Path, source: Path) -> None:
    """Raise ValueError where saving would fail or overwrite something, before minutes are spent.

    source: what is to be quantized.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the model itself: it would be overwritten; name another directory")
    if out.is_file():
        raise ValueError(f"{out} is a file; name a directory")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new directory")
