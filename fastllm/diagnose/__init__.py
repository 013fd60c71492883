"""Measuring: how fast a model answers, and how well."""

from ..perplexity import Perplexity, perplexity
from .speed import Speed, anonymous_rss, bytes_per_token, measure, measure_alternating, peak_rss

__all__ = [
    "Perplexity",
    "Speed",
    "anonymous_rss",
    "bytes_per_token",
    "measure",
    "measure_alternating",
    "peak_rss",
    "perplexity",
]
