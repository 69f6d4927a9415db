"""Registration of the operators: one name, one schema, one fake, and the implementation that serves each device.

Every operator of the library is `torch.ops.sparse_bwd.<name>`. It is defined here, once, with the function that runs it
on any device with plain PyTorch. The operators have no autograd of their own: they are called inside the forward and
backward of the Functions in `sparse_bwd.nn`, which decide what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "sparse_bwd"

_library = torch.library.Library(NAMESPACE, "DEF")


def register(schema: str, plain: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `sparse_bwd::<schema>`.

    Args:
        schema: name, arguments and results in PyTorch's schema language.
        plain: the implementation that works on every device.
        fake: shapes, dtypes and strides of the results without computing them.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, plain, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
