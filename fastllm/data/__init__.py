"""Text that comes with the package: some to evaluate on, and other to calibrate with."""

from importlib.resources import files


def sample_text() -> str:
    """The beginning of the WikiText-2 validation set, 30 KB: over ten windows of 512 tokens with common tokenizers.

    Source and licence are in README.md beside it.
    """
    return files("fastllm.data").joinpath("wikitext2-sample.txt").read_text(encoding="utf-8")


def calibration_text() -> str:
    """A later part of the WikiText-2 validation set, 300 KB, which shares nothing with `sample_text`."""
    return files("fastllm.data").joinpath("wikitext2-calibration.txt").read_text(encoding="utf-8")
