"""What every rank of tests/test_ddp.py runs; alone, with `train(0, 1)`, the same training on one process."""

# DDP looks at the annotations of communication hooks, which must not be strings: no `from __future__` here.
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparse_bwd as sb
from sparse_bwd.distributed import follow, rewrap
from sparse_bwd.selection.policy import Policy

EPOCHS, BATCHES, IMAGES = 3, 2, 8
POLICIES = ("velocity", "gradient", "neq", "random")


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 12),
        nn.Linear(12, 4),
    )  # fmt: skip
    # Of a Linear with one row per image similarity runs over the batch, so that parts of a probe have another one.
    sb.convert(net, always_train=["10", "11"])
    return net


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 10, 10, generator=generator), torch.arange(count) % 4


def policy_of(kind: str, net: nn.Module, rank: int, world: int) -> Policy:
    """Each rank measures on its own part of the probe."""
    budget, (probe, labels) = sb.Budget(fraction=0.3), (part[rank::world] for part in images(8, 99))
    if kind == "velocity":
        return sb.VelocityPolicy(net, budget, probe, measure="exact", axis="in")
    if kind == "gradient":
        # The norm of each image's gradient, so that the mean does not depend on who holds which image.
        return sb.GradientNormPolicy(net, budget, list(zip(probe.split(1), labels.split(1), strict=True)))
    if kind == "neq":
        return sb.NEqPolicy(net, probe, top=0.4)
    return sb.RandomPolicy(net, budget, seed=rank)  # without one decision, ranks would draw others


def train(rank: int, world: int, kind: str = "velocity", following: bool = True) -> dict[str, Any]:
    net = network()
    policy = policy_of(kind, net, rank, world)
    chosen = [policy.step()]
    optimizer = torch.optim.SGD(sb.trainable_parameters(net), lr=0.1, momentum=0.9)
    wrapped, traffic, rewraps = net, [], []
    sent: list[int] = []
    if world > 1:
        # The Trainer of Hugging Face looks for unused parameters by default; then DDP does not mind lost ones.
        wrapped = DistributedDataParallel(
            net, gradient_as_bucket_view=True, find_unused_parameters=not following
        )
        wrapped.register_comm_hook(sent, counted)
        wrapped = follow(wrapped) if following else wrapped
    for epoch in range(EPOCHS):
        for batch in range(BATCHES):
            x, y = images(IMAGES, 10 * epoch + batch)
            sent.clear()
            nn.functional.cross_entropy(wrapped(x[rank::world]), y[rank::world]).backward()
            compact = sum(parameter.nbytes for parameter in sb.trainable_parameters(net))
            traffic.append((sum(sent), compact))
            nn.utils.clip_grad_norm_(sb.trainable_parameters(net), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        chosen.append(policy.step(optimizer))
        if world > 1 and following:
            began = time.perf_counter()
            rewrap(wrapped)
            rewraps.append(1000 * (time.perf_counter() - began))
    return {
        "chosen": [selection.to_dict() for selection in chosen], "traffic": traffic, "rewraps": rewraps,
        "state": {name: value.clone() for name, value in net.state_dict().items()},
    }  # fmt: skip


def counted(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's own average, with the bytes counted."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    sent.append(bucket.buffer().nbytes)
    return allreduce_hook(dist.group.WORLD, bucket)


def accumulate(rank: int, world: int) -> torch.Tensor:
    """Two half batches per step: the first without traffic, the second in a network selected anew."""
    net = network()
    sb.apply(net, {"0": [1]})
    wrapped = net if world == 1 else follow(DistributedDataParallel(net))
    sb.apply(net, {"0": [2, 3], "5": [4]})
    x, y = (part[rank::world] for part in images(IMAGES, 5))
    half = len(x) // 2
    if world > 1:
        with wrapped.no_sync():
            nn.functional.cross_entropy(wrapped(x[:half]), y[:half]).backward()
    else:
        nn.functional.cross_entropy(wrapped(x[:half]), y[:half]).backward()
    nn.functional.cross_entropy(wrapped(x[half:]), y[half:]).backward()
    gradient = sb.layers(net)["0"].trainable_weight.grad
    assert gradient is not None
    return gradient.clone()


def everything(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {kind: train(rank, world, kind) for kind in POLICIES}
    found["unfollowed"] = train(rank, world, following=False)
    found["accumulated"] = accumulate(rank, world)
    found["file"] = sb.save_trained(DistributedDataParallel(network()), None, network().state_dict()).nbytes
    return found
