"""A training loop of one's own: a budget in bytes, a selection per epoch, bf16, an accumulated step, a schedule."""

import torch
from torch import nn

import sparse_bwd as sb

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
).to(memory_format=torch.channels_last)  # fmt: skip
images, labels = torch.randn(128, 1, 16, 16), torch.randint(10, (128,))
batches = list(zip(images.split(16), labels.split(16), strict=True))

x, y = batches[0]
dense = sb.memory.saved_bytes(lambda: nn.functional.cross_entropy(model(x), y))
print(sb.convert(model, batch_norm="bias"))  # the norms' shifts are trained too
budget = sb.Budget(bytes=900_000, batch=x, optimizer="sgd_momentum")  # the peak of a step with this batch
policy = sb.VelocityPolicy(model, budget, probe=images[:8], axis="in")
policy.step()
optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.05, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)

for epoch in range(3):
    total = 0.0
    for number, (x, y) in enumerate(batches, 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        (loss / 2).backward()
        total += loss.item()
        if number % 2 == 0:  # two batches per step; gradients have the size of what is selected
            nn.utils.clip_grad_norm_(sb.trainable_parameters(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    schedule.step()
    print(f"epoch {epoch + 1}: loss {total / len(batches):.3f}; {policy.report}")
    if epoch < 2:
        policy.step(optimizer)  # between optimizer steps; momentum of channels that stay is carried over

x, y = batches[0]
saved = sb.memory.saved_bytes(lambda: nn.functional.cross_entropy(model(x), y))
print(f"kept from forward to backward: {saved:,} bytes; plain layers, all trained: {dense:,}")
sb.restore(model)  # plain layers: torch.save(model.state_dict(), ...) as ever
