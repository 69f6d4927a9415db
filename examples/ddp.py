"""Fine-tune on several processes: torchrun --nproc-per-node 2 examples/ddp.py (one process without torchrun)."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparse_bwd as sb
from sparse_bwd.distributed import follow

several = "RANK" in os.environ
on_gpu = torch.cuda.is_available()
if several:
    dist.init_process_group("nccl" if on_gpu else "gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)

torch.manual_seed(0)  # the same network and data on all ranks
net = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32),
    nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
).to(device)  # fmt: skip
images, labels = torch.randn(64, 3, 16, 16, device=device), torch.randint(10, (64,), device=device)

sb.convert(net)
policy = sb.VelocityPolicy(net, sb.Budget(fraction=0.2), probe=images[:8])
policy.step()  # all ranks call it and get one selection
optimizer = torch.optim.SGD(sb.trainable_parameters(net), lr=0.05, momentum=0.9)
model: nn.Module = net
if several:
    ddp = DistributedDataParallel(net, device_ids=[device.index] if on_gpu else None)
    ddp.broadcast_buffers = False  # frozen norms change no buffer
    model = follow(ddp)  # it makes itself anew after each selection

for epoch in range(3):
    for x, y in zip(images.split(16), labels.split(16), strict=True):
        loss = nn.functional.cross_entropy(model(x[rank::world]), y[rank::world])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.step(optimizer)
    if rank == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}; {policy.report}")

if several:
    dist.destroy_process_group()
