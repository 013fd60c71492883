"""Evaluation text that comes with the package."""

from importlib.resources import files


def sample_text() -> str:
    """The beginning of the WikiText-2 validation set: more than ten windows of 512 tokens with common tokenizers (see README.md)."""
    return files("fastllm.data").joinpath("wikitext2-sample.txt").read_text(encoding="utf-8")
