"""A network of one's own: what converts, what stays plain and why, and how to say yourself which channels train.

`sparse-bwd bench --model own_model:network --size 32` from this folder measures what budgets buy on it.
"""

import torch
from torch import nn

import sparse_bwd as sb


class Scaled(nn.Conv2d):
    """A subclass computes what only it knows; it stays as it is, and the report says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class Block(nn.Module):
    """Modules are swapped, functions cannot be: an `nn.ReLU` keeps one bit per element, `torch.relu` its output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU()
        self.second = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(self.act(self.norm(self.first(x)))))


def network(num_classes: int = 10) -> nn.Module:
    blocks = [Block(16) for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), *blocks, Scaled(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, num_classes),
    )  # fmt: skip


def main() -> None:
    model, x = network(), torch.randn(8, 3, 32, 32)
    print(sb.convert(model, always_train=["6"]))
    # Channels by hand, axis "out": rows of the weight; None as index is the whole layer.
    chosen = {"1.first": sb.Channels(torch.tensor([0, 3, 5])), "2.second": sb.Channels(None)}
    sb.apply(model, sb.Selection(chosen))
    for name in ("1.first", "2.second"):
        print(name, "trains", tuple(sb.layers(model)[name].trainable_weight.shape))
    print(sb.memory.explain(model, x))  # by storage: who keeps it, and why
    optimizer = torch.optim.AdamW(sb.trainable_parameters(model), lr=1e-2)
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(x), torch.arange(8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.3f}")
    sb.restore(model)


if __name__ == "__main__":
    main()
