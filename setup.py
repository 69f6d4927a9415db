"""Build of the package; everything static is in pyproject.toml, everything native in build_native.py.

`SPARSE_BWD_NATIVE` says which native libraries to build: `auto` (the default: what the machine can build, and the pure
Python package where it can build none), `cpu`, `cuda` (CPU and CUDA), or `0` (none). Asked for by name, a library that
cannot be built is an error; it is never replaced by a slower package than the one asked for.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # PEP 517 leaves the directory of setup.py out

import build_native  # noqa: E402

COMPILES = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
IN_PLACE = {"--inplace", "-i", "develop", "editable_wheel"}

# Metadata and source archives are asked for several times per install, and importing torch takes seconds.
plan = {}
if not COMPILES.isdisjoint(sys.argv):
    request = os.environ.get("SPARSE_BWD_NATIVE") or "auto"
    plan = build_native.plan(ROOT, request, in_place=not IN_PLACE.isdisjoint(sys.argv))
setup(**plan)
