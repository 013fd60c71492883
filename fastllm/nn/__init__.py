"""Modules: parameters and one call."""

from .experts import QuantExperts
from .linear import QuantLinear

__all__ = ["QuantExperts", "QuantLinear"]
