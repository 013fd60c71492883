"""Patching: walk a model, decide, replace, report, restore."""

from .apply import is_patched, optimize, optimized, restore
from .dense import to_dense
from .errors import CoverageError, NotSupportedError
from .load import load
from .report import Report

__all__ = [
    "CoverageError",
    "NotSupportedError",
    "Report",
    "is_patched",
    "load",
    "optimize",
    "optimized",
    "restore",
    "to_dense",
]
