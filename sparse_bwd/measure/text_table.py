"""Tables of plain text, for terminals and files."""

from __future__ import annotations

import io
from collections.abc import Sequence

WIDTH = 110  # of text that goes to no terminal


def aligned(columns: Sequence[str], cells: Sequence[tuple[str, ...]], width: int | None = None) -> str:
    """An aligned table, whose last row stands apart if it is a total."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1))
    for name in columns:
        table.add_column(name, justify="left" if name in ("axis", "case", "layer") else "right", no_wrap=True)
    for row in cells:
        if row[0] == "total":
            table.add_section()
        table.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, width=width or WIDTH, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines()) + "\n"
