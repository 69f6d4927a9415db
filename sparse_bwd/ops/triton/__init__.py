"""Triton kernels: one file per operator, with its kernels and the functions that start them.

Each function has the arguments of the operator of its name and the same results, and returns NotImplemented for calls
that it cannot serve or that the table (`ops/tuning.py`) leaves to others. `ops/backend.py` imports a file at the first
call of its operator on a GPU, so that neither `import sparse_bwd` nor a machine without Triton pays for it.

Sums are in float32 at least and in an order that depends on the shape alone: no atomics, so that the same inputs give
the same bits. What is split over several programs is added up by a second kernel.
"""
