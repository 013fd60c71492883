"""Decoding: caches of keys and values, and the loop that `generate` runs."""

from .cache import KVCache

__all__ = ["KVCache"]
