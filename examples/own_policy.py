"""Two policies of one's own, and a training loop that uses one: python examples/own_policy.py"""

import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.selection import BudgetPolicy, RankedPolicy


class LastLayersPolicy(RankedPolicy):
    """The channels of the last layers first. A ranking needs one number per row of `self.table`, no more."""

    def _score(self):
        return self.table.layer.double()


class RoundRobinPolicy(BudgetPolicy):
    """Channels in turn: every step goes on where the last one stopped, so that all are trained equally often."""

    def __init__(self, model, budget, axis="out"):
        super().__init__(model, budget, axis, bias="selected", seed=0)
        self.start = 0

    def _choose(self):
        order = torch.arange(len(self.table)).roll(-self.start)
        selection = self._take(order)  # as many as the budget pays for
        self.start = (self.start + selection.summary(self.model).channels) % len(self.table)
        return selection

    def state_dict(self):
        return {**super().state_dict(), "start": self.start}

    def _load(self, state):
        super()._load(state)
        self.start = state["start"]


def main():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    images, labels = torch.randn(64, 3, 16, 16), torch.randint(10, (64,))
    sb.convert(model)
    print(LastLayersPolicy(model, sb.Budget(fraction=0.2)).step().summary(model))

    policy = RoundRobinPolicy(model, sb.Budget(fraction=0.2))
    policy.step()
    optimizer = torch.optim.AdamW(sb.trainable_parameters(model), lr=1e-2)
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.3f}; {policy.report}")
        policy.step(optimizer)
    sb.restore(model)


if __name__ == "__main__":
    main()
