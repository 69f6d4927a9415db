"""Measuring: one step harness, shapes of real models, byte formulas."""
