"""Top-1 accuracy and mean loss of a network on labelled images."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_bwd.training.loader import Batch
from sparse_bwd.training.transforms import Preprocessing


@dataclass
class Accuracy:
    """Counts over the images seen so far."""

    count: int = 0
    correct: int = 0
    loss_sum: float = 0.0

    def add(self, outputs: Tensor, targets: Tensor, loss: float) -> None:
        """One batch: outputs [N, classes], class numbers [N], its mean loss."""
        self.count += len(targets)
        self.correct += int((outputs.argmax(1) == targets).sum())
        self.loss_sum += loss * len(targets)

    @property
    def loss(self) -> float:
        """Mean cross entropy per image; nan before the first image."""
        return self.loss_sum / self.count if self.count else float("nan")

    @property
    def top1(self) -> float:
        """Share of images whose class has the largest output; nan before the first image."""
        return self.correct / self.count if self.count else float("nan")

    def to_json(self) -> list[float]:
        """Arguments that make an equal object."""
        return [self.count, self.correct, self.loss_sum]


def measure_accuracy(
    model: nn.Module,
    batches: Iterable[Batch],
    preprocessing: Preprocessing,
    channels_last: bool = True,
    between: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Accuracy in eval mode over `batches` of uint8 images; the mode of every module is put back afterwards.

    `between` is called after each batch and may raise to stop.
    """
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    total = Accuracy()
    try:
        with torch.no_grad():
            for images, targets in batches:
                inputs = preprocessing.normalise(images.to(device))
                if channels_last:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                outputs = model(inputs)
                known = targets.to(device)
                total.add(outputs, known, nn.functional.cross_entropy(outputs, known).item())
                between()
    finally:
        for module, training in modes.items():
            module.training = training
    return total
