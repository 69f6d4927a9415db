"""Training on several processes: what wraps a network follows its selection."""

from sparse_bwd.distributed.ddp import follow, rewrap
from sparse_bwd.distributed.fsdp import shard

__all__ = ["follow", "rewrap", "shard"]
