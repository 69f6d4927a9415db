"""What every rank of tests/test_fsdp.py runs; alone, with `train(0, 1)`, the same training on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

import sparse_bwd as sb
from sparse_bwd.distributed import shard
from sparse_bwd.nn.shards import gathered, local

EPOCHS, BATCHES, IMAGES = 3, 2, 8
CASES = {
    "out": {"axis": "out", "norm": "frozen", "optimizer": "AdamW"},
    "in": {"axis": "in", "norm": "bias", "optimizer": "SGD"},
}


def network(norm: str = "frozen") -> nn.Sequential:
    """Units of a dense, a depthwise and a grouped convolution, and of two linear layers; odd numbers of channels."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU()),
        nn.Sequential(nn.Conv2d(9, 9, 3, groups=9), nn.ReLU(), nn.Conv2d(9, 15, 1, groups=3)),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(60, 12), nn.ReLU()),
        nn.Linear(12, 4),
    )
    sb.convert(net, batch_norm=norm)
    return net


def images(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(IMAGES, 3, 8, 8, generator=generator), torch.arange(IMAGES) % 4


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: gathered(value).detach().clone() for name, value in state.items()}


def optimizer_of(kind: str, net: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9} if kind == "SGD" else {"lr": 0.02}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(sb.trainable_parameters(net), **options)
    return optimizer


def step(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int, seed: int) -> None:
    x, y = images(seed)
    share = len(y[rank::world]) * world / IMAGES  # 3, 3 and 2 of 8 images
    (nn.functional.cross_entropy(net(x[rank::world]), y[rank::world]) * share).backward()
    nn.utils.clip_grad_norm_(sb.trainable_parameters(net), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def start(rank: int, world: int, case: str, first: bool = True) -> tuple[nn.Sequential, sb.VelocityPolicy]:
    """The network, sharded where there are several processes, and its policy; with `first` selected before sharding."""
    words = CASES[case]
    net = network(words["norm"])
    policy = sb.VelocityPolicy(
        net, sb.Budget(fraction=0.3), images(99)[0], axis=words["axis"], measure="exact"
    )
    if first:
        policy.step()
    if world > 1:
        shard(net, [net[0], net[1], net[2]])
    return net, policy


def train(rank: int, world: int, case: str) -> dict[str, Any]:
    net, policy = start(rank, world, case)
    optimizer = optimizer_of(CASES[case]["optimizer"], net)
    chosen = []
    for epoch in range(EPOCHS):
        for batch in range(BATCHES):
            step(net, optimizer, rank, world, 10 * epoch + batch)
        chosen.append(policy.step(optimizer).to_dict())
        step(net, optimizer, rank, world, 50 + epoch)
    sizes = [(local(p).numel(), p.numel()) for p in sb.trainable_parameters(net)]
    moments = [
        (local(value).shape == local(p).shape)
        for p, entry in optimizer.state.items()
        for value in entry.values()
        if value.dim()
    ]
    return {"state": whole(net.state_dict()), "chosen": chosen, "sizes": sizes, "moments": all(moments)}


def shards_are_current(rank: int, world: int) -> dict[str, bool]:
    """After a step and a forward the shards of the full weights hold the trained values, before anybody reads them."""
    net, _ = start(rank, world, "out")
    optimizer = optimizer_of("SGD", net)
    step(net, optimizer, rank, world, 0)
    with torch.no_grad():
        net(images(1)[0])
    found = {}
    for name, layer in sb.layers(net).items():
        raw = layer._parameters["weight"]
        found[name] = torch.equal(gathered(raw), gathered(layer.weight)) and bool((gathered(raw) != 0).any())
        if layer.channels is not None and len(layer.channels):
            rows = gathered(raw)[layer.channels]
            found[name] &= torch.equal(rows, gathered(layer.trainable_weight))
    return found


def save(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Two epochs with a checkpoint after the first; what the second ends with."""
    net, policy = start(rank, world, "out")
    optimizer = optimizer_of("AdamW", net)
    step(net, optimizer, rank, world, 0)
    policy.step(optimizer)
    step(net, optimizer, rank, world, 1)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    if rank == 0:
        torch.save(policy.state_dict(), folder / "policy.pt")
    for seed in (2, 3):
        step(net, optimizer, rank, world, seed)
    return {"state": whole(net.state_dict()), "keys": sorted(model_state)}


def load(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Go on from the checkpoint with any number of processes."""
    net, policy = start(rank, world, "out", first=False)
    policy.load_state_dict(torch.load(folder / "policy.pt", weights_only=True))
    assert policy.selection is not None
    sb.apply(net, policy.selection)
    optimizer = optimizer_of("AdamW", net)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for seed in (2, 3):
        step(net, optimizer, rank, world, seed)
    return {"state": whole(net.state_dict())}


def export(rank: int, world: int) -> dict[str, torch.Tensor]:
    """The whole state as PyTorch's own functions give it, and the trained channels by ours."""
    net, _ = start(rank, world, "in")
    step(net, optimizer_of("SGD", net), rank, world, 0)
    full = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    trained = sb.save_trained(net, None, network("bias").state_dict())
    plain = network("bias")
    sb.load_trained(plain, trained)
    ours = plain.state_dict()
    return {name: value == ours[name] for name, value in full.items()}


def chosen_by(rank: int, world: int) -> dict[str, Any]:
    """The selections of policies other than velocity."""
    net, _ = start(rank, world, "in", first=False)
    budget = sb.Budget(fraction=0.3)
    policies = {
        "random": sb.RandomPolicy(net, budget),
        "weights": sb.WeightNormPolicy(net, budget, axis="in"),
        "neq": sb.NEqPolicy(net, top=0.5, measure="weights"),
        "full": sb.FullPolicy(net),
    }
    found: dict[str, Any] = {}
    for name, policy in policies.items():
        policy.step()
        step(net, optimizer_of("SGD", net), rank, world, 0)
        found[name] = policy.step().to_dict()
    try:
        sb.GradientNormPolicy(net, budget, images(0)).step()
    except ValueError as error:
        found["gradient"] = str(error)
    found["state"] = whole(net.state_dict())
    return found


def mixed(rank: int, world: int) -> dict[str, Any]:
    """Two steps in bfloat16 with parameters kept in float32."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4))
    sb.convert(net, always_train=[])
    sb.apply(net, {"0": sb.Channels([1, 2, 7], "out"), "2": sb.Channels([3, 5], "in"), "3": None})
    if world > 1:
        shard(net, [net[0]], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = optimizer_of("SGD", net)
    for seed in range(2):
        x, y = torch.randn(IMAGES, 6, generator=torch.Generator().manual_seed(seed)), torch.arange(IMAGES) % 4
        nn.functional.cross_entropy(net(x[rank::world]).float(), y[rank::world]).backward()
        assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in sb.trainable_parameters(net))
        optimizer.step()
        optimizer.zero_grad()
    same = []
    for layer in sb.layers(net).values():
        rows = gathered(layer.weight)
        if layer.channels is not None:
            rows = rows.index_select(0 if layer.axis == "out" else 1, layer.channels)
        same.append(torch.equal(rows, gathered(layer.trainable_weight)))
    return {"state": whole(net.state_dict()), "same": same}


def everything(rank: int, world: int, checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = {case: train(rank, world, case) for case in CASES}
    found["current"] = shards_are_current(rank, world)
    found["save"] = save(rank, world, checkpoint)
    found["export"] = export(rank, world)
    found["mixed"] = mixed(rank, world)
    found["policies"] = chosen_by(rank, world)
    found["load"] = load(rank, world, checkpoint)
    return found
