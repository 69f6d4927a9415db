"""Build of the package; everything static is in pyproject.toml.

This version has no native sources: the wheel is pure Python, and neither a compiler nor CUDA nor torch is
needed to build it. `SPARSE_BWD_NATIVE` (unset, `0`, `cpu` or `cuda`) asks for the native extension; a request
that cannot be met fails loudly instead of giving a slower package than the one asked for.
"""

import os

from setuptools import setup

native = os.environ.get("SPARSE_BWD_NATIVE", "0")
if native not in ("0", ""):
    raise SystemExit(
        f"SPARSE_BWD_NATIVE={native} asks for the native extension, but this version of sparse_bwd has no "
        "native sources. Unset the variable to install the pure Python package."
    )
print("sparse_bwd: no native sources in this version, building the pure Python package")
setup()
