"""The one refusal that all Functions share: their backward is not differentiated again."""

from __future__ import annotations

import torch


def refuse_second_order(name: str) -> None:
    """Raise if backward runs with create_graph=True.

    Raises:
        RuntimeError: a second derivative through the named layer was asked for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} keeps too little to be differentiated twice; call backward without create_graph=True, "
            "or use the plain layer (sparse_bwd.restore) where second derivatives are needed."
        )
