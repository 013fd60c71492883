"""Ops: a definition in plain torch, and the implementations that must agree with it."""

from .quant_matmul import LAYOUTS, choose_layout, quant_matmul

__all__ = ["LAYOUTS", "choose_layout", "quant_matmul"]
