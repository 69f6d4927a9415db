"""What every rank of tests/test_ddp.py and test_fsdp.py runs: starting processes takes longer than what they do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import ddp_program, fsdp_program


def main(part: str, out: Path, checkpoint: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if part in ("ddp", "both"):
        found["ddp"] = ddp_program.everything(rank, world)
    if part in ("fsdp", "both"):
        found["fsdp"] = fsdp_program.everything(rank, world, checkpoint)
    if part == "load":
        found["load"] = fsdp_program.load(rank, world, checkpoint)
    torch.save(found, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Device meshes keep gloo's threads alive beyond that; one that needs Python while it shuts down aborts the process
    # ("terminate called without an active exception"), in about one run of fifteen. All is written, so leave at once.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
