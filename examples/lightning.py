"""Fine-tune a small network with pytorch-lightning; a fifth of its weights, chosen anew every epoch by velocity."""

import tempfile

import pytorch_lightning as pl
import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.training.lightning import PolicyCallback


class Classifier(pl.LightningModule):
    """Any LightningModule will do; `configure_optimizers` is called after the first selection."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(sb.trainable_parameters(self), lr=1e-3)


pl.seed_everything(0)
images, labels = torch.randn(64, 1, 16, 16), torch.randint(10, (64,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
module = Classifier()
print(sb.convert(module.net))
policy = sb.VelocityPolicy(module.net, sb.Budget(fraction=0.2), probe=images[:8])
callback = PolicyCallback(policy)

with tempfile.TemporaryDirectory() as folder:
    trainer = pl.Trainer(
        max_epochs=3, callbacks=[callback], accelerator="auto", devices=1, default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)

for row in callback.history:
    print(row)
sb.restore(module)  # plain layers again
