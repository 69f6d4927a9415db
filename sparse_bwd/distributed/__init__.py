"""Training on several processes: what wraps a network follows its selection."""

from sparse_bwd.distributed.ddp import follow, rewrap

__all__ = ["follow", "rewrap"]
