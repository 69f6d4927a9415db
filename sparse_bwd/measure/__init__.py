"""Measuring: one step harness, shapes of real models, formulas of bytes and operations."""

from sparse_bwd.measure import flop_formulas  # registers what PyTorch's counter counts for our operators

__all__ = ["flop_formulas"]
