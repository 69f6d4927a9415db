"""`sparse-bwd doctor`."""

from __future__ import annotations

from sparse_bwd.cli.common import Json, app, reports_errors, show


@app.command()
@reports_errors
def doctor(as_json: Json = False) -> None:
    """What serves each operator on this machine and why, and what would make it faster."""
    from sparse_bwd.doctor import examine, render

    found = examine()
    show(found, render(found), as_json)
