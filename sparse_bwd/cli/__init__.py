"""The command line: parses, calls, prints. Heavy imports wait until a command runs, so that --help is quick."""

from sparse_bwd.cli import (  # each adds its commands to the application
    bench,
    doctor,
    explain,
    finetune,
    profile,
    runs,
    search,
    tune,
)
from sparse_bwd.cli.common import app

__all__ = ["app", "bench", "doctor", "explain", "finetune", "main", "profile", "runs", "search", "tune"]


def main() -> None:
    """Entry point of `sparse-bwd`."""
    app()
