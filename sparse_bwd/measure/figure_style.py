"""How every figure of the library looks: plain axes, titles at the left, 8 inches wide for a page of 800 pixels."""

from __future__ import annotations

from typing import Any

WIDTH_INCHES, DPI = 8.0, 150
STYLE: dict[str, Any] = {  # for `matplotlib.rc_context`
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "hatch.linewidth": 0.4,
    "savefig.dpi": DPI,
    "figure.constrained_layout.use": True,
}


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files alone. ImportError where matplotlib, which is optional, is missing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
