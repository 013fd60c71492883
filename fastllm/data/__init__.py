"""Evaluation text that comes with the package."""

from importlib.resources import files


def sample_text() -> str:
    """The beginning of the WikiText-2 validation set, 30 KB: over ten windows of 512 tokens with common tokenizers.

    Source and licence are in README.md beside it.
    """
    return files("fastllm.data").joinpath("wikitext2-sample.txt").read_text(encoding="utf-8")
